"""The fused CPU kernel: lstm_cpu.cpp, built on first use and cached. Float32, forward and backward."""

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
    """Weights of all cells in the kernel's order: per cell W_ih (d, 4 U), W_hh (u, 4 U) and bias (4 U), U = u rounded up.

    W_hh in bfloat16 is stored as pairs of rows in 32-bit integers, (u / 2, 4 U).
    """

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


def has_bfloat16() -> bool:
    """Whether recurrent weights may be bfloat16 here (AVX512_BF16)."""
    return available() and load().has_bfloat16()


def _units_first(w: Tensor, v: int) -> Tensor:
    """(4 u, m) to the kernel's order of gates, units padded with zeros: (blocks, 4, V, m)."""
    u = w.shape[0] // 4
    padded = F.pad(w.detach().float().view(4, u, -1), (0, 0, 0, -u % v))  # (4, U, m)
    return padded.unflatten(1, (-1, v)).transpose(0, 1)


def _unpacked(packed: Tensor, units: int, v: int) -> Tensor:
    """(4 U, ...) in the kernel's order back to (4 u, ...)."""
    return packed.unflatten(0, (-1, 4, v)).transpose(0, 1).flatten(1, 2)[:, :units].flatten(0, 1)


def _pairs(w: Tensor) -> Tensor:
    """(u, ...) float32 to (u / 2, ...): two neighbouring rows as bfloat16, the even one in the low half."""
    bits = F.pad(w.flatten(1), (0, 0, 0, w.shape[0] % 2)).bfloat16().view(torch.int16).int() & 0xFFFF
    return (bits[0::2] | (bits[1::2] << 16)).contiguous()


def pack(cells: Sequence, operators=None, recurrent: torch.dtype = torch.float32) -> Packed:
    """Rearranges the weights for the kernel: [k][unit block][gate][V], units padded with zeros.

    recurrent: float32, or bfloat16 where `has_bfloat16()`: W_hh and the hidden state it meets are then rounded.
    """
    v = (operators or load()).vector_width()
    tensors = []
    for cell in cells:
        bias = (cell.bias_ih.detach().float() + cell.bias_hh.detach().float())[:, None]
        tensors += [_units_first(w, v).permute(3, 0, 1, 2).contiguous() for w in (cell.weight_ih, cell.weight_hh, bias)]
        if recurrent == torch.bfloat16:
            tensors[-2] = _pairs(tensors[-2])
    return Packed(tensors, [cell.weight_hh.shape[1] for cell in cells])


def run(x: Tensor, packed: Packed, operators=None) -> Tensor:
    """x (B, N, H, d) float32 to hidden (B, N, sum u), without gradients."""
    x = x if x.stride(3) == 1 else x.contiguous()
    return (operators or load()).forward(x, packed.tensors, packed.units)


class _Train(torch.autograd.Function):
    """The same with gradients for x and all weights: the recurrence runs back in the kernel, the rest is matrix products."""

    @staticmethod
    def forward(ctx, operators, x: Tensor, *weights: Tensor) -> Tensor:
        cells = [weights[i : i + 4] for i in range(0, len(weights), 4)]  # as in Cell: W_ih, W_hh and two biases
        v = operators.vector_width()
        tensors, back = [], []
        for w_ih, w_hh, b_ih, b_hh in cells:
            tensors += [_units_first(w, v).permute(3, 0, 1, 2).contiguous() for w in (w_ih, w_hh, (b_ih + b_hh)[:, None])]
            back.append(F.pad(_units_first(w_hh, v), (0, -w_hh.shape[1] % v)).contiguous())  # (blocks, 4, V, U)
        ctx.operators, ctx.units = operators, [cell[1].shape[1] for cell in cells]
        x = x if x.stride(3) == 1 else x.contiguous()
        hidden, gates, states = operators.train(x, tensors, ctx.units)
        ctx.save_for_backward(x, hidden, *tensors[::3], *back, *gates, *states)
        return hidden

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        x, hidden, *saved = ctx.saved_tensors
        n = len(ctx.units)
        w_ih, back, gates, states = (saved[i * n : (i + 1) * n] for i in range(4))
        gates = [g.clone() for g in gates]  # overwritten; the graph may be walked again
        ctx.operators.backward(grad.contiguous(), gates, states, back, ctx.units)
        v, inputs, weights = ctx.operators.vector_width(), [], []
        for k, h in enumerate(hidden.split(ctx.units, dim=2)):
            d_gates = gates[k].flatten(0, 1)  # (B N, 4 U)
            before = torch.zeros_like(h)  # the hidden state each token met
            if k % 2 == 0:
                before[:, 1:] = h[:, :-1]
            else:
                before[:, :-1] = h[:, 1:]
            inputs.append(d_gates @ w_ih[k].flatten(1).T)
            bias = _unpacked(d_gates.sum(0), ctx.units[k], v)
            weights += [_unpacked(d_gates.T @ x[:, :, k // 2].flatten(0, 1), ctx.units[k], v),
                        _unpacked(d_gates.T @ before.flatten(0, 1), ctx.units[k], v), bias, bias]  # fmt: skip
        d_x = torch.stack([a + b for a, b in zip(inputs[::2], inputs[1::2], strict=True)], dim=1).view(x.shape)
        return None, d_x, *weights


def fused(x: Tensor, cells: Sequence, operators=None) -> Tensor:
    """See `models.kernels`."""
    operators = operators or load()
    weights = [w for cell in cells for w in cell]
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights)):
        return _Train.apply(operators, x, *weights)
    return run(x, pack(cells, operators), operators)
