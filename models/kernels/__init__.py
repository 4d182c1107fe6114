"""How the LSTMs of one layer are computed: one interface, several ways.

A kernel is a function `(x, cells) -> hidden`:

    x       (B, N, H, d)   input chunks of the heads
    cells   2 H `Cell`s in the order (head 0 forward, head 0 backward, head 1 forward, ...)
    hidden  (B, N, sum u)  hidden states, columns in the cells' order; backward ones at their own token's place

Zero initial state, gates in torch's order i, f, g, o; unit counts may differ from cell to cell.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from utils.errors import FarError


class Cell(NamedTuple):
    """Weights of one head in one direction, shaped as in `torch.nn.LSTM`."""

    weight_ih: Tensor  # (4 u, d)
    weight_hh: Tensor  # (4 u, u)
    bias_ih: Tensor  # (4 u,)
    bias_hh: Tensor  # (4 u,)


Kernel = Callable[[Tensor, Sequence[Cell]], Tensor]

from models.kernels import cpu, gpu  # noqa: E402  (the kernels need Cell)
from models.kernels.reference import reference  # noqa: E402
from models.kernels.stock import stock  # noqa: E402

KERNELS: dict[str, Kernel] = {"reference": reference, "torch": stock, "cpu": cpu.fused, "triton": gpu.fused}
BACKENDS = ("auto", *KERNELS)


def check(backend: str, device: torch.device) -> None:
    """Raises FarError where the named `--lstm-backend` cannot run on this device at all: told before a run begins."""
    if backend != "auto":
        choose(backend, torch.empty(0, device=device), 1)


def choose(backend: str, x: Tensor, units: int) -> str:
    """The name of the kernel for a `--lstm-backend`, an input and its largest number of hidden units a cell.

    `auto` is the C++ kernel for float32 on a CPU, in training too, else torch: Triton's is checked but not yet
    timed on a GPU. Raises FarError where a kernel is asked for what it cannot do.
    """
    on_cpu = x.device.type == "cpu" and x.dtype == torch.float32
    if backend == "cpu" and not on_cpu:
        raise FarError("--lstm-backend cpu: computes float32 on a CPU; use auto or torch")
    if backend == "cpu" and not cpu.available():
        raise FarError("--lstm-backend cpu: cannot be built here (no C++ compiler?); use auto or torch")
    if backend == "triton" and not gpu.fits(x, units):
        raise FarError(
            f"--lstm-backend triton: needs CUDA, Triton, float32 and at most {gpu.MOST} units a head; use auto or torch"
        )
    if backend == "auto":
        return "cpu" if on_cpu and cpu.available() else "torch"
    return backend


def compute(backend: str, x: Tensor, cells: Sequence[Cell]) -> Tensor:
    """Hidden states (B, N, sum u) by the kernel that a `--lstm-backend` chooses.

    In the weights' own precision whatever autocast says: the state sums over N tokens.
    """
    with torch.autocast(x.device.type, enabled=False):
        x = x.to(cells[0].weight_hh.dtype)
        return KERNELS[choose(backend, x, max(cell.weight_hh.shape[1] for cell in cells))](x, cells)
