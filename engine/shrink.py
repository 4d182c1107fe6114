"""Select hidden units by their norms and remove them: tensors get smaller, no mask survives.

Score (`engine.hoyer`), select and shrink are three steps. A selection is {place: kept indices, ascending}, one a
place at least.
"""

from collections.abc import Iterator, Mapping

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from engine.hoyer import Norms, by_block
from models.parts import BlockPart, Place
from models.replace import count_parameters, mlps, replacements
from utils.errors import FarError

Kept = dict[Place, Tensor]


def relative(norms: Norms) -> Norms:
    """s_j / mean(s) of the unit's block: comparable over blocks."""
    means = {block: s.mean().clamp_min(torch.finfo(s.dtype).tiny) for block, s in by_block(norms).items()}
    return {place: s.detach() / means[place[0]] for place, s in norms.items()}


def keep_above(norms: Norms, sensitivity: float) -> Kept:
    """Removes the units with s_j < sensitivity * mean(s) of their block."""
    scores = relative(norms)
    return {place: ((s >= sensitivity) | _first(s)).nonzero().flatten() for place, s in scores.items()}


def keep_top(norms: Norms, count: int) -> Kept:
    """Keeps the `count` units with the largest s_j / mean(s) over all blocks, each place's largest first."""
    scores = relative(norms)
    flat = torch.cat([torch.where(_first(s), torch.inf, s) for s in scores.values()])
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen[flat.argsort(descending=True, stable=True)[:count]] = True
    parts = chosen.split([len(s) for s in scores.values()])
    return {place: part.nonzero().flatten() for place, part in zip(scores, parts, strict=True)}


def keep_share(norms: Norms, ratio: float, flag: str = "--keep-ratio") -> Kept:
    """Keeps a share of all units. Raises FarError where it is below one unit a place."""
    total, least = sum(map(len, norms.values())), len(norms)
    count = round(ratio * total)
    if count < least:
        raise FarError(
            f"{flag} {ratio:g}: leaves {count} of {total} units, one a head and direction needs {least}; "
            f"the smallest possible is {least / total:.4g}"
        )
    return keep_top(norms, count)


def keep_within(model: VisionTransformer, norms: Norms, parameters: int, mlp: Kept | None = None) -> Kept:
    """Keeps as many units, best first, as leave at most `parameters` in the model. Raises FarError where none fit.

    mlp: what the MLPs keep, decided before.
    """
    low, high = len(norms), sum(map(len, norms.values()))
    least = parameters_after(model, keep_top(norms, low), mlp)
    if least > parameters:
        raise FarError(
            f"--target-params {parameters}: one unit a head and direction leaves {least:,}, the smallest possible; "
            "raise it (or shrink the MLPs too, --prune-mlp)"
        )
    while low < high:  # parameters grow with the count, so bisect for the largest that fits
        middle = (low + high + 1) // 2
        fits = parameters_after(model, keep_top(norms, middle), mlp) <= parameters
        low, high = (middle, high) if fits else (low, middle - 1)
    return keep_top(norms, low)


def parameters_after(model: VisionTransformer, kept: Kept, mlp: Kept | None = None) -> int:
    """The model's parameters once only the kept units of its replacements, and of its MLPs, are left."""
    pairs = [*by_part(replacements(model), kept), *by_part(mlps(model), mlp or {})]
    return count_parameters(model) - sum(part.params_removed(units) for part, units in pairs)


def _first(s: Tensor) -> Tensor:
    """A mask of the place's largest unit, which always stays."""
    return torch.arange(len(s), device=s.device) == s.argmax()


def by_part(parts: Mapping[int, BlockPart], kept: Kept) -> Iterator[tuple[BlockPart, Kept]]:
    """Each part and what it keeps, by its own places."""
    for block, part in parts.items():
        yield part, {tuple(place): index for (owner, *place), index in kept.items() if owner == block}


def shrink(parts: Mapping[int, BlockPart], kept: Kept) -> None:
    """Keeps only the named units of parts by block; their tensors get smaller."""
    for part, units in by_part(parts, kept):
        part.shrink(units)
