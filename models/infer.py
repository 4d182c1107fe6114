"""What model a file's weights belong to, told by their names and shapes alone."""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from models.deit import TEACHERS, create_teacher, find_teacher
from models.replace import REPLACEMENTS, FarConfig, build, find_damage, mlps
from models.vit import prefix_positions
from utils.checkpoint import FLOATS, check_dense
from utils.errors import FarError

INSIDE = re.compile(r"blocks\.([0-9]{1,4})\.(?:attn\.)?(.+)")  # a block, and what is in it or in attention's place
# The recurrent weights of a head and direction: ours, or the published code's per head.
RECURRENT = re.compile(r"lstms?\.([0-9]{1,4})\.(?:[01]\.weight_hh|weight_hh_l0(?:_reverse)?)")


def blocks_of(state: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """Every block's weights, those in attention's place by their names in there."""
    found: dict[int, dict[str, Any]] = {}
    for name, value in state.items():
        if match := INSIDE.fullmatch(name):
            found.setdefault(int(match[1]), {})[match[2]] = value
    return dict(sorted(found.items()))


def units_of(parts: Mapping[str, Tensor]) -> list[list[int]]:
    """u[h][r] of the recurrent heads in attention's place; empty where there are none."""
    heads: dict[int, list[int]] = {}
    for name in sorted(parts):
        if match := RECURRENT.fullmatch(name):
            heads.setdefault(int(match[1]), []).extend(parts[name].shape[-1:])
    return [pair for _, pair in sorted(heads.items())]


def _shape(state: Mapping[str, Any], name: str, dims: int, source: str) -> torch.Size:
    if name not in state:
        raise FarError(f"{source}: lacks {name}; give a DeiT's weights whole, with their classifier")
    check_dense(state[name], FLOATS, name, source)
    if state[name].ndim != dims:
        raise FarError(f"{source}: {name} has shape {tuple(state[name].shape)}; a DeiT's has {dims} dimensions")
    return state[name].shape


def _example(base_model: str) -> VisionTransformer:
    with torch.device("meta"):
        return create_teacher(base_model, 1, find_teacher(base_model).input_size)


def _measures(model: VisionTransformer) -> tuple[int, int, int]:
    return model.embed_dim, len(model.blocks), model.patch_embed.patch_size[0]


def infer(state: Mapping[str, Any], source: str, base_model: str | None = None) -> FarConfig:
    """The model around what replaces attention, one of TEACHERS where none is named."""
    width, _, _, patch = _shape(state, "patch_embed.proj.weight", 4, source)
    classes, tokens = _shape(state, "head.weight", 2, source)[0], _shape(state, "pos_embed", 3, source)[1]
    blocks, known = blocks_of(state), [base_model] if base_model else list(TEACHERS)
    fitting = {name: model for name in known if _measures(model := _example(name)) == (width, len(blocks), patch)}
    if not fitting:
        raise FarError(
            f"{source}: has width {width}, {len(blocks)} blocks and patches of {patch} px, which is no "
            f"{' or '.join(known)}; name the model the weights belong to"
        )
    name, model = next(iter(fitting.items()))
    full = {i: mlp.full_sizes for i, mlp in mlps(model).items()}
    hidden = {i: _shape(state, f"blocks.{i}.mlp.fc1.weight", 2, source)[0] for i in full}
    pruned = {str(i): units for i, units in hidden.items() if units != full[i]}
    side = math.isqrt(max(0, tokens - prefix_positions(model))) * patch
    return FarConfig(name, classes, side, mlp=pruned)


def infer_far(state: Mapping[str, Any], source: str) -> FarConfig:
    """The configuration that a FAR checkpoint has beside these weights. Raises FarError where no model has them."""
    config, blocks = infer(state, source), blocks_of(state)
    replaced = tuple(i for i, parts in blocks.items() if "post_proj.weight" in parts)
    units = {str(i): sizes for i in replaced if (sizes := units_of(blocks[i]))}
    shapes = {name: value.shape for name, value in state.items()}
    for rep_by in REPLACEMENTS:
        config = replace(config, rep_by=rep_by, replaced=replaced, units=units)
        if not find_damage(config):
            with torch.device("meta"):
                own = build(config).state_dict()
            if {name: value.shape for name, value in own.items()} == shapes:
                return config
    raise FarError(
        f"{source}: holds no {' nor '.join(REPLACEMENTS)} in a {config.base_model}; name a FAR checkpoint, which "
        "convert.py makes of the published code's weights"
    )
