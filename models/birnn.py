"""Heads of bidirectional recurrent cells between two projections; LSTM, GRU and minGRU fill in the cell."""

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from models import kernels
from models.merged import Merged, merge, plain
from models.operations import Operation, linear, recurrence, side_by_side
from models.parts import Consumers, Place, Replacement, safe_root, shrunk


class Direction(nn.Module):
    """Weights of one head in one direction, named and shaped as in torch, with G gates: u units reading d channels.

    memory: the gates by which states last, and the sign with which each does.
    """

    kind: ClassVar[kernels.CellKind]
    memory: ClassVar[dict[int, int]]

    def __init__(self, input_size: int, units: int):
        super().__init__()
        columns = {"weight_ih": [input_size], "weight_hh": [units]}
        for name in self.kind.cell._fields:
            setattr(self, name, nn.Parameter(torch.zeros(self.kind.gates * units, *columns.get(name, []))))
        self.reset_parameters()

    @property
    def units(self) -> int:
        return len(self.bias_ih) // self.kind.gates

    def cell(self) -> kernels.AnyCell:
        return self.kind.cell(*(getattr(self, name) for name in self.kind.cell._fields))

    def by_gate(self, weight: Tensor) -> Tensor:
        """(G u, ...) as (G, u, ...), a view."""
        return weight.unflatten(0, (self.kind.gates, -1))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Xavier input weights, orthogonal recurrence gate by gate, biases zero."""
        starts = {"weight_ih": nn.init.xavier_uniform_, "weight_hh": nn.init.orthogonal_}
        for name, weight in self.named_parameters():
            for rows in weight.chunk(self.kind.gates):
                starts.get(name, nn.init.zeros_)(rows)

    @torch.no_grad()
    def chrono_init(self, tokens: int) -> None:
        """Chrono initialisation (arXiv 1804.11188): biases log U(1, N - 1), so that states last for 1 to N tokens."""
        bias = torch.empty(self.units).uniform_(1, max(2, tokens - 1)).log()
        for gate, sign in self.memory.items():
            self.by_gate(self.bias_ih)[gate] = sign * bias

    def dead_units(self) -> Tensor:
        """Mask (u,) of units whose rows of all gates are zero, biases too: they stay at the initial state's zero."""
        rows = [self.by_gate(w).reshape(self.kind.gates, self.units, -1) for w in self.cell()]
        return (torch.cat(rows, dim=2) == 0).all(2).all(0)

    def keep(self, index: Tensor) -> None:
        for name, weight in list(self.named_parameters()):
            rows = self.by_gate(weight)[:, index].flatten(0, 1)
            setattr(self, name, shrunk(weight, rows[:, index] if name == "weight_hh" else rows))


class MultiHeadBiRNN(Replacement):
    """H independent bidirectional RNNs between a shared input and output projection.

    `p = pre_proj(x)` is split into H chunks of width d = D / H; each head reads its chunk forward and backward;
    `head_proj` maps the head's u[h][0] + u[h][1] hidden units to d channels of z. No weight joins two heads.
    """

    direction: ClassVar[type[Direction]]

    def __init__(self, dim: int, num_heads: int, num_tokens: int, units: Sequence[Sequence[int]] | None = None):
        super().__init__(dim, num_heads, num_tokens, units)
        units = units or self.full_sizes
        self.pre_proj = nn.Linear(dim, dim)
        # Named so in checkpoints whatever the kind of cell.
        self.lstm = nn.ModuleList(nn.ModuleList(self.direction(self.width, u) for u in pair) for pair in units)
        self.head_proj = nn.ModuleList(nn.Linear(sum(pair), self.width) for pair in units)

    @property
    def reads_state(self) -> bool:
        """Whether the cells read their own hidden state, by a W_hh."""
        return "weight_hh" in self.direction.kind.cell._fields

    @property
    def width(self) -> int:
        """Channels d that a head reads and gives."""
        return self.dim // self.num_heads

    @property
    def sizes(self) -> list[list[int]]:
        """u[h][r]: kept units per head and direction."""
        return [[direction.units for direction in head] for head in self.lstm]

    @property
    def full_sizes(self) -> list[list[int]]:
        return [[self.width] * 2 for _ in range(self.num_heads)]

    @classmethod
    def check_backend(cls, backend: str, device: torch.device) -> None:
        kernels.check(backend, device, cls.direction.kind)

    def task(self) -> kernels.Task:
        weight = self.post_proj.weight
        return kernels.Task(self.direction.kind, weight.device, weight.dtype, max(map(max, self.sizes)))

    def cells(self) -> list[kernels.AnyCell]:
        """In the kernels' order."""
        return [direction.cell() for head in self.lstm for direction in head]

    def mix(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        p = self.pre_proj(x).view(b, n, self.num_heads, self.width)  # (B, N, H, d)
        hidden, units = self.hidden(p), [sum(pair) for pair in self.sizes]
        if len(set(units)) > 1 or not plain(*self.head_proj):
            parts = hidden.split(units, dim=2)
            return torch.cat([proj(part) for proj, part in zip(self.head_proj, parts, strict=True)], dim=2)
        # Projections of one shape are one product: a GPU pays for each by its launch.
        weight = torch.stack([proj.weight.t() for proj in self.head_proj])  # (H, u, d)
        bias = torch.stack([proj.bias for proj in self.head_proj])[:, None]
        by_head = hidden.flatten(0, 1).unflatten(1, (self.num_heads, -1)).transpose(0, 1)  # (H, B N, u)
        return torch.baddbmm(bias, by_head, weight).transpose(0, 1).reshape(b, n, self.dim)

    def hidden(self, p: Tensor) -> Tensor:
        """Hidden states (B, N, sum u) of head inputs p (B, N, H, d), by the kernel that `backend` names."""
        return kernels.compute(self.backend, self.direction.kind, p, self.cells())

    def init_from_attention(self, attn: nn.Module, init: str) -> None:
        """Where the cells start. `chrono` was the best of the three on the digits (docs/results.md).

        random: pre_proj by torch. value: pre_proj is the teacher's value projection, what attention averages. chrono:
        that, and units that remember for between 1 and N tokens (Tallec & Ollivier, arXiv 1804.11188): attention reads
        all tokens, an RNN must first learn to hold them.
        """
        super().init_from_attention(attn, init)
        if init == "chrono":
            for head in self.lstm:
                for direction in head:
                    direction.chrono_init(self.num_tokens)
        if init in ("value", "chrono"):
            with torch.no_grad():
                self.pre_proj.weight.copy_(attn.qkv.weight[-self.dim :])
                if attn.qkv.bias is not None:
                    self.pre_proj.bias.copy_(attn.qkv.bias[-self.dim :])

    def operations(self, tokens: int) -> list[Operation]:
        heads = side_by_side("head_proj", [proj.weight for proj in self.head_proj], tokens, tokens * self.dim)
        pre, post = (linear(name, getattr(self, name), tokens) for name in ("pre_proj", "post_proj"))
        return [pre, *recurrence(self.direction.kind, self.cells(), tokens), heads, post]

    def _places(self) -> Iterator[tuple[Place, Direction, Tensor]]:
        """Every place, its direction and its columns of head_proj's weight (d, u)."""
        for h, (pair, proj) in enumerate(zip(self.lstm, self.head_proj, strict=True)):
            columns = proj.weight.split([direction.units for direction in pair], dim=1)
            for r, direction in enumerate(pair):
                yield (h, r), direction, columns[r]

    def unit_norms(self) -> dict[Place, Tensor]:
        """s_j: the gates' rows of all weights, the columns of head_proj, and of W_hh where there is one.

        An entry of W_hh that joins a unit with itself lies in its row and its column, and counts once. Places of one
        size are stacked: on a GPU each operation costs its launch, and a DeiT-Base has 288 places.
        """
        norms: dict[Place, Tensor] = {}
        by_size: dict[int, list[tuple[Place, Direction, Tensor]]] = {}
        for entry in self._places():
            by_size.setdefault(entry[1].units, []).append(entry)
        for entries in by_size.values():
            places, directions, readouts = zip(*entries, strict=True)
            cells = zip(*(direction.cell() for direction in directions), strict=True)
            square = [torch.stack(w).square().unflatten(1, (self.direction.kind.gates, -1)) for w in cells]
            cell = self.direction.kind.cell(*square)  # of squares, (P, G, u, ...)
            biases = sum(w for name, w in cell._asdict().items() if "bias" in name)
            squares = cell.weight_ih.sum((1, 3)) + biases.sum(1)
            squares = squares + torch.stack(readouts).square().sum(1)
            if self.reads_state:
                w_hh = cell.weight_hh
                squares = squares + (w_hh.sum((1, 3)) + w_hh.sum((1, 2)) - w_hh.diagonal(dim1=2, dim2=3).sum(1))
            norms.update(zip(places, safe_root(squares).unbind(), strict=True))
        return dict(sorted(norms.items()))

    def dead_units(self) -> dict[Place, Tensor]:
        return {place: direction.dead_units() for place, direction, _ in self._places()}

    @torch.no_grad()
    def shrink(self, kept: Mapping[Place, Tensor]) -> None:
        readouts = {place: readout for place, _, readout in self._places()}
        for (h, r), index in kept.items():
            readouts[h, r] = readouts[h, r][:, index]
            self.lstm[h][r].keep(index)
        for h, proj in enumerate(self.head_proj):
            proj.weight = shrunk(proj.weight, torch.cat([readouts[h, 0], readouts[h, 1]], dim=1))
            proj.in_features = proj.weight.shape[1]

    def consumers(self) -> list[Consumers]:
        """head_proj reads both directions of a head, W_hh its own direction, a step later."""
        consumers = []
        for h, (pair, proj) in enumerate(zip(self.lstm, self.head_proj, strict=True)):
            gates = [(cell.weight_hh, cell.bias_hh, [(h, r)]) for r, cell in enumerate(pair) if self.reads_state]
            both = [(h, 0), (h, 1)]
            consumers.append(Consumers(both, proj, [(proj.weight, proj.bias, both), *gates]))
        return consumers

    def params_removed(self, kept: Mapping[Place, Tensor]) -> int:
        def held(units: int) -> int:
            """Parameters of a direction of so many units, and their columns of head_proj."""
            row = self.width + 1 + (units + 1 if self.reads_state else 0)
            return self.direction.kind.gates * units * row + self.width * units

        return sum(held(self.sizes[h][r]) - held(len(index)) for (h, r), index in kept.items())

    def maps(self) -> Merged | None:
        """None where one of its projections is no plain linear map (an adapter, a hook)."""
        return merge(self) if plain(self.pre_proj, *self.head_proj, self.post_proj) else None
