"""The best that stock torch can do, with gradients: its own LSTM, head by head (cuDNN on CUDA, oneDNN on a CPU).

A scan written in Python over all heads and directions at once, with a written backward pass, measured three times
slower on two cores at 65 and at 197 tokens, and was dropped.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def padded(tensor: Tensor, u: int, width: int, columns: bool) -> Tensor:
    """(4 u, m) -> (4 width, m'), gate by gate; a padded unit has zero weights and so stays zero."""
    if u == width:
        return tensor
    m = tensor.shape[1]
    return F.pad(tensor.view(4, u, m), (0, width - m if columns else 0, 0, width - u)).flatten(0, 1)


def unpad(hidden: Tensor, units: Sequence[int]) -> Tensor:
    """(B, N, K, width) -> (B, N, sum u)."""
    if min(units) == hidden.shape[-1]:
        return hidden.flatten(2)
    return torch.cat([hidden[:, :, k, :u] for k, u in enumerate(units)], dim=2)


def stock(x: Tensor, cells: Sequence) -> Tensor:
    """See `models.kernels`. One bidirectional torch LSTM a head (cuDNN on CUDA), ragged ones padded."""
    units = [cell.weight_hh.shape[1] for cell in cells]
    outputs = []
    for h in range(x.shape[2]):
        pair = units[2 * h : 2 * h + 2]
        width = max(pair)
        weights = []
        for cell, u in zip(cells[2 * h : 2 * h + 2], pair, strict=True):
            weights += [
                padded(cell.weight_ih, u, width, False),
                padded(cell.weight_hh, u, width, True),
                padded(cell.bias_ih[:, None], u, width, False).flatten(),
                padded(cell.bias_hh[:, None], u, width, False).flatten(),
            ]
        tokens = x[:, :, h].contiguous()
        zero = tokens.new_zeros(2, x.shape[0], width)
        y = torch._VF.lstm(tokens, (zero, zero), weights, True, 1, 0.0, torch.is_grad_enabled(), True, True)[0]
        outputs.append(unpad(y.unflatten(2, (2, width)), pair))
    return torch.cat(outputs, dim=2)
