"""What benchmark.py measures: the things compared, how time and memory are taken, and the ratios worth reaching."""

import importlib.util
import statistics
import tempfile
import time
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from datasets.loading import Data, DataConfig
from deploy.fuse import fuse
from deploy.rivals import BASE, DIM, HEADS, open_onnx_runtime
from deploy.timing import PAUSE_S, Times, interleaved
from engine.evaluate import evaluate
from models import kernels
from models.bilstm import MultiHeadBiLSTM
from models.count import count_macs
from models.deit import create_teacher
from models.replace import count_parameters, load_model
from utils.distributed import Context

KEEP = {"FAR pruned 0.5": 0.5, "FAR pruned 0.25": 0.25}

# what, at least, (section, the slower's name, the faster's): ratios of times, at 224 px unless the section says else
LAYER_TARGETS = (
    ("layer, batch 1: FAR fused over the published dense shape", 3.5, ("layer, batch 1", "dense BiLSTM", "FAR fused")),
    ("layer, batch 1: FAR fused over attention", 1 / 1.3, ("layer, batch 1", "attention", "FAR fused")),
    ("layer, batch 1: FAR pruned 0.5 over attention", 1.5, ("layer, batch 1", "attention", "FAR pruned 0.5")),
    ("layer, batch 1: FAR pruned 0.25 over attention", 2.2, ("layer, batch 1", "attention", "FAR pruned 0.25")),
    ("layer, batch 8: FAR fused over attention", 1 / 1.4, ("layer, batch 8", "attention", "FAR fused")),
    ("layer, batch 8: FAR pruned 0.5 over attention", 1.2, ("layer, batch 8", "attention", "FAR pruned 0.5")),
    ("layer, 4,097 tokens: FAR fused over attention", 4.0, ("4097 tokens", "attention", "FAR fused")),
)


class DenseLSTM(nn.Module):
    """The published shape: one torch LSTM of width D, the heads blocks on its diagonal, then the output projections."""

    def __init__(self, attn: MultiHeadBiLSTM):
        super().__init__()
        self.pre, self.lstm, self.post = attn.pre_proj, attn.to_dense(), attn.post_proj
        self.join = nn.Linear(2 * attn.dim, attn.dim)

    def forward(self, x: Tensor, **_) -> Tensor:
        return self.post(self.join(self.lstm(self.pre(x))[0]))


def layers(tokens: int) -> dict[str, nn.Module]:
    """One layer of DeiT-Tiny in every form, random weights."""
    far, stock = MultiHeadBiLSTM(DIM, HEADS, tokens), MultiHeadBiLSTM(DIM, HEADS, tokens)
    stock.backend = "torch"
    kept = {name: [(int(DIM // HEADS * keep),) * 2] * HEADS for name, keep in KEEP.items()}
    return {
        "attention": create_teacher(BASE, 1000, 224).blocks[0].attn,
        "dense BiLSTM": DenseLSTM(far),
        "FAR torch": stock,
        "FAR": far,
        "FAR fused": far.merged(),
        **{name: MultiHeadBiLSTM(DIM, HEADS, tokens, units).merged() for name, units in kept.items()},
    }


def training_steps(seconds: float) -> Times:
    """Forward and backward of a layer, batch 8, 197 tokens."""
    x, trained = torch.randn(8, 197, DIM, requires_grad=True), layers(197)
    calls = {
        name: lambda m=trained[name]: m(x).sum().backward()
        for name in ("attention", "dense BiLSTM", "FAR torch", "FAR")
    }
    return interleaved(calls, seconds, 3)


def ratio(slow: dict[str, float], fast: dict[str, float]) -> float:
    """How many times as fast."""
    return slow["median_ms"] / fast["median_ms"]


def reached(out: dict, threads: int) -> list[dict]:
    """The rows of LAYER_TARGETS whose sections were measured: what, at_least, reached."""
    sections = {f"layer, batch {b}": out.get(f"layer, batch {b}, threads {threads}") for b in (1, 8)}
    sections["4097 tokens"] = {name: p for name, points in out["tokens"].items() for p in points if p["tokens"] == 4097}
    return [
        {"what": what, "at_least": least, "reached": ratio(times[slow], times[fast])}
        for what, least, (section, slow, fast) in LAYER_TARGETS
        if (times := sections[section])
    ]


def trained(folder: Path) -> dict[str, Path]:
    """Checkpoints that `make demo`, and prune.py --sweep in it, left in a folder: name to file."""
    named = {"DeiT-Micro (attention)": folder / "teacher/best.pth", "FAR fused": folder / "far/best.pth"}
    named |= {
        f"FAR fused, {p.parent.name.replace('-', ' ')}": p
        for p in sorted(folder.glob("*/keep-*/best.pth"), reverse=True)
    }
    if len(named) == 2:
        named["FAR fused, keep 0.5"] = folder / "prune/best.pth"  # as the demo prunes
    return {name: path for name, path in named.items() if path.is_file()}


ENGINE, ONNX_RUNTIME = "our engine", "ONNX Runtime"


@torch.inference_mode()
def one_image(models: dict[str, VisionTransformer], seconds: float = 1.0) -> dict[str, dict[str, float | None]]:
    """Milliseconds for one image by runtime and model, in float32, all on torch's number of threads.

    The models of a runtime take turns for `seconds`; lower quartiles, as other work only adds time. ONNX Runtime's are
    None where it, or onnx, is not installed.
    """
    side = next(iter(models.values())).patch_embed.img_size[0]
    image = torch.randn(1, 3, side, side)
    fused = {name: fuse(model) for name, model in models.items()}
    calls = {ENGINE: {name: lambda m=m: m(image) for name, m in fused.items()}, ONNX_RUNTIME: {}}
    if all(map(importlib.util.find_spec, ("onnx", "onnxruntime"))):
        from deploy.onnx_graph import to_onnx

        with tempfile.TemporaryDirectory() as folder:
            for k, (name, model) in enumerate(models.items()):
                file = Path(folder) / f"{k}.onnx"
                file.write_bytes(to_onnx(model).SerializeToString())
                call = open_onnx_runtime(str(file), torch.get_num_threads())
                calls[ONNX_RUNTIME][name] = lambda call=call: call(image)
    found: dict[str, dict[str, float | None]] = {}
    for runtime, known in calls.items():
        time.sleep(PAUSE_S)  # threads of one that still spin would spoil the other's times
        times = interleaved(known, seconds) if known else {}
        found[runtime] = {name: times[name]["quartiles_ms"][0] if known else None for name in models}
    return found


@torch.inference_mode()
def accuracy_and_latency(folders: list[Path], seconds: float) -> list[dict]:
    """Trained models on DIGITS' evaluation split: mean top-1 over the folders, time an image of the first one's."""
    accuracy: dict[str, list[float]] = {}
    first: dict[str, nn.Module] = {}
    rows: dict[str, dict] = {}
    for folder in folders:
        for name, path in trained(folder).items():
            variants = {name: torch.float32}
            if name == "FAR fused" and kernels.cpu.has_bfloat16():
                variants["FAR fused bfloat16"] = torch.bfloat16
            for label, precision in variants.items():
                model, config = load_model(path, f"--runs {folder}")
                rows.setdefault(
                    label, {"name": label, "parameters": count_parameters(model), "macs": count_macs(model)}
                )
                side = config.img_size
                first.setdefault(label, fuse(model, precision))
                loader = Data(DataConfig("DIGITS", Path(), side, num_workers=0), Context()).val_loader(60)
                accuracy.setdefault(label, []).append(evaluate(model, loader, Context(), torch.no_grad)["acc1"])
    if not rows:
        return []
    image = torch.randn(1, 3, side, side)
    times = interleaved({name: lambda m=m: m(image) for name, m in first.items()}, seconds)
    return [
        {**row, "acc1": statistics.mean(accuracy[name]), "seeds": len(accuracy[name]), **times[name]}
        for name, row in rows.items()
    ]
