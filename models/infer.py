"""Which model a state dict belongs to, told by its names and shapes alone."""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from models.deit import TEACHERS, create_teacher, find_teacher
from models.mingru import MINGRU
from models.replace import REPLACEMENTS, FarConfig, build_on_meta, mlps
from models.vit import prefix_positions
from utils.checkpoint import FLOATS, check_dense
from utils.errors import FarError

INSIDE = re.compile(r"blocks\.([0-9]{1,4})\.(?:attn\.)?(.+)")  # a block, and what is in it or in attention's place
# W_hh of a head and direction: ours, or the published code's per head; and the bias of a cell that has no W_hh.
RECURRENT = re.compile(r"lstms?\.([0-9]{1,4})\.(?:[01]\.weight_hh|weight_hh_l0(?:_reverse)?)")
MINIMAL = re.compile(r"lstm\.([0-9]{1,4})\.[01]\.bias_ih")


def blocks_of(state: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """The weights of every block by their names in it; those in attention's place without `attn.`."""
    blocks: dict[int, dict[str, Any]] = {}
    for name, value in state.items():
        if match := INSIDE.fullmatch(name):
            blocks.setdefault(int(match[1]), {})[match[2]] = value
    return dict(sorted(blocks.items()))


def units_of(parts: Mapping[str, Tensor]) -> list[list[int]]:
    """u[h][r] of the recurrent heads in attention's place; empty where there are none."""
    heads: dict[int, list[int]] = {}
    recurrent = any(map(RECURRENT.fullmatch, parts))
    for name in sorted(parts):
        if match := (RECURRENT if recurrent else MINIMAL).fullmatch(name):
            size = parts[name].shape[-1]
            heads.setdefault(int(match[1]), []).append(size if recurrent else size // MINGRU.gates)
    return [pair for _, pair in sorted(heads.items())]


def infer(state: Mapping[str, Any], source: str, base_model: str | None = None) -> FarConfig:
    """The model around what replaces attention: `base_model`, else the one of TEACHERS whose shapes fit."""

    def shape(name: str, ndim: int) -> torch.Size:
        if name not in state:
            raise FarError(f"{source}: lacks {name}; give a DeiT's weights whole, with their classifier")
        check_dense(state[name], FLOATS, name, source)
        if state[name].ndim != ndim:
            raise FarError(f"{source}: {name} has shape {tuple(state[name].shape)}; a DeiT's has {ndim} dimensions")
        return state[name].shape

    width, _, _, patch = shape("patch_embed.proj.weight", 4)
    num_classes, tokens, depth = shape("head.weight", 2)[0], shape("pos_embed", 3)[1], len(blocks_of(state))
    candidates = [base_model] if base_model else list(TEACHERS)
    for name in candidates:
        with torch.device("meta"):
            model = create_teacher(name, 1, find_teacher(name).input_size)
        if (model.embed_dim, len(model.blocks), model.patch_embed.patch_size[0]) == (width, depth, patch):
            break
    else:
        raise FarError(
            f"{source}: has width {width}, {depth} blocks and patches of {patch} px, which is no "
            f"{' or '.join(candidates)}; name the model the weights belong to"
        )
    hidden = {i: shape(f"blocks.{i}.mlp.fc1.weight", 2)[0] for i in mlps(model)}
    pruned = {str(i): hidden[i] for i, mlp in mlps(model).items() if hidden[i] != mlp.full_sizes}
    img_size = math.isqrt(max(0, tokens - prefix_positions(model))) * patch
    return FarConfig(name, num_classes, img_size, mlp=pruned)


def infer_far(state: Mapping[str, Any], source: str) -> FarConfig:
    """The configuration that a FAR checkpoint has beside these weights. Raises FarError where no model has them."""
    config, blocks = infer(state, source), blocks_of(state)
    replaced = tuple(i for i, parts in blocks.items() if "post_proj.weight" in parts)
    units = {str(i): sizes for i in replaced if (sizes := units_of(blocks[i]))}
    shapes = {name: value.shape for name, value in state.items()}
    for rep_by in REPLACEMENTS:
        config = replace(config, rep_by=rep_by, replaced=replaced, units=units)
        try:
            expected = build_on_meta(config, source).state_dict()
        except FarError:  # no such replacement has these units
            continue
        if {name: value.shape for name, value in expected.items()} == shapes:
            return config
    raise FarError(
        f"{source}: holds no {' nor '.join(REPLACEMENTS)} in a {config.base_model}; name a FAR checkpoint, which "
        "convert.py makes of the published code's weights"
    )
