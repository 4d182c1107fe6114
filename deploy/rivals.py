"""Whole models in the runtimes that people deploy them with, each runtime in a process of its own, timed in turns.

Thread pools that spin slow each other down, so one program runs for a while, all rest, and the next one runs.
"""

import functools
import importlib.util
import os
from collections.abc import Callable, Collection
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import filelock
import numpy as np
import torch
from torch import nn

from deploy.fuse import fuse
from deploy.packed import PRECISIONS
from deploy.timing import PAUSE_S, Times, in_turns, measure
from models import kernels
from models.replace import FarConfig, build, count_parameters, pruned_to
from utils.errors import first_line

BASE, DIM, HEADS = "DeiT-Tiny", 192, 3
CALIBRATION = 32  # random images: they set scales of models whose answers nobody reads
OPENVINO, OURS = "OpenVINO", "FAR engine"
ONNX_OPSET = 18
Call = Callable[[torch.Tensor], torch.Tensor]  # images to logits


@dataclass(frozen=True)
class Variant:
    """A model of random weights. keep: share of the cells' units, None is attention; mlp: share of the MLPs' units."""

    keep: float | None = None
    mlp: float = 1.0
    rep_by: str = "multi-lstm"
    base: str = BASE

    def build(self, size: int) -> nn.Module:
        torch.manual_seed(0)
        config = FarConfig(self.base, 1000, size, self.rep_by, tuple(range(12)) if self.keep else ())
        return build(pruned_to(config, self.keep or 1, self.mlp)).eval().requires_grad_(False)


VARIANTS = {
    BASE: Variant(),
    f"{BASE}, MLP 0.5": Variant(mlp=0.5),
    "FAR": Variant(1.0),
    "FAR 0.5": Variant(0.5),
    "FAR 0.25": Variant(0.25),
    "FAR 0.25, MLP 0.5": Variant(0.25, 0.5),
    "FAR minGRU": Variant(1.0, rep_by="mingru"),
    "FAR minGRU 0.25, MLP 0.5": Variant(0.25, 0.5, "mingru"),
    **{
        f"{name}{base[4:]}{suffix}": Variant(keep, mlp, base=base)
        for base in ("DeiT-Small", "DeiT-Base")
        for name, suffix, keep, mlp in (
            ("DeiT", "", None, 1.0),
            ("FAR", "", 1.0, 1.0),
            ("FAR", " 0.25", 0.25, 1.0),
            ("FAR", " 0.25, MLP 0.5", 0.25, 0.5),
        )
    },
}


def variants(larger: bool) -> dict[str, Variant]:
    """By name; not `larger`: of DeiT-Tiny alone."""
    return {name: variant for name, variant in VARIANTS.items() if larger or variant.base == BASE}


def compiled(model: nn.Module, precision: str, folder: str) -> Call:
    from torch._inductor import config

    config.freezing = True  # weights become constants, laid out once
    dtype = getattr(torch, precision)
    module = torch.compile(model.to(dtype))
    return lambda images: module(images.to(dtype))


def export_onnx(model: nn.Module, folder: str) -> str:
    """The model as an ONNX file in a folder, batch dynamic; the first process that needs it makes it."""
    side = model.patch_embed.img_size[0]
    file = Path(folder) / f"{count_parameters(model)}-{side}.onnx"
    with filelock.FileLock(f"{file}.lock"):
        if not file.exists():
            images, batch = torch.randn(2, 3, side, side), {0: torch.export.Dim("batch")}
            shapes = {"dynamic_shapes": (batch,), "opset_version": ONNX_OPSET}
            torch.onnx.export(model, (images,), dynamo=True, verbose=False, **shapes).save(file)
    return str(file)


def open_onnx_runtime(model: str | Path | bytes) -> Call:
    """An ONNX file, or its content, in ONNX Runtime on torch's number of threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


def open_openvino(file: str | Path, precision: str = "float32") -> Call:
    """An ONNX or OpenVINO file in OpenVINO, likewise."""
    import openvino as ov

    hint = {"float32": "f32", "bfloat16": "bf16", "int8": "f32"}[precision]  # int8: of what is not quantized
    options = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": torch.get_num_threads(), "NUM_STREAMS": 1}
    network = ov.Core().compile_model(file, "CPU", {**options, "PERFORMANCE_HINT": "LATENCY"})
    request = network.create_infer_request()
    return lambda images: torch.from_numpy(request.infer([images.numpy()], share_inputs=True)[0])


def calibration(model: nn.Module) -> list[np.ndarray]:
    side = model.patch_embed.img_size[0]
    return [torch.randn(1, 3, side, side).numpy() for _ in range(CALIBRATION)]


def onnx_runtime(model: nn.Module, precision: str, folder: str) -> Call:
    """int8: by its quantizers, dynamic, or static: of products, by calibration, QDQ."""
    file = export_onnx(model, folder)
    with filelock.FileLock(f"{file}.lock"):  # the quantizers write files of one name beside it
        if precision == "int8":
            from onnxruntime.quantization import quantize_dynamic

            quantize_dynamic(file, file := f"{file}.int8")
        elif precision == "static int8":
            from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

            class Images(CalibrationDataReader):
                feeds = iter([{"x": image} for image in calibration(model)])

                def get_next(self) -> dict | None:
                    return next(self.feeds, None)

            settings = {"quant_format": QuantFormat.QDQ, "op_types_to_quantize": ["MatMul", "Gemm", "Conv"]}
            quantize_static(file, file := f"{file}.static", Images(), **settings)
    return open_onnx_runtime(file)


def openvino(model: nn.Module, precision: str, folder: str) -> Call:
    """int8: by NNCF, static, as it is advised for transformers."""
    file = export_onnx(model, folder)
    if precision == "int8":
        import nncf
        from openvino import Core, save_model

        settings = {"preset": nncf.QuantizationPreset.MIXED, "model_type": nncf.ModelType.TRANSFORMER}
        data = nncf.Dataset(calibration(model))
        network = nncf.quantize(Core().read_model(file), data, subset_size=CALIBRATION, **settings)
        save_model(network, file := f"{file}.xml")
    return open_openvino(file, precision)


class Runtime(NamedTuple):
    """A program that runs models.

    make: (model, precision, a folder for files that its programs share) to a function of images. packages: what must be
    installed, by precision.
    """

    make: Callable[[nn.Module, str, str], Call]
    packages: dict[str, str]


RUNTIMES = {
    "timm eager": Runtime(lambda model, *_: model, {"float32": "torch"}),
    "torch.compile": Runtime(compiled, {"bfloat16": "torch"}),
    "ONNX Runtime": Runtime(onnx_runtime, dict.fromkeys(("float32", "int8", "static int8"), "onnxruntime")),
    OPENVINO: Runtime(openvino, {"float32": "openvino", "bfloat16": "openvino", "int8": "nncf"}),
    OURS: Runtime(lambda model, precision, _: fuse(model, precision), dict.fromkeys(PRECISIONS, "torch")),
}


class Program(NamedTuple):
    """A model in a runtime."""

    model: str
    runtime: str
    precision: str

    def __str__(self) -> str:
        return f"{self.model} / {self.runtime} {self.precision}"

    def timed_at(self, batch: int, size: int) -> bool:
        """True if it is timed at this shape: larger models run at one, larger images in the fastest runtimes alone."""
        if VARIANTS[self.model].base != BASE:
            return (batch, size) == (1, 224)
        return size == 224 or self.runtime in (OPENVINO, OURS) and self.model in (BASE, "FAR", "FAR 0.25")

    def lacks(self) -> str:
        """Why it cannot run here; empty if it can."""
        package = RUNTIMES[self.runtime].packages[self.precision]
        if not importlib.util.find_spec(package):
            return f"{package} is not installed"
        half = self.precision == "bfloat16" and self.runtime == OURS
        return "this CPU has no AVX512_BF16" if half and not kernels.cpu.has_bfloat16() else ""


def programs(runtimes: Collection[str], larger: bool = True) -> list[Program]:
    """The teacher in every runtime; others with attention in the fastest and in ours; FAR in ours."""
    chosen = []
    for model, variant in variants(larger).items():
        wanted = RUNTIMES if model == BASE else (OURS,) if variant.keep else (OPENVINO, OURS)
        chosen += [(model, runtime) for runtime in wanted if runtime in runtimes]
    return [Program(model, runtime, p) for model, runtime in chosen for p in RUNTIMES[runtime].packages]


def start_process(threads: int) -> None:
    """Begins a runtime's process: what libraries print there is dropped; an error comes back as an exception."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1), os.dup2(nowhere, 2)
    torch.set_num_threads(threads)


def new_process(threads: int) -> ProcessPoolExecutor:
    """One process, whose torch has so many threads."""
    return ProcessPoolExecutor(1, get_context("spawn"), initializer=start_process, initargs=(threads,))


@functools.cache
def _load(program: Program, size: int, folder: str) -> Call:
    return RUNTIMES[program.runtime].make(VARIANTS[program.model].build(size), program.precision, folder)


@torch.no_grad()
def _run(program: Program, batch: int, size: int, folder: str, seconds: float) -> list[float]:
    """In a runtime's process: milliseconds of repeated calls; with 0 seconds the model is built and called once."""
    images = torch.randn(batch, 3, size, size)
    call = functools.partial(_load(program, size, folder), images)
    call()
    return measure(call, seconds) if seconds else []


class Processes:
    """One process for each runtime and precision among the programs; to be closed.

    folder: where a model's ONNX file is kept for the next program that needs it.
    """

    def __init__(self, programs: list[Program], threads: int, folder: str):
        self.threads, self.folder = threads, folder
        self.pools = {program[1:]: new_process(threads) for program in programs}
        self.failed: dict[Program, str] = {}  # in the last comparison, and why

    def _times(self, program: Program, batch: int, size: int, seconds: float) -> list[float]:
        """Milliseconds, none once the program failed. A process that ended is replaced."""
        if program in self.failed:
            return []
        try:
            return self.pools[program[1:]].submit(_run, program, batch, size, self.folder, seconds).result()
        except BrokenProcessPool:
            self.failed[program] = "its process ended"
            self.pools[program[1:]] = new_process(self.threads)
        except Exception as error:  # noqa: BLE001  (each runtime raises its own types)
            self.failed[program] = first_line(error)
        return []

    def compare(self, programs: list[Program], batch: int, size: int, seconds: float) -> Times:
        """Times by name of the programs that run at one shape, `seconds` for each and round."""
        self.failed = {}

        def build(kind: tuple[str, str]) -> None:
            for program in programs:
                if program[1:] == kind:
                    self._times(program, batch, size, 0.0)

        with ThreadPoolExecutor(max(1, len(self.pools))) as threads:  # all processes at once
            list(threads.map(build, self.pools))
        measures = {str(p): functools.partial(self._times, p, batch, size) for p in programs if p not in self.failed}
        return in_turns(measures, seconds, pause=PAUSE_S)

    def close(self) -> None:
        for pool in self.pools.values():
            pool.shutdown(cancel_futures=True)
