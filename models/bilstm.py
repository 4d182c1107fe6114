"""The multi-head bidirectional LSTM (arXiv 2505.21535): FAR's replacement for attention."""

from collections.abc import Sequence

import torch
from torch import nn

from models import kernels
from models.birnn import Direction, MultiHeadBiRNN


class DirectionLSTM(Direction):
    """One head's LSTM in one direction, gates in the order i, f, g, o."""

    kind = kernels.LSTM

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Forget bias 1 besides (Jozefowicz et al., 2015): long memory at the start."""
        super().reset_parameters()
        self.by_gate(self.bias_ih)[1] = 1.0

    @torch.no_grad()
    def remember_up_to(self, tokens: int) -> None:
        """Forget bias log U(1, tokens - 1), input bias its negative."""
        forget = torch.empty(self.units).uniform_(1, max(2, tokens - 1)).log()
        gates = self.by_gate(self.bias_ih)
        gates[1], gates[0] = forget, -forget


class MultiHeadBiLSTM(MultiHeadBiRNN):
    """H bidirectional LSTMs, one a head."""

    direction = DirectionLSTM

    def to_dense(self) -> nn.LSTM:
        """The published shape of the same function: one bidirectional LSTM with our blocks on its diagonal.

        Rows are gate-major (row = gate * H * u + head * u + unit). Ragged heads are padded with zero units. Its output
        (B, N, 2 H u) holds all forward units, then all backward ones.
        """
        d, width = self.width, max(max(pair) for pair in self.sizes)
        like = self.pre_proj.weight
        dense = nn.LSTM(self.dim, self.num_heads * width, batch_first=True, bidirectional=True)
        dense = dense.to(device=like.device, dtype=like.dtype)
        with torch.no_grad():
            for r, suffix in enumerate(("", "_reverse")):
                w_ih, w_hh, b_ih, b_hh = (
                    getattr(dense, f"{kind}_l0{suffix}").zero_().unflatten(0, (4, self.num_heads, width))
                    for kind in kernels.Cell._fields
                )
                for h, head in enumerate(self.lstm):
                    u, (own_ih, own_hh, own_bi, own_bh) = head[r].units, map(head[r].by_gate, head[r].cell())
                    w_ih[:, h, :u, h * d : (h + 1) * d] = own_ih
                    w_hh[:, h, :u, h * width : h * width + u] = own_hh
                    b_ih[:, h, :u], b_hh[:, h, :u] = own_bi, own_bh
        return dense


class SingleLSTM(MultiHeadBiLSTM):
    """The same with one head of width D."""

    def __init__(self, dim: int, num_heads: int, num_tokens: int, units: Sequence[Sequence[int]] | None = None):
        super().__init__(dim, 1, num_tokens, units)
