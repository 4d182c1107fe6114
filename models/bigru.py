"""The multi-head bidirectional GRU (Cho et al., arXiv 1406.1078): three gates, no cell state, fewer weights."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from models import kernels
from models.birnn import Direction, MultiHeadBiRNN


def _step(inputs: Tensor, recurrent: Tensor, states: Sequence[Tensor]) -> Sequence[Tensor]:
    """torch's GRU, gates in the order r, z, n: the reset gate meets the recurrent product and its bias."""
    (r_x, z_x, n_x), (r_h, z_h, n_h) = inputs.chunk(3, dim=1), recurrent.chunk(3, dim=1)
    z = (z_x + z_h).sigmoid()
    n = (n_x + (r_x + r_h).sigmoid() * n_h).tanh()
    return ((1 - z) * n + z * states[0],)


def _layer(tokens: Tensor, zero: Tensor, weights: list[Tensor]) -> Tensor:
    return torch._VF.gru(tokens, zero, weights, True, 1, 0.0, torch.is_grad_enabled(), True, True)[0]


GRU = kernels.CellKind("gru", 3, 1, 9, 3, 2, _step, partial(kernels.by_head, _layer))


class DirectionGRU(Direction):
    """One head's GRU in one direction."""

    kind = GRU
    memory = {1: 1}  # z, the share of the old state that stays


class MultiHeadBiGRU(MultiHeadBiRNN):
    """H bidirectional GRUs, one a head."""

    direction = DirectionGRU
