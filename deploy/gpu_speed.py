"""What `benchmark.py --device cuda` measures: attention and FAR by every kernel, layers and models; its report."""

import contextlib
import importlib.metadata
import itertools
import json
import math
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deploy.timing import peak_bytes
from engine.choosing import CANDIDATES, decide
from engine.trial import milliseconds, synchronize
from models.deit import TEACHERS
from models.replace import FarConfig, build, replacements, set_backend, swap_attention
from utils.checkpoint import write_atomic
from utils.errors import FarError, first_line
from utils.files import check_writable

ATTENTION = "attention (SDPA)"
MODELS = ("DeiT-Tiny", "DeiT-Small", "DeiT-Base")
BATCHES = (1, 64, 256)
# What autocast is asked for; float32 products go by TF32 in both, gates and cell states are float32 in both.
PRECISIONS = {"TF32": None, "bfloat16": torch.bfloat16}
PHASES = ("inference", "training step")
PARTS = ("layer", "model")


@dataclass(frozen=True)
class Asked:
    """What is measured. seconds: for each thing at each shape."""

    output_dir: Path = Path("runs/gpu")
    seconds: float = 0.3
    batches: Sequence[int] = BATCHES
    models: Sequence[str] = MODELS


class Machine(NamedTuple):
    """What measures: times (ms) of repeated calls for some seconds, and the most bytes a call allocates besides."""

    device: torch.device
    times: Callable[[Callable[[], object], float], list[float]]
    peak: Callable[[Callable[[], object]], int]
    about: dict[str, str]


class Case(NamedTuple):
    """One number of the report."""

    part: str
    phase: str
    precision: str
    model: str
    by: str
    batch: int


Found = dict[Case, dict[str, Any]]  # ms, bytes; or failed: why


def repeated(call: Callable[[], object], seconds: float, device: torch.device) -> list[float]:
    """Milliseconds of calls that are waited for one by one, three at least, after two that warm up."""
    call(), call()
    times, end = [], time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        synchronize(device)
        started = time.perf_counter()
        call()
        synchronize(device)
        times.append((time.perf_counter() - started) * 1e3)
    return times


def cuda_peak(call: Callable[[], object], device: torch.device) -> int:
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    return torch.cuda.max_memory_allocated(device) - before


def driver() -> str:
    """The NVIDIA driver's version, `unknown` where nvidia-smi cannot say it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split()
    except (OSError, subprocess.SubprocessError):
        said = []
    return said[0] if said else "unknown"


def describe(device: torch.device) -> dict[str, str]:
    """The card and the versions that a number depends on."""
    found = {"torch": torch.__version__}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["Triton"] = importlib.metadata.version("triton")
    if device.type != "cuda":
        return {"card": f"no GPU, {device.type}", **found}
    card = torch.cuda.get_device_properties(device)
    runtime = {"driver": driver(), "CUDA": str(torch.version.cuda), "cuDNN": str(torch.backends.cudnn.version())}
    return {"card": f"{card.name}, {card.total_memory / 2**30:.0f} GiB", **runtime, **found}


def machine(device: torch.device) -> Machine:
    def times(call: Callable[[], object], seconds: float) -> list[float]:
        return repeated(call, seconds, device)

    def peak(call: Callable[[], object]) -> int:
        return cuda_peak(call, device) if device.type == "cuda" else peak_bytes(call)

    return Machine(device, times, peak, describe(device))


@contextlib.contextmanager
def tf32() -> Iterator[None]:
    """TF32 for matrix products of float32 inside the block; cuDNN has it by default."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def far(base: str, replaced: bool = True) -> nn.Module:
    """A model of random weights, all of its blocks FAR's or none."""
    model = build(FarConfig(base, 1000, TEACHERS[base].input_size))
    if replaced:
        swap_attention(model, range(len(model.blocks)), "multi-lstm")
    return model


def inputs(model: nn.Module, part: str, batch: int, device: torch.device) -> Tensor:
    tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    shape = (tokens, model.embed_dim) if part == "layer" else (3, *model.patch_embed.img_size)
    return torch.randn(batch, *shape, device=device)


def caller(module: nn.Module, x: Tensor, case: Case) -> Callable[[], object]:
    """A call: forward, or forward and backward of every weight's gradient, in a precision."""
    dtype, device = PRECISIONS[case.precision], x.device.type

    def forward() -> Tensor:
        with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
            return module(x)

    def infer() -> None:
        with torch.inference_mode():
            forward()

    def step() -> None:
        y = forward().float()
        labels = torch.zeros(len(y), dtype=torch.long, device=device)
        loss = F.cross_entropy(y, labels) if case.part == "model" else y.square().mean()
        loss.backward()
        module.zero_grad(set_to_none=True)

    training = case.phase == "training step"
    module.train(training).requires_grad_(training)
    return step if training else infer


def take(module: nn.Module, x: Tensor, case: Case, seconds: float, on: Machine) -> dict[str, Any]:
    """Time and memory of a case, or why it failed: a kernel that does not compile, or too little memory.

    Raises RuntimeError where nothing runs on the device any more.
    """
    try:
        call = caller(module, x, case)
        times = on.times(call, seconds)
        return {"ms": statistics.median(times), "bytes": on.peak(call)}
    except torch.OutOfMemoryError:
        reason = "out of memory"
    except Exception as error:  # noqa: BLE001  (whatever a compiler or driver says; the other rows are worth having)
        reason = first_line(error)
    module.zero_grad(set_to_none=True)
    synchronize(on.device)
    if on.device.type == "cuda":
        torch.cuda.empty_cache()
    return {"failed": reason}


def measure_model(base: str, by: str, asked: Asked, on: Machine, found: Found) -> None:
    """Adds every case of one model computed in one way."""
    model = far(base, by != ATTENTION).to(on.device)
    set_backend(model, by)
    for part, batch in itertools.product(PARTS, asked.batches):
        module, x = model.blocks[0].attn if part == "layer" else model, inputs(model, part, batch, on.device)
        for phase, precision in itertools.product(PHASES, PRECISIONS):
            case = Case(part, phase, precision, base, by, batch)
            found[case] = take(module, x, case, asked.seconds, on)
            said = found[case].get("failed") or f"{found[case]['ms']:.3f} ms, {found[case]['bytes'] / 1e6:.0f} MB"
            print(f"  {', '.join(map(str, case))}: {said}", flush=True)


def choices(base: str, asked: Asked, on: Machine) -> list[dict[str, Any]]:
    """What --lstm-backend auto takes for a model, and what it leaves out, by batch."""
    model = far(base).to(on.device)
    tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    task = replacements(model)[0].task
    tasks = [task(batch, tokens)._replace(learns=way) for batch in asked.batches for way in (False, True)]
    return [{"model": base, **row} for row in decide(tasks, len(model.blocks), None, milliseconds)]


def cell(found: dict[str, Any], batch: int, best: bool) -> str:
    if "failed" in found:
        return found["failed"].replace("|", "/")
    ms = f"**{found['ms']:.3g} ms**" if best else f"{found['ms']:.3g} ms"
    return f"{ms}, {batch / found['ms'] * 1e3:,.0f} images/s, {found['bytes'] / 1e6:,.0f} MB"


def table(found: Found, part: str, phase: str, precision: str, asked: Asked) -> list[str]:
    """Rows of models and ways, columns of batches; the fastest of a model and batch is bold."""
    ways = list(dict.fromkeys(case.by for case in found))
    lines = [f"| model | computed by | {' | '.join(f'batch {batch}' for batch in asked.batches)} |"]
    lines.append("| --- | --- |" + " --- |" * len(asked.batches))
    for base in asked.models:
        cases = {by: [Case(part, phase, precision, base, by, batch) for batch in asked.batches] for by in ways}
        rows = {by: [found.get(case, {"failed": "not measured"}) for case in row] for by, row in cases.items()}
        best = [min(row[k].get("ms", math.inf) for row in rows.values()) for k in range(len(asked.batches))]
        for by, row in rows.items():
            cells = [cell(one, b, one.get("ms") == m) for one, b, m in zip(row, asked.batches, best, strict=True)]
            lines.append(f"| {base} | {by if by == ATTENTION else f'FAR, {by}'} | {' | '.join(cells)} |")
    return lines


def report(found: Found, taken: list[dict[str, Any]], about: dict[str, str], asked: Asked, lost: str = "") -> str:
    """The page, in Markdown; lost: why the rest could not be measured."""
    versions = ", ".join(f"{name} {value}" for name, value in about.items() if name != "card")
    lines = [
        f"## {about['card']}",
        "",
        f"{versions}. `make gpu`; random weights. Median of calls that are waited for; ",
    ]
    lines[-1] += (
        "peak memory is what a call allocates beside weights and input. A training step is forward and backward. "
        "bfloat16 is autocast; the LSTMs' gates and cell states are float32 in every row, their products TF32."
    )
    for part, phase, precision in itertools.product(PARTS, PHASES, PRECISIONS):
        what = "Whole model" if part == "model" else "One layer in attention's place"
        lines += ["", f"**{what}, {phase}, {precision}**", "", *table(found, part, phase, precision, asked)]
    lines += ["", "**What `--lstm-backend auto` takes** (ms of the LSTMs of a layer alone)", ""]
    lines += ["| model | batch | for | takes | times | leaves out |", "| --- | --- | --- | --- | --- | --- |"]
    for row in taken:
        times = ", ".join(f"{name} {ms:.3g}" for name, ms in row["ms"].items())
        out = ", ".join(f"{name}: {reason}" for name, reason in row["left_out"].items()).replace("|", "/")
        way = "training" if row["learns"] else "evaluation"
        lines.append(f"| {row['model']} | {row['batch']} | {way} | {row['kernel']} | {times} | {out} |")
    return "\n".join(lines + ["", f"**Stopped before its end**: {lost}"] * bool(lost)) + "\n"


def measure_all(asked: Asked, on: Machine, found: Found, taken: list[dict[str, Any]]) -> None:
    """Adds everything, kernels that were never tried on a GPU last."""
    for by, base in itertools.product((ATTENTION, *CANDIDATES[on.device.type]), asked.models):
        measure_model(base, by, asked, on, found)
    for base in asked.models:
        taken += choices(base, asked, on)


def run(asked: Asked, on: Machine) -> int:
    """Measures everything; writes report.md and gpu.json, and what it has where the device gives up. The exit code."""
    check_writable(asked.output_dir)
    torch.manual_seed(0)
    print(", ".join(f"{name} {value}" for name, value in on.about.items()), flush=True)
    found: Found = {}
    taken: list[dict[str, Any]] = []
    lost = ""
    with tf32():
        try:
            measure_all(asked, on, found, taken)
        except (RuntimeError, FarError) as error:
            lost = first_line(error)
    numbers = [{**case._asdict(), **numbers} for case, numbers in found.items()]
    record = json.dumps({"about": on.about, "cases": numbers, "auto": taken, "lost": lost}, indent=1).encode()
    page = report(found, taken, on.about, asked, lost)
    asked.output_dir.mkdir(parents=True, exist_ok=True)
    write_atomic(asked.output_dir / "gpu.json", lambda file: file.write(record))
    write_atomic(asked.output_dir / "report.md", lambda file: file.write(page.encode()))
    print(f"\n{page}\nwritten to {asked.output_dir}: report.md, gpu.json")
    return int(bool(lost))
