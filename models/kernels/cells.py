"""What a kernel computes: the weights of recurrent cells, the equations of a kind of cell, and torch's own layers."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# cuDNN would have a layer's weights lie together; here each is a parameter of its own.
warnings.filterwarnings("ignore", "RNN module weights are not part of single contiguous chunk")


class Cell(NamedTuple):
    """Weights of one head in one direction, shaped as in `torch.nn.LSTM` and `torch.nn.GRU`, with G gates."""

    weight_ih: Tensor  # (G u, d)
    weight_hh: Tensor  # (G u, u)
    bias_ih: Tensor  # (G u,)
    bias_hh: Tensor  # (G u,)

    @property
    def units(self) -> int:
        return self.weight_hh.shape[1]


class MinGRUCell(NamedTuple):
    """The same of a minGRU, whose two gates, in the order z, n, read the input alone."""

    weight_ih: Tensor  # (2 u, d)
    bias_ih: Tensor  # (2 u,)

    @property
    def units(self) -> int:
        return len(self.bias_ih) // 2


AnyCell = Cell | MinGRUCell


@dataclass(frozen=True)
class CellKind:
    """The equations of a recurrent cell whose hidden unit stays zero where its weights are.

    gates: G, rows of a weight for each unit, in torch's order.
    states: tensors (B, u) that pass from token to token, the hidden state first.
    elementwise: additions and multiplications of a unit in a step, without the biases that can be added before it.
    functions: sigmoids and tanhs of a unit in a step.
    added: gates in which the recurrent product is only added to that of the input.
    step: (from the input (B, G u), from the hidden state (B, G u), states) to the next states, differentiable.
    stock: by torch's own operators, (x, cells) to hidden as in `models.kernels`, differentiable.
    cell: the type of its weights.
    """

    name: str
    gates: int
    states: int
    elementwise: int
    functions: int
    added: int
    step: Callable[[Tensor, Tensor, Sequence[Tensor]], Sequence[Tensor]]
    stock: Callable[[Tensor, Sequence[AnyCell]], Tensor]
    cell: type[AnyCell] = Cell


def padded_cell(cell: Cell, width: int) -> Cell:
    """The cell with units of zero weights, which stay zero, up to `width`."""
    if not (more := width - cell.units):
        return cell
    pads = (0, 0, 0, more), (0, more, 0, more), (0, more), (0, more)  # of (G, u, ...), the last dimension first
    padded = [F.pad(w.unflatten(0, (-1, cell.units)), pad) for w, pad in zip(cell, pads, strict=True)]
    return Cell(*(w.flatten(0, 1) for w in padded))


def unpad(hidden: Tensor, units: Sequence[int]) -> Tensor:
    """(B, N, K, width) -> (B, N, sum u)."""
    if min(units) == hidden.shape[-1]:
        return hidden.flatten(2)
    return torch.cat([hidden[:, :, k, :u] for k, u in enumerate(units)], dim=2)


def by_head(layer: Callable[[Tensor, Tensor, list[Tensor]], Tensor], x: Tensor, cells: Sequence[Cell]) -> Tensor:
    """See `models.kernels`. One of torch's bidirectional layers a head; a ragged one is padded to its wider side.

    layer: torch's own (CUDA: cuDNN, CPU: oneDNN): (tokens (B, N, d), zero state (2, B, u), 8 weights) to (B, N, 2 u).
    """
    outputs = []
    for h in range(x.shape[2]):
        pair = cells[2 * h : 2 * h + 2]
        units = [cell.units for cell in pair]
        weights = [w for cell in pair for w in padded_cell(cell, max(units))]
        tokens = x[:, :, h].contiguous()
        y = layer(tokens, tokens.new_zeros(2, x.shape[0], max(units)), weights)
        outputs.append(unpad(y.unflatten(2, (2, -1)), units))
    return torch.cat(outputs, dim=2)


def _lstm_step(inputs: Tensor, recurrent: Tensor, states: Sequence[Tensor]) -> Sequence[Tensor]:
    """Hochreiter & Schmidhuber's LSTM with forget gate; gates in the order i, f, g, o."""
    i, f, g, o = (inputs + recurrent).chunk(4, dim=1)
    c = f.sigmoid() * states[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _lstm_layer(tokens: Tensor, zero: Tensor, weights: list[Tensor]) -> Tensor:
    return torch._VF.lstm(tokens, (zero, zero), weights, True, 1, 0.0, torch.is_grad_enabled(), True, True)[0]


LSTM = CellKind("lstm", 4, 2, 8, 5, 4, _lstm_step, partial(by_head, _lstm_layer))


class Task(NamedTuple):
    """What a kernel must compute; `units`: hidden units of the largest cell."""

    kind: CellKind
    device: torch.device
    dtype: torch.dtype
    units: int
