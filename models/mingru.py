"""The multi-head bidirectional minGRU (Feng et al., arXiv 2410.01201): gates read the input alone, so no W_hh.

    z = sigmoid(W_z x + b_z),  n = W_n x + b_n,  h = (1 - z) h' + z n

The candidate n is linear, as in the paper's section 3.1: a unit without weights stays zero, and the hidden states are
weighted means of linear maps of the tokens, as attention's are. No matrix product waits for the token before.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from models import kernels
from models.birnn import Direction, MultiHeadBiRNN
from models.kernels.cells import MinGRUCell


def scan(decay: Tensor, added: Tensor) -> Tensor:
    """h[t] = decay[t] h[t - 1] + added[t] along dim 1, in log2(N) steps over all tokens (Hillis & Steele, 1986).

    Decays lie in (0, 1), so that their products may vanish but never overflow: no logarithms are needed.
    """
    hop, tokens, decay = 1, added.shape[1], decay[:, 1:]
    while hop < tokens:  # decay[t - hop]: by how much a state shrinks in the `hop` tokens up to t
        added = torch.cat([added[:, :hop], torch.addcmul(added[:, hop:], decay, added[:, :-hop])], dim=1)
        decay = decay[:, hop:] * decay[:, :-hop]
        hop *= 2
    return added


def walk(decay: Tensor, added: Tensor) -> Tensor:
    """The same a token at a time: N steps, each of a token's work, where steps cost little."""
    hidden = torch.empty_like(added)
    hidden[:, :1] = added[:, :1]
    for t in range(1, added.shape[1]):
        torch.addcmul(added[:, t], decay[:, t], hidden[:, t - 1], out=hidden[:, t])
    return hidden


class Recurrence(torch.autograd.Function):
    """h[t] = decay[t] h[t - 1] + added[t]; gradients by the same recurrence from the last token to the first.

    First derivatives only: the kernel `reference` has the second.
    """

    @staticmethod
    def forward(ctx, decay: Tensor, added: Tensor) -> Tensor:
        hidden = Recurrence.compute(decay, added)
        ctx.save_for_backward(decay, hidden)
        return hidden

    @staticmethod
    def compute(decay: Tensor, added: Tensor) -> Tensor:
        by_token = added.device.type == "cpu" and not torch.compiler.is_compiling()
        return (walk if by_token else scan)(decay, added)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        decay, hidden = ctx.saved_tensors
        later = F.pad(decay[:, 1:], (0, 0, 0, 1))  # by which a state reaches the next token
        grad = Recurrence.compute(later.flip(1), grad.flip(1)).flip(1)
        return grad * F.pad(hidden[:, :-1], (0, 0, 1, 0)), grad


def _step(inputs: Tensor, recurrent: Tensor, states: Sequence[Tensor]) -> Sequence[Tensor]:
    z, n = (inputs + recurrent).chunk(2, dim=1)
    return (states[0].lerp(n, z.sigmoid()),)


def _stock(x: Tensor, cells: Sequence[MinGRUCell]) -> Tensor:
    """All cells of one direction as one recurrence."""
    ways = []
    for r in (0, 1):
        pairs = [F.linear(x[:, :, h], *cell).chunk(2, dim=2) for h, cell in enumerate(cells[r::2])]
        z, n = (torch.cat(parts, dim=2) for parts in zip(*pairs, strict=True))
        z, n = (t.flip(1) for t in (z, n)) if r else (z, n)
        z = z.sigmoid()
        states = Recurrence.apply(1 - z, z * n)
        states = states.flip(1) if r else states
        ways.append(states.split([cell.units for cell in cells[r::2]], dim=2))
    return torch.cat([hidden for head in zip(*ways, strict=True) for hidden in head], dim=2)


MINGRU = kernels.CellKind("mingru", 2, 1, 3, 1, 0, _step, _stock, MinGRUCell)


class DirectionMinGRU(Direction):
    """One head's minGRU in one direction."""

    kind = MINGRU
    memory = {0: -1}  # z, of which 1 - z is the share of the old state that stays


class MultiHeadBiMinGRU(MultiHeadBiRNN):
    """H bidirectional minGRUs, one a head."""

    direction = DirectionMinGRU
