"""Select hidden units by their norms and remove them: tensors get smaller, no mask survives.

Score (`engine.hoyer`), select and shrink are three steps. A selection is {place: kept indices, ascending}, one a
place at least.
"""

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from engine.hoyer import Norms, Place, by_block
from models.bilstm import DirectionLSTM
from models.replace import count_parameters
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


def keep_within(model: VisionTransformer, norms: Norms, parameters: int) -> Kept:
    """Keeps as many units, best first, as leave at most `parameters` in the model. Raises FarError where none fit."""
    low, high = len(norms), sum(map(len, norms.values()))
    least = parameters_after(model, keep_top(norms, low))
    if least > parameters:
        raise FarError(
            f"--target-params {parameters}: one unit a head and direction leaves {least:,}, the smallest possible; "
            "raise it (or shrink the MLPs too, --prune-mlp)"
        )
    while low < high:  # parameters grow with the count, so bisect for the largest that fits
        middle = (low + high + 1) // 2
        low, high = (
            (middle, high) if parameters_after(model, keep_top(norms, middle)) <= parameters else (low, middle - 1)
        )
    return keep_top(norms, low)


def parameters_after(model: VisionTransformer, kept: Kept) -> int:
    """The model's parameters once only the kept LSTM units are left."""

    def cost(u: int, d: int) -> int:
        return 4 * u * (d + u + 2) + d * u  # W_ih, W_hh, biases; the unit's column of head_proj

    removed = 0
    for (block, head, r), index in kept.items():
        direction = model.blocks[block].attn.lstm[head][r]
        d = direction.weight_ih.shape[1]
        removed += cost(direction.units, d) - cost(len(index), d)
    return count_parameters(model) - removed


def _first(s: Tensor) -> Tensor:
    """A mask of the place's largest unit, which always stays."""
    return torch.arange(len(s), device=s.device) == s.argmax()


@torch.no_grad()
def shrink_lstms(model: VisionTransformer, kept: Kept) -> None:
    """Keeps only the named units of each head and direction: u[h][r] becomes len(kept[block, h, r])."""
    for (block, head, r), index in kept.items():
        attn = model.blocks[block].attn
        pair, proj = attn.lstm[head], attn.head_proj[head]
        before = [torch.arange(direction.units, device=index.device) for direction in pair]
        before[r] = index
        columns = torch.cat([before[0], before[1] + pair[0].units])
        proj.weight = _as(proj.weight, proj.weight[:, columns])
        proj.in_features = len(columns)
        _shrink_direction(pair[r], index)


def _shrink_direction(direction: DirectionLSTM, index: Tensor) -> None:
    gates = torch.arange(4, device=index.device)[:, None]
    rows = (gates * direction.units + index).flatten()  # gate-major, as torch stores them
    direction.weight_hh = _as(direction.weight_hh, direction.weight_hh[rows][:, index])
    for name in ("weight_ih", "bias_ih", "bias_hh"):
        setattr(direction, name, _as(getattr(direction, name), getattr(direction, name)[rows]))


@torch.no_grad()
def shrink_mlps(model: VisionTransformer, kept: Kept) -> None:
    """Keeps only the named hidden units of each block's MLP."""
    for (block,), index in kept.items():
        mlp = model.blocks[block].mlp
        mlp.fc1.weight, mlp.fc1.bias = (
            _as(mlp.fc1.weight, mlp.fc1.weight[index]),
            _as(mlp.fc1.bias, mlp.fc1.bias[index]),
        )
        mlp.fc2.weight = _as(mlp.fc2.weight, mlp.fc2.weight[:, index])
        mlp.fc1.out_features = mlp.fc2.in_features = len(index)


def _as(old: nn.Parameter, new: Tensor) -> nn.Parameter:
    return nn.Parameter(new.clone(), requires_grad=old.requires_grad)
