"""What benchmark.py compares besides whole programs: one layer in every form, and the demo's trained models."""

import importlib.util
import statistics
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from datasets.loading import Data
from deploy.fuse import fuse
from deploy.latency import in_engine
from deploy.rivals import BASE, DIM, HEADS, new_process, open_onnx_runtime, open_openvino
from deploy.timing import PAUSE_S, compare, lower_quartiles
from models import kernels
from models.bilstm import MultiHeadBiLSTM
from models.count import count_macs
from models.deit import create_teacher
from models.replace import count_parameters, load_model
from utils.configs import DataConfig
from utils.distributed import Context

KEEP = {"FAR pruned 0.5": 0.5, "FAR pruned 0.25": 0.25}
ENGINE, ONNX_RUNTIME = "our engine", "ONNX Runtime"


class DenseLSTM(nn.Module):
    """The published shape: one torch LSTM of width D, the heads blocks on its diagonal, then the output projections."""

    def __init__(self, attn: MultiHeadBiLSTM):
        super().__init__()
        self.pre, self.lstm, self.post = attn.pre_proj, attn.to_dense(), attn.post_proj
        self.join = nn.Linear(2 * attn.dim, attn.dim)

    def forward(self, x: Tensor, **_) -> Tensor:
        return self.post(self.join(self.lstm(self.pre(x))[0]))


def layers(tokens: int) -> dict[str, nn.Module]:
    """One layer of DeiT-Tiny in every form, random weights: (B, tokens, D) to the same shape."""
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


def one_image(models: dict[str, VisionTransformer], seconds: float = 1.0) -> dict[str, dict[str, float | None]]:
    """Milliseconds for one image by runtime and model, in float32, all on torch's number of threads.

    The models of a runtime take turns for `seconds`. ONNX Runtime's are None if it, or onnx, is not installed.
    """
    image = torch.randn(1, 3, *next(iter(models.values())).patch_embed.img_size)
    times = {ENGINE: in_engine(models, seconds), ONNX_RUNTIME: dict.fromkeys(models)}
    if all(map(importlib.util.find_spec, ("onnx", "onnxruntime"))):
        from deploy.onnx_graph import to_onnx

        files = {name: to_onnx(model).SerializeToString() for name, model in models.items()}
        calls = {name: partial(open_onnx_runtime(file), image) for name, file in files.items()}
        time.sleep(PAUSE_S)
        times[ONNX_RUNTIME] = lower_quartiles(calls, seconds)
    return times


def _time_openvino(file: str, shape: Sequence[int], seconds: float) -> float:
    return lower_quartiles({"": partial(open_openvino(file), torch.randn(1, *shape))}, seconds)[""]


def in_openvino(model: VisionTransformer, seconds: float = 1.0) -> float | None:
    """Milliseconds for one image in OpenVINO, float32: alone, in a process of its own; a lower quartile.

    None if it, or onnx, is not installed.
    """
    if not all(map(importlib.util.find_spec, ("onnx", "openvino"))):
        return None
    from deploy.onnx_graph import to_onnx

    shape = (model.patch_embed.proj.in_channels, *model.patch_embed.img_size)
    with tempfile.TemporaryDirectory() as folder, new_process(torch.get_num_threads()) as process:
        file = Path(folder) / "model.onnx"
        file.write_bytes(to_onnx(model).SerializeToString())
        return process.submit(_time_openvino, str(file), shape, seconds).result()


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


@torch.inference_mode()
def accuracy_and_latency(folders: list[Path], seconds: float) -> list[dict]:
    """Trained models on DIGITS' evaluation split: mean top-1 over the folders, time for an image of the first one's."""
    rows: dict[str, dict] = {}
    accuracy: dict[str, list[float]] = {}
    calls = {}
    for folder in folders:
        for name, path in trained(folder).items():
            variants = {name: torch.float32}
            if name == "FAR fused" and kernels.cpu.has_bfloat16():
                variants["FAR fused bfloat16"] = torch.bfloat16
            model, config = load_model(path, f"--runs {folder}")
            image = torch.randn(1, 3, config.img_size, config.img_size)
            loader = Data(DataConfig("DIGITS", Path(), config.img_size, num_workers=0), Context()).val_loader(60)
            for label, precision in variants.items():
                fused = fuse(model, precision)
                size = {"parameters": count_parameters(model), "macs": count_macs(model)}
                rows.setdefault(label, {"name": label, **size})
                calls.setdefault(label, partial(fused, image))
                right = sum(int((fused(images).argmax(1) == labels).sum()) for images, labels in loader)
                accuracy.setdefault(label, []).append(100 * right / len(loader.dataset))
    times = compare(calls, seconds, rounds=10)
    for name, row in rows.items():
        row |= {"acc1": statistics.mean(accuracy[name]), "seeds": len(accuracy[name]), **times[name]}
    return list(rows.values())
