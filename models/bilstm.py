"""The multi-head bidirectional LSTM (arXiv 2505.21535): FAR's replacement for attention."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from models import kernels
from models.birnn import Direction, MultiHeadBiRNN

SUFFIXES = ("", "_reverse")  # of the directions in nn.LSTM's names


class DirectionLSTM(Direction):
    """One head's LSTM in one direction, gates in the order i, f, g, o."""

    kind = kernels.LSTM
    memory = {1: 1, 0: -1}  # the forget gate, the input gate

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Forget bias 1 besides (Jozefowicz et al., 2015): long memory at the start."""
        super().reset_parameters()
        self.by_gate(self.bias_ih)[1] = 1.0


class MultiHeadBiLSTM(MultiHeadBiRNN):
    """H bidirectional LSTMs, one a head."""

    direction = DirectionLSTM

    @torch.no_grad()
    def published(self, per_head: bool = False) -> dict[str, Tensor]:
        """The heads as the published code stores them, removed units as zeros.

        Dense: one nn.LSTM `lstm` of D units a direction with the heads' blocks on its diagonal, rows gate-major (row =
        gate * D + head * d + unit), and `head_proj` (D, 2 D), columns all forward units, then all backward ones. Per
        head: `lstms.{h}`, of the head's larger direction, and `head_projs.{h}`: the same with one head each.
        """
        tensors = self._zeros(per_head)
        for weight, block in self._blocks(per_head, tensors):
            block.copy_(weight)
        return tensors

    @torch.no_grad()
    def take_published(self, tensors: Mapping[str, Tensor], per_head: bool) -> dict[str, Tensor]:
        """Weights out of that layout; returns what is left of its tensors, zero but where no head has a weight."""
        left = {name: zeros.copy_(tensors[name]) for name, zeros in self._zeros(per_head).items()}
        for weight, block in self._blocks(per_head, left):
            weight.copy_(block)
            block.zero_()
        return left

    def to_dense(self) -> nn.LSTM:
        """The dense nn.LSTM alone, of D units a direction. Gives (B, N, 2 D)."""
        dense = nn.LSTM(self.dim, self.dim, batch_first=True, bidirectional=True).to(self.post_proj.weight)
        tensors = self.published()
        dense.load_state_dict({name: tensors[f"lstm.{name}"] for name in dense.state_dict()})
        return dense

    def _layout(self, per_head: bool) -> list[tuple[str, str, Sequence[int], int]]:
        """The published LSTMs: name, name of the projection, heads, units a head and direction."""
        if per_head:
            return [(f"lstms.{h}", f"head_projs.{h}", [h], max(pair)) for h, pair in enumerate(self.sizes)]
        return [("lstm", "head_proj", range(self.num_heads), self.width)]

    def _zeros(self, per_head: bool) -> dict[str, Tensor]:
        shapes: dict[str, tuple[int, ...]] = {}
        for lstm, proj, heads, width in self._layout(per_head):
            units, channels = len(heads) * width, len(heads) * self.width
            cell = kernels.Cell((4 * units, channels), (4 * units, units), (4 * units,), (4 * units,))
            shapes |= {f"{lstm}.{kind}_l0{suffix}": s for suffix in SUFFIXES for kind, s in cell._asdict().items()}
            shapes |= {f"{proj}.weight": (channels, 2 * units), f"{proj}.bias": (channels,)}
        return {name: self.post_proj.weight.new_zeros(shape) for name, shape in shapes.items()}

    def _blocks(self, per_head: bool, tensors: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Each weight of the heads and its block in a layout's tensors, of one shape: views, to copy either way."""
        readouts = {place: readout for place, _, readout in self._places()}
        for lstm, proj, heads, width in self._layout(per_head):
            columns = tensors[f"{proj}.weight"].unflatten(1, (2, len(heads), width))
            for k, h in enumerate(heads):
                channels = slice(k * self.width, (k + 1) * self.width)
                for r, cell in enumerate(self.lstm[h]):
                    names = (f"{lstm}.{kind}_l0{SUFFIXES[r]}" for kind in kernels.Cell._fields)
                    rows = [tensors[name].unflatten(0, (4, len(heads), width))[:, k, : cell.units] for name in names]
                    rows[0] = rows[0][..., channels]
                    rows[1] = rows[1][..., k * width : k * width + cell.units]
                    yield from zip(map(cell.by_gate, cell.cell()), rows, strict=True)
                    yield readouts[h, r], columns[channels, r, k, : cell.units]
                yield self.head_proj[h].bias, tensors[f"{proj}.bias"][channels]


class SingleLSTM(MultiHeadBiLSTM):
    """The same with one head of width D."""

    def __init__(self, dim: int, num_heads: int, num_tokens: int, units: Sequence[Sequence[int]] | None = None):
        super().__init__(dim, 1, num_tokens, units)
