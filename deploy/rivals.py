"""Whole models in the runtimes that people deploy them with, each runtime in a process of its own, timed in turns.

Thread pools that spin spoil each other's numbers, so one program runs for a while, all rest, and the next one runs.
`python -m deploy.rivals` is such a process: it reads questions, a JSON object a line, and answers with milliseconds.
"""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import filelock
import torch
from torch import nn

from deploy.fuse import fuse
from deploy.timing import PAUSE_S, summary
from models import kernels
from models.replace import FarConfig, build, count_parameters
from utils.errors import FarError

BASE, DIM, HEADS, DEPTH = "DeiT-Tiny", 192, 3, 12
OPENVINO, OURS = "OpenVINO", "FAR engine"
ROUNDS = 3
ONNX_OPSET = 18


@dataclass(frozen=True)
class Variant:
    """A model of random weights. keep: share of the LSTM's units, None is attention; mlp: share of the MLPs' units."""

    keep: float | None = None
    mlp: float = 1.0

    def build(self, size: int) -> nn.Module:
        blocks = tuple(range(DEPTH))
        units = {str(i): [[round(DIM // HEADS * self.keep)] * 2] * HEADS for i in blocks if (self.keep or 1) < 1}
        hidden = {str(i): int(4 * DIM * self.mlp) for i in blocks} if self.mlp < 1 else {}
        torch.manual_seed(0)
        config = FarConfig(BASE, 1000, size, replaced=blocks if self.keep else (), units=units, mlp=hidden)
        return build(config).eval().requires_grad_(False)


VARIANTS = {
    BASE: Variant(),
    f"{BASE}, MLP 0.5": Variant(mlp=0.5),
    "FAR": Variant(1.0),
    "FAR 0.5": Variant(0.5),
    "FAR 0.25": Variant(0.25),
    "FAR 0.25, MLP 0.5": Variant(0.25, 0.5),
}
Call = Callable[[torch.Tensor], object]


@dataclass(frozen=True)
class Setting:
    """What all programs share. folder: where a model's ONNX file is left, for the next that needs it."""

    threads: int
    folder: str


def eager(model: nn.Module, precision: str, setting: Setting) -> Call:
    return model


def compiled(model: nn.Module, precision: str, setting: Setting) -> Call:
    from torch._inductor import config

    config.freezing = True  # weights become constants, laid out once
    dtype = getattr(torch, precision)
    module = torch.compile(model.to(dtype))
    return lambda images: module(images.to(dtype))


def export(model: nn.Module, setting: Setting) -> str:
    """The model as an ONNX file, batch dynamic; the first process that asks for it makes it."""
    side = model.patch_embed.img_size[0]
    file = Path(setting.folder) / f"{count_parameters(model)}-{side}.onnx"
    with filelock.FileLock(f"{file}.lock"):
        if not file.exists():
            images, batch = torch.randn(2, 3, side, side), {0: torch.export.Dim("batch")}
            shapes = {"dynamic_shapes": (batch,), "opset_version": ONNX_OPSET}
            torch.onnx.export(model, (images,), dynamo=True, verbose=False, **shapes).save(file)
    return str(file)


def open_onnx_runtime(file: str, threads: int) -> Call:
    """An ONNX file in ONNX Runtime: images to a list of results."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images.numpy()})


def open_openvino(file: str, threads: int, precision: str = "float32") -> Call:
    """The same in OpenVINO."""
    import openvino as ov

    hint = {"float32": "f32", "bfloat16": "bf16"}[precision]
    options = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
    network = ov.Core().compile_model(file, "CPU", {**options, "PERFORMANCE_HINT": "LATENCY"})
    request = network.create_infer_request()
    return lambda images: request.infer([images.numpy()], share_inputs=True)


def onnx_runtime(model: nn.Module, precision: str, setting: Setting) -> Call:
    file = export(model, setting)
    if precision == "int8":
        from onnxruntime.quantization import quantize_dynamic

        quantize_dynamic(file, file := f"{file}.int8")
    return open_onnx_runtime(file, setting.threads)


def openvino(model: nn.Module, precision: str, setting: Setting) -> Call:
    return open_openvino(export(model, setting), setting.threads, precision)


def engine(model: nn.Module, precision: str, setting: Setting) -> Call:
    return fuse(model, getattr(torch, precision))


@dataclass(frozen=True)
class Runtime:
    """make: (model, precision, setting) to a function of images. package: what must be installed for it."""

    make: Callable[[nn.Module, str, Setting], Call]
    precisions: tuple[str, ...]
    package: str = "torch"


RUNTIMES = {
    "timm eager": Runtime(eager, ("float32",)),
    "torch.compile": Runtime(compiled, ("bfloat16",)),
    "ONNX Runtime": Runtime(onnx_runtime, ("float32", "int8"), "onnxruntime"),
    OPENVINO: Runtime(openvino, ("float32", "bfloat16"), "openvino"),
    OURS: Runtime(engine, ("float32", "bfloat16")),
}


@dataclass(frozen=True)
class Program:
    """A model in a runtime. `large`: one of those that are timed on larger images too."""

    model: str
    runtime: str
    precision: str

    def __str__(self) -> str:
        return f"{self.model} / {self.runtime} {self.precision}"

    @property
    def large(self) -> bool:
        return self.runtime in (OPENVINO, OURS) and self.model in (BASE, "FAR", "FAR 0.25")

    def lacks(self) -> str:
        """Why it cannot run here; empty where it can."""
        package = RUNTIMES[self.runtime].package
        if not importlib.util.find_spec(package):
            return f"{package} is not installed"
        half = self.precision == "bfloat16" and self.runtime == OURS
        return "this CPU has no AVX512_BF16" if half and not kernels.cpu.has_bfloat16() else ""


def programs(runtimes: Collection[str]) -> list[Program]:
    """The teacher in every runtime; one with pruned MLPs in the fastest and in ours; FAR in ours."""
    wanted = {BASE: RUNTIMES, f"{BASE}, MLP 0.5": (OPENVINO, OURS)}
    chosen = [(model, runtime) for model in VARIANTS for runtime in wanted.get(model, (OURS,)) if runtime in runtimes]
    return [Program(model, runtime, p) for model, runtime in chosen for p in RUNTIMES[runtime].precisions]


def answer(name: str, precision: str, setting: Setting) -> Iterator[None]:
    """A process's life: questions on standard input (model, size, batch, seconds), times in ms on its first output."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    torch.set_num_threads(setting.threads)
    calls: dict[tuple[str, int], Call] = {}
    with torch.no_grad():
        for line in sys.stdin:
            model, size, batch, seconds = json.loads(line)
            if (model, size) not in calls:
                calls[model, size] = RUNTIMES[name].make(VARIANTS[model].build(size), precision, setting)
            images = torch.randn(batch, 3, size, size)
            times = measure(lambda: calls[model, size](images), seconds)  # noqa: B023  (called within the turn)
            print(json.dumps(times), file=out, flush=True)
            yield


def measure(call: Callable[[], object], seconds: float) -> list[float]:
    """Milliseconds of repeated calls, two at least. The first warms up; it counts only where calls are as long as that.

    With 0 seconds it is called once.
    """
    times, end, least = [], time.perf_counter() + seconds, 2 if seconds else 1
    while time.perf_counter() < end or len(times) < least:
        started = time.perf_counter()
        call()
        times.append((time.perf_counter() - started) * 1e3)
    return times[1:] if len(times) > 2 else times


# what, at least, aim, precision, (batch, size), the program it is compared with, ours: ratios of times
TARGETS = (
    ("FAR unpruned", 0.95, 1.1, "float32", (1, 224), (BASE, OPENVINO), "FAR"),
    ("FAR 0.25", 1.4, 1.6, "float32", (1, 224), (BASE, OPENVINO), "FAR 0.25"),
    ("FAR 0.25, half the MLPs", 2.1, 2.4, "float32", (1, 224), (BASE, OPENVINO), "FAR 0.25, MLP 0.5"),
    ("FAR unpruned", 1.0, 1.2, "bfloat16", (1, 224), (BASE, OPENVINO), "FAR"),
    ("FAR 0.25", 1.6, 1.9, "bfloat16", (1, 224), (BASE, OPENVINO), "FAR 0.25"),
    ("FAR 0.25, half the MLPs", 2.2, 2.7, "bfloat16", (1, 224), (BASE, OPENVINO), "FAR 0.25, MLP 0.5"),
    ("FAR 0.25", 1.5, 1.8, "float32", (8, 224), (BASE, OPENVINO), "FAR 0.25"),
    ("FAR 0.25", 1.5, 1.8, "float32", (32, 224), (BASE, OPENVINO), "FAR 0.25"),
    ("FAR 0.25", 1.5, 2.0, "bfloat16", (8, 224), (BASE, OPENVINO), "FAR 0.25"),
    ("FAR 0.25", 1.5, 2.0, "bfloat16", (32, 224), (BASE, OPENVINO), "FAR 0.25"),
    ("FAR unpruned", 1.5, 2.0, "float32", (1, 512), (BASE, OPENVINO), "FAR"),
    ("FAR unpruned", 1.5, 2.0, "bfloat16", (1, 512), (BASE, OPENVINO), "FAR"),
    ("FAR 0.25", 1.25, 1.45, "float32", (1, 224), (BASE, OURS), "FAR 0.25"),
    ("FAR 0.25", 1.25, 1.45, "float32", (8, 224), (BASE, OURS), "FAR 0.25"),
    ("FAR 0.25", 1.25, 1.45, "float32", (32, 224), (BASE, OURS), "FAR 0.25"),
)


def reached(found: dict[tuple[int, int], dict[str, dict]]) -> list[dict]:
    """The rows of TARGETS whose programs ran, by (batch, size) and program: what, at_least, aim, reached."""
    rows = []
    for what, least, aim, precision, shape, (model, runtime), ours in TARGETS:
        times, (batch, size) = found.get(shape, {}), shape
        slow, fast = (times.get(str(p)) for p in (Program(model, runtime, precision), Program(ours, OURS, precision)))
        if slow and fast:
            text = f"batch {batch}, {size} px, {precision}: {what} over {model} in {runtime}"
            ratio = slow["median_ms"] / fast["median_ms"]
            rows.append({"what": text, "at_least": least, "aim": aim, "reached": ratio})
    return rows


class Worker:
    """A runtime at one precision, in a process of its own."""

    def __init__(self, runtime: str, precision: str, setting: Setting):
        self.runtime, self.precision, self.setting = runtime, precision, setting
        self._start()

    def _start(self) -> None:
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed in close)
        root = str(Path(__file__).parent.parent)
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        what = json.dumps([self.runtime, self.precision, asdict(self.setting)])
        env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(self.setting.threads)}
        pipe = subprocess.PIPE
        command = [sys.executable, "-m", "deploy.rivals", what]
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self.said, text=True, env=env)

    def ask(self, model: str, batch: int, size: int, seconds: float) -> list[float]:
        """Times in ms. Raises FarError where the program fails; a new process, with nothing built, then stands by."""
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps([model, size, batch, seconds]), file=self.process.stdin, flush=True)
        if line := self.process.stdout.readline():
            return json.loads(line)
        complaint = self._complaint()
        self.close()
        self._start()
        raise FarError(complaint)

    def _complaint(self) -> str:
        """Of a process that ends: its last line, or how it ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=10)
        self.said.seek(0)
        silent = f"it said nothing, its exit code is {self.process.poll()}"
        return (self.said.read().strip().splitlines() or [silent])[-1]

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.said.close()


class Rivals:
    """Programs, each with the worker that runs it; to be closed."""

    def __init__(self, programs: list[Program], setting: Setting):
        kinds = dict.fromkeys((program.runtime, program.precision) for program in programs)
        self.workers = {kind: Worker(*kind, setting) for kind in kinds}
        self.programs = programs
        self.failed: dict[Program, str] = {}  # of the last comparison: what it said

    def compare(self, programs: list[Program], batch: int, size: int, seconds: float) -> dict[str, dict]:
        """Median and quartiles of each program at one shape, in ROUNDS rounds of turns; without those that fail."""
        times: dict[Program, list[float]] = {program: [] for program in programs}
        self.failed = {}

        def ask(program: Program, seconds: float) -> None:
            if program not in self.failed:
                try:
                    worker = self.workers[program.runtime, program.precision]
                    times[program] += worker.ask(program.model, batch, size, seconds)
                except FarError as error:
                    self.failed[program] = str(error)

        def prepare(kind: tuple[str, str]) -> None:
            for program in programs:
                if (program.runtime, program.precision) == kind:
                    ask(program, 0)

        # All at once: what is built and warmed up now is not timed.
        with ThreadPoolExecutor(max(1, len(self.workers))) as pool:
            list(pool.map(prepare, self.workers))
        for found in times.values():
            found.clear()
        for _ in range(ROUNDS):
            for program in programs:
                time.sleep(PAUSE_S)
                ask(program, seconds / ROUNDS)
        return {str(program): summary(found) for program, found in times.items() if program not in self.failed}

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()


if __name__ == "__main__":
    *kind, shared = json.loads(sys.argv[1])
    for _ in answer(*kind, Setting(**shared)):
        pass
