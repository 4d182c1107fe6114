"""The C++ kernels for a CPU: cpp/, compiled on first use and cached."""

import contextlib
import functools
import getpass
import hashlib
import logging
import os
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from models.kernels.cells import LSTM, Cell, CellKind, Task
from utils.errors import first_line

SOURCES = Path(__file__).with_name("cpp")
TORCH = Path(torch.__file__).parent
TUNED, PORTABLE = ("-march=native",), ()
log = logging.getLogger(__name__)


def cache_folders() -> list[Path]:
    """Where builds are kept: the first of these that can be written."""
    folders = []
    with contextlib.suppress(RuntimeError):  # a user without a home
        folders.append(Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"))
    user = getattr(os, "getuid", getpass.getuser)()  # Windows knows no numbers
    return [*folders, Path(tempfile.gettempdir()) / f"torch_extensions_{user}"]


def _call(command: Sequence[str], text: str = "") -> str:
    """Runs the compiler, `text` being its standard input. Raises OSError with its first line that names an error."""
    environment = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(command, input=text, capture_output=True, errors="replace", env=environment)
    if done.returncode:
        said = done.stderr.splitlines() or [f"{command[0]} ended with {done.returncode}"]
        raise OSError(next((line for line in said if "error" in line.lower()), said[0]))
    return done.stdout


def _new_folder() -> tempfile.TemporaryDirectory:
    """A temporary folder in the first cache folder that can be written."""
    for folder in cache_folders():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return tempfile.TemporaryDirectory(prefix=".far_lstm-", dir=folder, ignore_cleanup_errors=True)
        except OSError as error:
            denied = error
    raise denied


def _build(flags: Sequence[str], openmp: bool, namespace: str) -> Path:
    """The library for these sources, torch, compiler and CPU, out of a cache folder or compiled.

    The compiler's own macros are part of the key: they say what -march=native means here, and which compiler it is.
    The library is compiled in a temporary folder and moved into place whole, so that concurrent builds do not collide.
    """
    cxx = shlex.split(os.environ.get("CXX") or "c++")
    # Symbols are hidden because several builds may be loaded at once.
    linker = [*cxx, "-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", *flags]
    compiler = [*linker, "-fopenmp"] if openmp else linker
    macros = _call([*compiler, "-dM", "-E", "-x", "c++", "-"], "#include <omp.h>" if openmp else "")
    texts = [path.read_text() for path in sorted(SOURCES.iterdir())]
    parts = [*texts, torch.__version__, namespace, *compiler, macros]
    name = f"far_lstm_{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:12]}"
    for folder in cache_folders():
        if os.access(library := folder / name / "lstm.so", os.R_OK):
            return library
    with _new_folder() as work:
        includes = [f"-I{TORCH / 'include'}", f"-I{TORCH / 'include/torch/csrc/api/include'}"]
        abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
        unit = [*compiler, abi, f"-DFAR_NAMESPACE={namespace}", *includes, "-c"]
        objects = {str(source): f"{work}/{source.stem}.o" for source in sorted(SOURCES.glob("*.cpp"))}
        with ThreadPoolExecutor() as pool:
            list(pool.map(_call, [[*unit, source, "-o", made] for source, made in objects.items()]))
        libraries = [f"-L{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
        if openmp:  # torch's own library: a second one would bring a second pool of spinning threads
            torchs = sorted((TORCH / "lib").glob("libgomp*.so*"))
            libraries += [str(torchs[0]), f"-Wl,-rpath,{torchs[0].parent}"] if torchs else ["-fopenmp"]
        built = Path(work, "lstm.so")
        _call([*linker, "-shared", *objects.values(), *libraries, "-o", str(built)])
        with built.open("rb") as file:
            os.fsync(file.fileno())  # a library cut off by a power failure would crash the process that loads it
        library = built.parent.with_name(name) / "lstm.so"
        library.parent.mkdir(exist_ok=True)
        return built.replace(library)


@functools.cache
def load(flags: tuple[str, ...]):
    """The compiled operators, or None where they cannot be built (one log line). TUNED ones are `torch.ops.far`.

    Where the compiler knows no -fopenmp or no -march=native, or builds for another CPU, they are left out.
    """
    namespace = "far" if flags == TUNED else "far_portable"
    for attempt in dict.fromkeys((f, openmp) for f in (flags, PORTABLE) for openmp in (True, False)):
        try:
            torch.ops.load_library(_build(*attempt, namespace))
            operators = getattr(torch.ops, namespace)
            if not hasattr(operators, "forward"):
                raise OSError(f"{' '.join(attempt[0])} builds for another CPU")
            _register(namespace, operators.vector_width())
            return operators
        except (OSError, RuntimeError) as error:
            failure = first_line(error)
    log.warning("the CPU kernel could not be built, torch's own operators serve instead: %s", failure)
    return None


@torch.compiler.assume_constant_result
def available() -> bool:
    """True if `fused` can run here. Builds the operators if need be; torch.compile asks once, outside its graph."""
    return load(TUNED) is not None


def has_bfloat16() -> bool:
    """True if this CPU has products of bfloat16 (AVX512_BF16)."""
    return available() and load(TUNED).has_bfloat16()


def _setup(ctx, inputs, output) -> None:
    (x, weights), (hidden, gates, states) = inputs, output
    ctx.cells = len(gates)
    ctx.set_materialize_grads(False)  # gates and states have no gradients
    ctx.save_for_backward(x, hidden, *weights, *gates, *states)


def _no_second(ctx, *grads):
    raise RuntimeError("the CPU kernel has first derivatives only; the second need --lstm-backend torch or reference")


def _backward(operators):
    """The recurrence runs back in the kernel, the rest is matrix products: those that are asked for."""

    def backward(ctx, grad: Tensor, *_):
        x, hidden, *saved = ctx.saved_tensors
        n = ctx.cells
        weights, gates, states = saved[: 4 * n], saved[4 * n : 5 * n], saved[5 * n :]
        needs_x, needs = ctx.needs_input_grad
        wanted = [needs_x]
        for i in range(0, 4 * n, 4):
            wanted += [needs[i], needs[i + 1], needs[i + 2] or needs[i + 3]]
        gradients = operators.backward(grad, x, weights, hidden, gates, states, wanted)
        by_weight = [gradients[1 + 3 * (i // 4) + min(i % 4, 2)] if needed else None for i, needed in enumerate(needs)]
        return gradients[0] if needs_x else None, by_weight

    return backward


def _register(namespace: str, v: int) -> None:
    """Tells torch.compile and torch.export the operators' shapes, autograd their gradients. v: floats in a vector."""

    def forward(x, weights):
        return x.new_empty(*x.shape[:2], sum(w.shape[1] for w in weights[1::4]))

    def train(x, weights):
        widths = [-(-w.shape[1] // v) * v for w in weights[1::4]]  # units, up to whole vectors
        gates, states = ([x.new_empty(*x.shape[:2], times * u) for u in widths] for times in (4, 1))
        return forward(x, weights), gates, states

    def backward(grad, x, weights, hidden, gates, states, wanted):
        shapes = [x.shape]
        for w_ih, w_hh, bias in zip(weights[::4], weights[1::4], weights[2::4], strict=True):
            shapes += [w_ih.shape, w_hh.shape, bias.shape]
        return [grad.new_empty(shape if want else 0) for shape, want in zip(shapes, wanted, strict=True)]

    def model(images, plan, vectors, products, classes):
        return images.new_empty(images.shape[0], classes)

    for fake in (forward, train, backward, model):
        torch.library.register_fake(f"{namespace}::{fake.__name__}", fake)
    torch.library.register_autograd(
        f"{namespace}::train", _backward(getattr(torch.ops, namespace)), setup_context=_setup
    )
    torch.library.register_autograd(f"{namespace}::backward", _no_second)


def refusal(task: Task) -> str:
    """Why the operators cannot do a task; empty where they can."""
    if task.kind != LSTM:
        return "computes LSTMs alone"
    if task.device.type != "cpu" or task.dtype != torch.float32:
        return "computes float32 on a CPU"
    return "" if available() else "cannot be built here (no C++ compiler?)"


def fused(kind: CellKind, x: Tensor, cells: Sequence[Cell], operators=None) -> Tensor:
    """See `models.kernels`. Ask `refusal` first."""
    operators = operators or torch.ops.far
    weights = [w for cell in cells for w in cell]
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights)):
        return operators.train(x, weights)[0]
    return operators.forward(x, weights)
