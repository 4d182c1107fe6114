"""What stock torch can do, with gradients: its own LSTM or GRU (CUDA: cuDNN, CPU: oneDNN), head by head."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels.cells import Cell, CellKind


def padded(tensor: Tensor, u: int, width: int, columns: bool) -> Tensor:
    """(G u, m) -> (G width, m'), gate by gate; a padded unit has zero weights and so stays zero."""
    if u == width:
        return tensor
    m = tensor.shape[1]
    return F.pad(tensor.unflatten(0, (-1, u)), (0, width - m if columns else 0, 0, width - u)).flatten(0, 1)


def padded_cell(cell: Cell, width: int) -> Cell:
    """The cell with units of zero weights up to `width`."""
    u = cell.units
    biases = (padded(bias[:, None], u, width, False).flatten() for bias in (cell.bias_ih, cell.bias_hh))
    return Cell(padded(cell.weight_ih, u, width, False), padded(cell.weight_hh, u, width, True), *biases)


def unpad(hidden: Tensor, units: Sequence[int]) -> Tensor:
    """(B, N, K, width) -> (B, N, sum u)."""
    if min(units) == hidden.shape[-1]:
        return hidden.flatten(2)
    return torch.cat([hidden[:, :, k, :u] for k, u in enumerate(units)], dim=2)


def stock(kind: CellKind, x: Tensor, cells: Sequence[Cell]) -> Tensor:
    """See `models.kernels`. One of torch's bidirectional layers a head; a ragged one is padded to its wider side."""
    outputs = []
    for h in range(x.shape[2]):
        pair = cells[2 * h : 2 * h + 2]
        units = [cell.units for cell in pair]
        weights = [w for cell in pair for w in padded_cell(cell, max(units))]
        tokens = x[:, :, h].contiguous()
        y = kind.stock(tokens, tokens.new_zeros(2, x.shape[0], max(units)), weights)
        outputs.append(unpad(y.unflatten(2, (2, -1)), units))
    return torch.cat(outputs, dim=2)
