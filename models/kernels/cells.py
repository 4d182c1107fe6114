"""What a kernel computes: the weights of recurrent cells, and the equations of one kind of cell."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Cell(NamedTuple):
    """Weights of one head in one direction, shaped as in `torch.nn.LSTM` and `torch.nn.GRU`, with G gates."""

    weight_ih: Tensor  # (G u, d)
    weight_hh: Tensor  # (G u, u)
    bias_ih: Tensor  # (G u,)
    bias_hh: Tensor  # (G u,)

    @property
    def units(self) -> int:
        return self.weight_hh.shape[1]


@dataclass(frozen=True)
class CellKind:
    """The equations of a recurrent cell whose hidden unit stays zero where its weights are.

    gates: G, rows of the weights a unit; all are of torch's order.
    states: tensors (B, u) that pass from token to token, the hidden state first.
    step: (from the input (B, G u), from the hidden state (B, G u), states) to the next states, differentiable.
    stock: torch's own, bidirectional, batch first: (tokens (B, N, d), zero state (2, B, u), 8 weights) to (B, N, 2 u).
    """

    name: str
    gates: int
    states: int
    step: Callable[[Tensor, Tensor, Sequence[Tensor]], Sequence[Tensor]]
    stock: Callable[[Tensor, Tensor, list[Tensor]], Tensor]


def _lstm_step(inputs: Tensor, recurrent: Tensor, states: Sequence[Tensor]) -> Sequence[Tensor]:
    """Hochreiter & Schmidhuber's LSTM with forget gate; gates in the order i, f, g, o."""
    i, f, g, o = (inputs + recurrent).chunk(4, dim=1)
    c = f.sigmoid() * states[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _lstm_stock(tokens: Tensor, zero: Tensor, weights: list[Tensor]) -> Tensor:
    return torch._VF.lstm(tokens, (zero, zero), weights, True, 1, 0.0, torch.is_grad_enabled(), True, True)[0]


LSTM = CellKind("lstm", 4, 2, _lstm_step, _lstm_stock)


class Task(NamedTuple):
    """What a kernel is asked for; `units`: the most hidden units a cell."""

    kind: CellKind
    device: torch.device
    dtype: torch.dtype
    units: int
