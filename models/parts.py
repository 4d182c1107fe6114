"""The interface of a block's parts: of whatever replaces attention, and of the MLP."""

import abc
from collections.abc import Mapping
from typing import Any, NamedTuple

import timm.layers
import torch
from torch import Tensor, nn

from models import kernels
from models.merged import Merged, MergedBiRNN, hooked
from models.operations import Operation, gelu, linear
from utils.errors import FarError

Place = tuple[int, ...]


class Consumers(NamedTuple):
    """The weights that read some hidden units."""

    places: list[Place]
    seen: nn.Linear  # a layer whose inputs are exactly the units of these places, in this order
    readers: list[tuple[nn.Parameter, nn.Parameter, list[Place]]]  # weight (a column a unit), bias, places


def safe_root(squares: Tensor) -> Tensor:
    """Square roots whose gradient at an exact zero is zero instead of infinite."""
    positive = squares > 0
    return torch.where(positive, squares, torch.ones_like(squares)).sqrt() * positive


def shrunk(old: nn.Parameter, new: Tensor) -> nn.Parameter:
    return nn.Parameter(new.clone(), requires_grad=old.requires_grad)


class BlockPart(abc.ABC):
    """A part of a block that knows its cost and its prunable hidden units.

    A place is a set of units side by side: (head, direction) in a multi-head RNN, () in an MLP. A unit's group is
    every weight that is removed with it. A part without prunable units has no places, and sizes of ().
    """

    @property
    @abc.abstractmethod
    def sizes(self) -> Any:
        """Units by place as plain nested data, which is stored with a checkpoint to rebuild the part."""

    @property
    @abc.abstractmethod
    def full_sizes(self) -> Any:
        """The same before pruning."""

    @abc.abstractmethod
    def operations(self, tokens: int) -> list[Operation]:
        """What it computes for one image of so many tokens, in order."""

    @abc.abstractmethod
    def unit_norms(self) -> dict[Place, Tensor]:
        """s_j, the norm of the group of every unit j, (u,), by place; differentiable."""

    @abc.abstractmethod
    def dead_units(self) -> dict[Place, Tensor]:
        """Masks (u,), by place, of units that are always zero because their weights are, as masks leave them."""

    @abc.abstractmethod
    def shrink(self, kept: Mapping[Place, Tensor]) -> None:
        """Keeps only the named units (ascending indices) of each place; tensors get smaller."""

    @abc.abstractmethod
    def consumers(self) -> list[Consumers]:
        """What reads the hidden units; each unit is in exactly one entry."""

    @abc.abstractmethod
    def params_removed(self, kept: Mapping[Place, Tensor]) -> int:
        """The number of parameters that `shrink(kept)` removes."""


class Mlp(timm.layers.Mlp, BlockPart):
    """timm's MLP; its hidden units can be pruned."""

    full_sizes = 0  # `models.vit.adapt_mlps` sets it

    @property
    def sizes(self) -> int:
        return self.fc1.out_features

    def operations(self, tokens: int) -> list[Operation]:
        hidden = linear("fc1", self.fc1, tokens, **gelu(tokens * self.fc1.out_features))
        return [hidden, linear("fc2", self.fc2, tokens)]

    def unit_norms(self) -> dict[Place, Tensor]:
        """fc1's row and bias, fc2's column."""
        squares = self.fc1.weight.square().sum(1) + self.fc1.bias.square() + self.fc2.weight.square().sum(0)
        return {(): safe_root(squares)}

    def dead_units(self) -> dict[Place, Tensor]:
        return {(): (self.fc1.weight == 0).all(1) & (self.fc1.bias == 0)}

    @torch.no_grad()
    def shrink(self, kept: Mapping[Place, Tensor]) -> None:
        for index in kept.values():
            self.fc1.weight = shrunk(self.fc1.weight, self.fc1.weight[index])
            self.fc1.bias = shrunk(self.fc1.bias, self.fc1.bias[index])
            self.fc2.weight = shrunk(self.fc2.weight, self.fc2.weight[:, index])
            self.fc1.out_features = self.fc2.in_features = len(index)

    def consumers(self) -> list[Consumers]:
        return [Consumers([()], self.fc2, [(self.fc2.weight, self.fc2.bias, [()])])]

    def params_removed(self, kept: Mapping[Place, Tensor]) -> int:
        unit = self.fc1.in_features + 1 + self.fc2.out_features  # fc1's row and bias, fc2's column
        return unit * sum(self.sizes - len(index) for index in kept.values())

    def resize(self, hidden: int) -> None:
        """Fresh weights for so many hidden units."""
        self.fc1, self.fc2 = nn.Linear(self.fc1.in_features, hidden), nn.Linear(hidden, self.fc2.out_features)


class Replacement(nn.Module, BlockPart):
    """Base of everything that replaces an attention block: `forward(x) = post_proj(mix(x))`.

    Args:
        dim: embedding width D.
        num_heads: heads H.
        num_tokens: tokens N (only token mixers are tied to it).
        units: sizes as a pruned one stores them; None is a full one.

    Shapes: x (B, N, D); `mix` gives z (B, N, D), the counterpart of attention's joined head outputs; forward (B, N, D).
    """

    def __init__(self, dim: int, num_heads: int, num_tokens: int, units: Any = None):
        super().__init__()
        self.dim, self.num_heads, self.num_tokens = dim, num_heads, num_tokens
        self.backend = "auto"
        self.post_proj = nn.Linear(dim, dim)

    @property
    def proj(self) -> nn.Linear:
        """post_proj under attention's name for it: what z enters."""
        return self.post_proj

    @abc.abstractmethod
    def mix(self, x: Tensor) -> Tensor: ...

    @classmethod
    def check_backend(cls, backend: str, device: torch.device) -> None:
        """Raises FarError where a `--lstm-backend` cannot compute it on a device; without recurrent cells all can."""

    def merged(self) -> nn.Module:
        """The same function for inference, called like this one, of its weights as they are now."""
        maps = None if hooked(self) else self.maps()
        return MergedBiRNN(maps) if maps else self

    def maps(self) -> Merged | None:
        """Its linear maps and cells, for inference; None where it has others, and is computed as it is."""
        return None

    def published(self, per_head: bool = False) -> dict[str, Tensor]:
        """Its weights between the two projections as the published code stores them. FarError where that has none."""
        raise FarError("the published code replaces attention by LSTMs alone; keep this model in FAR's own checkpoints")

    def task(self) -> kernels.Task | None:
        """What a kernel must be able to compute; None if it has no recurrent cells."""
        return None

    def check_tokens(self, tokens: int) -> None:
        """Raises FarError where it cannot work on so many tokens."""

    def mixing_parts(self) -> list[nn.Module]:
        """What stage attn trains: every child but post_proj."""
        return [child for child in self.children() if child is not self.post_proj]

    def init_from_attention(self, attn: nn.Module, init: str) -> None:
        """post_proj becomes a copy of the teacher's output projection, so that z keeps the teacher's meaning."""
        nn.init.zeros_(self.post_proj.bias)  # where the teacher's has none
        self.post_proj.load_state_dict(attn.proj.state_dict(), strict=False)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """attn_mask, is_causal: timm's block protocol; a bidirectional replacement reads every token."""
        if attn_mask is not None or is_causal:
            raise ValueError("FAR's replacements are bidirectional and take no mask")
        return self.post_proj(self.mix(x))
