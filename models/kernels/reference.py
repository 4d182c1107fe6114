"""The oracle: the cells' equations as a plain loop, any dtype, differentiable, slow."""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.kernels.cells import AnyCell, Cell, CellKind


def reference(kind: CellKind, x: Tensor, cells: Sequence[AnyCell]) -> Tensor:
    """See `models.kernels`. One token at a time."""
    outputs = []
    for k, cell in enumerate(cells):
        tokens = x[:, :, k // 2]  # (B, N, d)
        states = [x.new_zeros(x.shape[0], cell.units)] * kind.states
        hidden: list[Tensor | None] = [None] * x.shape[1]
        order = range(x.shape[1]) if k % 2 == 0 else reversed(range(x.shape[1]))
        for t in order:
            inputs = tokens[:, t] @ cell.weight_ih.T + cell.bias_ih
            recurrent = states[0] @ cell.weight_hh.T + cell.bias_hh if kind.cell is Cell else x.new_zeros(())
            states = kind.step(inputs, recurrent, states)
            hidden[t] = states[0]
        outputs.append(torch.stack(hidden, dim=1))
    return torch.cat(outputs, dim=2)
