"""How the recurrent cells of one layer are computed: one interface, several ways.

    x       (B, N, H, d)   input chunks of the heads
    cells   2 H `Cell`s, or of another kind, in the order (head 0 forward, head 0 backward, head 1 forward, ...)
    hidden  (B, N, sum u)  hidden states, columns in the cells' order; backward ones at their own token's place

Zero initial state, gates in torch's order; unit counts may differ from cell to cell. A new kernel is one entry of
KERNELS (and its name in `utils.names`).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from models.kernels import cpu, gpu
from models.kernels.cells import LSTM, AnyCell, Cell, CellKind, Task, by_head
from models.kernels.reference import reference
from utils.errors import FarError


class Kernel(NamedTuple):
    """One way to compute cells.

    run: (kind, x, cells) to hidden, differentiable once.
    refusal: (task) to why it cannot do that, in words; empty where it can.
    """

    run: Callable[[CellKind, Tensor, Sequence[AnyCell]], Tensor]
    refusal: Callable[[Task], str]


KERNELS: dict[str, Kernel] = {
    "reference": Kernel(reference, lambda task: ""),
    "torch": Kernel(lambda kind, x, cells: kind.stock(x, cells), lambda task: ""),
    "cpu": Kernel(cpu.fused, cpu.refusal),
    "triton": Kernel(gpu.fused, gpu.refusal),
}
AUTO = ("cpu", "torch")  # auto: the first that can; a run on CUDA times them instead (models.choosing)
BACKENDS = ("auto", *KERNELS)


def choose(backend: str, task: Task) -> str:
    """The name of the kernel that a `--lstm-backend` means for a task. Raises FarError where none can do it."""
    for name in AUTO if backend == "auto" else (backend,):
        if not (reason := KERNELS[name].refusal(task)):
            return name
    raise FarError(f"--lstm-backend {backend}: {reason}; use auto or torch")


def check(backend: str, device: torch.device, kind: CellKind = LSTM) -> None:
    """Raises FarError where a `--lstm-backend` cannot run on this device at all: told before a run begins.

    `auto` always finds one. It is not asked: the C++ kernel would be built for runs that may never need it.
    """
    if backend != "auto":
        choose(backend, Task(kind, device, torch.float32, 1))


def compute(backend: str, kind: CellKind, x: Tensor, cells: Sequence[AnyCell]) -> Tensor:
    """Hidden states (B, N, sum u) by the kernel that a `--lstm-backend` names.

    In the weights' own precision whatever autocast says: the state sums over N tokens.
    """
    with torch.autocast(x.device.type, enabled=False):
        x = x.to(cells[0].weight_ih.dtype)
        task = Task(kind, x.device, x.dtype, max(cell.units for cell in cells))
        return KERNELS[choose(backend, task)].run(kind, x, cells)


__all__ = ["BACKENDS", "KERNELS", "LSTM", "Cell", "CellKind", "Kernel", "Task", "by_head", "check", "choose", "compute"]
