"""What stock torch can do, with gradients: its own LSTM or GRU (CUDA: cuDNN, CPU: oneDNN), by head or all at once.

A scan written in Python over all heads and directions at once, with a written backward pass, measured three times
slower on two cores at 65 and at 197 tokens, and was dropped.
"""

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


def dense(kind: CellKind, x: Tensor, cells: Sequence[Cell]) -> Tensor:
    """See `models.kernels`. All heads as one of torch's layers, their weights the blocks on its diagonal.

    H times the arithmetic in one call instead of H, which pays where calls cost more than products: on a GPU. The zeros
    between blocks are made anew at each call and have no gradient. A NaN of one head reaches the others through them.
    """
    batch, _, heads, _ = x.shape
    units = [cell.units for cell in cells]
    u = max(units)
    wide = [padded_cell(cell, u) for cell in cells]
    weights = [_diagonal([cell[k] for cell in wide[r::2]], u) for r in (0, 1) for k in range(len(Cell._fields))]
    y = kind.stock(x.flatten(2), x.new_zeros(2, batch, heads * u), weights)
    return unpad(y.unflatten(2, (2, heads, u)).transpose(2, 3).flatten(2, 3), units)


def _diagonal(blocks: Sequence[Tensor], u: int) -> Tensor:
    """H weights (G u, m) as one (G H u, H m), gates outermost; biases (G u,) as (G H u,)."""
    stacked = torch.stack([block.unflatten(0, (-1, u)) for block in blocks], dim=1)  # (G, H, u, m) or (G, H, u)
    if stacked.dim() > 3:
        stacked = torch.diag_embed(stacked.movedim(1, -1), dim1=1, dim2=3).flatten(3)  # (G, H, u, H m)
    return stacked.flatten(0, 2)
