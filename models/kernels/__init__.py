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

from models.kernels import cpu  # noqa: E402  (the kernels need Cell)
from models.kernels.reference import reference  # noqa: E402
from models.kernels.stock import stock  # noqa: E402

KERNELS: dict[str, Kernel] = {"reference": reference, "torch": stock, "cpu": cpu.fused}
BACKENDS = ("auto", *KERNELS)


def choose(backend: str, x: Tensor, training: bool) -> str:
    """The name of the kernel for a `--lstm-backend` and an input; `auto` is the fastest that runs here.

    Raises FarError where `cpu` is asked for what it cannot do.
    """
    fits = x.device.type == "cpu" and x.dtype == torch.float32 and not training
    if backend == "cpu" and not fits:
        raise FarError("--lstm-backend cpu: computes float32 on a CPU, without gradients; train with auto or torch")
    if backend == "cpu" and not cpu.available():
        raise FarError("--lstm-backend cpu: cannot be built here (no C++ compiler?); use auto or torch")
    if backend == "auto":
        return "cpu" if fits and cpu.available() else "torch"
    return backend
