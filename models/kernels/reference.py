"""The oracle: the LSTM equations as a plain loop, any dtype, differentiable, slow."""

from collections.abc import Sequence

import torch
from torch import Tensor


def reference(x: Tensor, cells: Sequence) -> Tensor:
    """See `models.kernels`. Hochreiter & Schmidhuber's LSTM with forget gate, one token at a time."""
    outputs = []
    for k, cell in enumerate(cells):
        tokens = x[:, :, k // 2]  # (B, N, d)
        u = cell.weight_hh.shape[1]
        h = c = x.new_zeros(x.shape[0], u)
        hidden: list[Tensor | None] = [None] * x.shape[1]
        order = range(x.shape[1]) if k % 2 == 0 else reversed(range(x.shape[1]))
        for t in order:
            gates = tokens[:, t] @ cell.weight_ih.T + cell.bias_ih + h @ cell.weight_hh.T + cell.bias_hh
            i, f, g, o = gates.split(u, dim=1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            hidden[t] = h
        outputs.append(torch.stack(hidden, dim=1))
    return torch.cat(outputs, dim=2)
