"""Token mixing by an MLP (MLP-Mixer, arXiv 2105.01601), to compare with."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from models.operations import Operation, gelu, linear
from models.parts import Consumers, Place, Replacement
from utils.errors import FarError


class TokenMixer(Replacement):
    """An MLP across tokens with hidden width 2 N: z = fc2(gelu(fc1(x^T)))^T, fixed N. It has no units to remove."""

    sizes = full_sizes = ()

    def __init__(self, dim: int, num_heads: int, num_tokens: int, units: Any = None):
        super().__init__(dim, num_heads, num_tokens, units)
        self.fc1 = nn.Linear(num_tokens, 2 * num_tokens)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(2 * num_tokens, num_tokens)

    def mix(self, x: Tensor) -> Tensor:
        self.check_tokens(x.shape[1])
        return self.fc2(self.act(self.fc1(x.transpose(1, 2)))).transpose(1, 2)  # (B, D, N) inside

    def operations(self, tokens: int) -> list[Operation]:
        hidden = linear("fc1", self.fc1, self.dim, waits="all", **gelu(self.dim * self.fc1.out_features))
        return [hidden, linear("fc2", self.fc2, self.dim), linear("post_proj", self.post_proj, tokens, waits="all")]

    def check_tokens(self, tokens: int) -> None:
        if tokens != self.num_tokens:
            raise FarError(
                f"a mixer works on its own {self.num_tokens} tokens, not on {tokens}; keep its image size, or replace "
                "attention by one of the others"
            )

    def unit_norms(self) -> dict[Place, Tensor]:
        return {}

    def dead_units(self) -> dict[Place, Tensor]:
        return {}

    def shrink(self, kept: Mapping[Place, Tensor]) -> None:
        pass

    def consumers(self) -> list[Consumers]:
        return []

    def params_removed(self, kept: Mapping[Place, Tensor]) -> int:
        return 0
