"""Group norms of hidden units, and the DeepHoyer regularizers over them (Yang et al., arXiv 1908.09979, group form).

A group is every weight that dies with a hidden unit. Norms are kept by place: (block, head, direction) for the units of
an RNN, (block,) for those of an MLP; each place holds a vector of its units' norms.
"""

from collections.abc import Callable, Mapping

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from models.parts import BlockPart, Place, safe_root
from models.replace import mlps, replacements

Norms = dict[Place, Tensor]


def unit_norms(parts: Mapping[int, BlockPart]) -> Norms:
    """Norms of every hidden unit of parts by block: {(block, *place): (u,)}, differentiable."""
    return {(i, *place): s for i, part in parts.items() for place, s in part.unit_norms().items()}


def by_block(norms: Norms) -> dict[int, Tensor]:
    """The norms of a block in one vector."""
    blocks: dict[int, list[Tensor]] = {}
    for (block, *_), s in norms.items():
        blocks.setdefault(block, []).append(s)
    return {block: torch.cat(parts) for block, parts in blocks.items()}


def group_l1(s: Tensor) -> Tensor:
    return s.sum()


def group_hoyer(s: Tensor) -> Tensor:
    """sum s / sqrt(sum s^2): scale-free, between 1 and sqrt(groups)."""
    return s.sum() / safe_root(s.square().sum()).clamp_min(torch.finfo(s.dtype).tiny)


def group_hoyer_square(s: Tensor) -> Tensor:
    """(sum s)^2 / sum s^2: scale-free, between 1 and the number of groups."""
    return s.sum().square() / s.square().sum().clamp_min(torch.finfo(s.dtype).tiny)


REGULARIZERS: dict[int, Callable[[Tensor], Tensor] | None] = {
    0: None,
    1: group_l1,
    2: group_hoyer,
    3: group_hoyer_square,
}


def penalty(norms: Norms, regularizer: Callable[[Tensor], Tensor]) -> Tensor:
    """The regularizer of each block, summed."""
    return torch.stack([regularizer(s) for s in by_block(norms).values()]).sum()


class Regularized(nn.Module):
    """A task whose loss gains `decay` times the penalty on the student's units.

    Args:
        task: forward(images, targets) to (loss, parts).
        model: the student inside it.
        kind: a key of REGULARIZERS.
        mlp: whether the MLPs' hidden units are regularized too.
        sensitivity: a unit below this share of its block's mean norm counts as sparse, for the curves only.

    forward returns (loss, parts), with `hoyer_square` and `sparsity` (0 to 1) of the RNNs' units among the parts.
    """

    def __init__(
        self, task: nn.Module, model: VisionTransformer, kind: int, decay: float, mlp: bool, sensitivity: float
    ):
        super().__init__()
        self.task, self.model = task, model
        self.regularizer, self.decay, self.mlp, self.sensitivity = REGULARIZERS[kind], decay, mlp, sensitivity

    def forward(self, images: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss, parts = self.task(images, targets)
        norms = unit_norms(replacements(self.model))
        if self.regularizer is not None:
            families = [norms, unit_norms(mlps(self.model))] if self.mlp else [norms]
            loss = loss + self.decay * sum(penalty(family, self.regularizer) for family in families)
        with torch.no_grad():
            blocks = list(by_block(norms).values())
            sparse = torch.cat([s < self.sensitivity * s.mean() for s in blocks]).float().mean()
            return loss, {**parts, "hoyer_square": penalty(norms, group_hoyer_square), "sparsity": sparse}
