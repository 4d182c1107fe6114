"""What `benchmark.py --device cuda` measures: attention, and FAR by every cell and kernel; a layer, whole models."""

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import collect_env

from deploy.timing import measure, peak_bytes
from models.choosing import CANDIDATES, choose_kernels
from models.deit import TEACHERS
from models.replace import FarConfig, build, set_backend, swap_attention
from utils.checkpoint import write_json
from utils.distributed import Context
from utils.errors import first_line
from utils.files import check_writable
from utils.terminal import table

ATTENTION = "attention (SDPA)"
CELLS = {"GRU": "gru", "minGRU": "mingru"}  # replacements beside the LSTM, each computed in the one way it has
# Autocast's; products of float32 use TF32 in both rows, gates and cell states are float32 in both.
PRECISIONS = {"TF32": None, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class GpuConfig:
    """What is measured. seconds: for each number."""

    output_dir: Path = Path("runs/gpu")
    seconds: float = 0.3
    batches: Sequence[int] = (1, 64, 256)
    models: Sequence[str] = ("DeiT-Tiny", "DeiT-Small", "DeiT-Base")


class Case(NamedTuple):
    """One number of the report."""

    part: str  # layer, model
    phase: str  # inference, training step
    precision: str  # a key of PRECISIONS
    model: str
    by: str  # attention, another cell, or a kernel of the LSTM
    batch: int


def random_model(base: str, by: str) -> nn.Module:
    """A model of random weights; by: what computes its blocks, see `Case`."""
    model = build(FarConfig(base, 1000, TEACHERS[base].input_size))
    if by != ATTENTION:
        swap_attention(model, range(len(model.blocks)), CELLS.get(by, "multi-lstm"))
        set_backend(model, "auto" if by in CELLS else by)
    return model


def caller(module: nn.Module, x: Tensor, case: Case) -> Callable[[], object]:
    """Forward without gradients, or forward and backward to every weight's gradient, in the case's precision."""
    dtype, device = PRECISIONS[case.precision], x.device.type

    def forward() -> Tensor:
        with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
            return module(x)

    def step() -> None:
        y = forward().float()
        labels = torch.zeros(len(y), dtype=torch.long, device=device)
        loss = F.cross_entropy(y, labels) if case.part == "model" else y.square().mean()
        loss.backward()
        module.zero_grad(set_to_none=True)

    training = case.phase == "training step"
    module.train(training).requires_grad_(training)
    return step if training else torch.inference_mode()(forward)


def measure_case(module: nn.Module, x: Tensor, case: Case, seconds: float) -> dict[str, Any]:
    """Milliseconds and peak bytes, or why it failed: a kernel that does not compile, or too little memory."""
    try:
        call = caller(module, x, case)
        return {"ms": statistics.median(measure(call, seconds)), "bytes": peak_bytes(call, x.device)}
    except Exception as error:  # noqa: BLE001  (whatever a compiler or driver says; the other rows are worth having)
        reason = first_line(error)
    module.zero_grad(set_to_none=True)
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)  # raises if nothing runs on the device any more
        torch.cuda.empty_cache()
    return {"failed": reason}


def measure_model(base: str, by: str, config: GpuConfig, device: torch.device) -> dict[Case, dict[str, Any]]:
    """Every case of one model computed in one way."""
    model = random_model(base, by).to(device)
    tokens, results = model.patch_embed.num_patches + model.num_prefix_tokens, {}
    shapes = {"layer": (tokens, model.embed_dim), "model": (3, *model.patch_embed.img_size)}
    for part, batch in itertools.product(shapes, config.batches):
        module, x = model.blocks[0].attn if part == "layer" else model, torch.randn(batch, *shapes[part], device=device)
        for phase, precision in itertools.product(("inference", "training step"), PRECISIONS):
            case = Case(part, phase, precision, base, by, batch)
            results[case] = measure_case(module, x, case, config.seconds)
    return results


def show(results: dict[Case, dict[str, Any]]) -> None:
    """A table of models and kernels by batch for each part, phase and precision."""
    batches = dict.fromkeys(case.batch for case in results)
    for title, cases in itertools.groupby(sorted(results, key=lambda case: case[:3]), key=lambda case: case[:3]):
        rows = {(case.model, case.by): [case.model, case.by] for case in cases}
        for (model, by), row in rows.items():
            for result in (results[Case(*title, model, by, batch)] for batch in batches):
                row.append(result.get("failed") or f"{result['ms']:.3g} ms, {result['bytes'] / 1e6:,.0f} MB")
        heads = ["", "computed by", *(f"batch {batch}" for batch in batches)]
        print(f"\n{', '.join(title)}\n{table([heads, *rows.values()])}", flush=True)


def run(config: GpuConfig, device: torch.device) -> int:
    """Measures everything, prints tables and writes gpu.json, after each model what it has. Returns the exit code."""
    check_writable(config.output_dir)
    config.output_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")  # TF32
    about = {"torch": torch.__version__, "CUDA": torch.version.cuda, "cuDNN": torch.backends.cudnn.version()}
    if device.type == "cuda":
        about["card"] = torch.cuda.get_device_name(device)
        about["driver"] = collect_env.get_nvidia_driver_version(collect_env.run)
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    results, chosen = {}, []

    def write() -> None:
        cases = [{**case._asdict(), **result} for case, result in results.items()]
        write_json(config.output_dir / "gpu.json", {"about": about, "cases": cases, "auto": chosen})

    for base, by in itertools.product(config.models, (ATTENTION, *CELLS, *CANDIDATES[device.type])):
        print(f"{base}, {by}", flush=True)
        results |= measure_model(base, by, config, device)
        write()
    show(results)
    print("\nwhat --lstm-backend auto takes")
    for base, batch, needs_grad in itertools.product(config.models, config.batches, (False, True)):
        model = random_model(base, "auto").to(device)
        choose_kernels(model, "auto", batch, Context(device=device), needs_grad=needs_grad)
        kernel = model.blocks[0].attn.backend
        chosen.append({"model": base, "batch": batch, "needs_grad": needs_grad, "kernel": kernel})
    write()
    print(f"written to {config.output_dir}: gpu.json")
    return 0
