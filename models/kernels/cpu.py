"""The fused CPU kernel: lstm_cpu.cpp, built on first use and cached. Inference in float32."""

import contextlib
import functools
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import cpp_extension

SOURCE = Path(__file__).with_name("lstm_cpu.cpp")
TUNED, PORTABLE = ("-march=native",), ()
log = logging.getLogger(__name__)


class Packed(NamedTuple):
    """Weights of all cells in the kernel's order: per cell W_ih (d, 4 U), W_hh (u, 4 U) and bias (4 U), U = u rounded up."""

    tensors: list[Tensor]
    units: list[int]


def cache_folders() -> list[Path]:
    """Where builds are kept: the first of these that can be written."""
    named = os.environ.get("TORCH_EXTENSIONS_DIR")
    home = Path(named) if named else Path.home() / ".cache" / "torch_extensions"
    return [home, Path(tempfile.gettempdir()) / f"torch_extensions_{os.getuid()}"]


def _openmp() -> list[str]:
    """Link flags for the very OpenMP library torch runs on: a second one would bring a second pool of spinning threads."""
    own = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    return [str(own[0]), f"-Wl,-rpath,{own[0].parent}"] if own else ["-fopenmp"]


def _build(flags: Sequence[str], name: str, folder: Path) -> Path:
    """Compiles in a folder of its own and moves it into place: processes that build at once do not meet."""
    final = folder / name
    if not (final / f"{name}.so").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder))
        try:
            cpp_extension.load(
                name, [str(SOURCE)], extra_cflags=["-O3", "-fopenmp", f"-DFAR_NAMESPACE={name}", *flags],
                extra_ldflags=_openmp(), build_directory=str(work), is_python_module=False, is_standalone=False, verbose=False,
            )  # fmt: skip
            with contextlib.suppress(OSError):  # another process was faster
                work.rename(final)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return final / f"{name}.so"


@functools.cache
def load(flags: tuple[str, ...] = TUNED):
    """The compiled operators, or None where they cannot be built (said in one log line)."""
    key = hashlib.sha256("".join([SOURCE.read_text(), torch.__version__, *flags, _machine()]).encode()).hexdigest()[:12]
    name, errors = f"far_lstm_{key}", []
    for folder in cache_folders():
        try:
            library = _build(flags, name, folder)
            if not hasattr(torch.ops, name) or not hasattr(getattr(torch.ops, name), "forward"):
                torch.ops.load_library(str(library))
            return getattr(torch.ops, name)
        except (OSError, RuntimeError, ImportError) as error:
            errors.append(str(error).strip().splitlines()[0])
    log.warning("the CPU kernel could not be built, torch's LSTM serves instead: %s", errors[-1])
    return None


def _machine() -> str:
    """What -march=native depends on, so that a cache shared by several machines holds a build for each."""
    return torch.backends.cpu.get_cpu_capability() + os.uname().machine


def available() -> bool:
    return load() is not None


def pack(cells: Sequence, operators=None) -> Packed:
    """Rearranges the weights for the kernel: [k][unit block][gate][V], units padded with zeros."""
    v = (operators or load()).vector_width()

    def gates_last(w: Tensor) -> Tensor:  # (4 u, m) -> (m, blocks, 4, V)
        u = w.shape[0] // 4
        padded = F.pad(w.detach().float().view(4, u, -1), (0, 0, 0, -u % v))  # (4, U, m)
        return padded.view(4, -1, v, padded.shape[2]).permute(3, 1, 0, 2).contiguous()

    tensors = []
    for cell in cells:
        bias = (cell.bias_ih.detach().float() + cell.bias_hh.detach().float())[:, None]
        tensors += [gates_last(cell.weight_ih), gates_last(cell.weight_hh), gates_last(bias)]
    return Packed(tensors, [cell.weight_hh.shape[1] for cell in cells])


def run(x: Tensor, packed: Packed, operators=None) -> Tensor:
    """x (B, N, H, d) float32 to hidden (B, N, sum u)."""
    x = x if x.stride(3) == 1 else x.contiguous()
    return (operators or load()).forward(x, packed.tensors, packed.units)


def fused(x: Tensor, cells: Sequence) -> Tensor:
    """See `models.kernels`."""
    return run(x, pack(cells))
