"""State dicts of the published code (arXiv 2505.21535), to FAR models and back; `models.bilstm` draws their layouts."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from models.infer import blocks_of, infer, units_of
from models.replace import FarConfig, build_on_meta, find_damage, mlps, replacements
from utils.checkpoint import check_state, weights_of
from utils.errors import FarError


@torch.no_grad()
def to_published(model: VisionTransformer, per_head: bool = False) -> dict[str, Tensor]:
    """The state dict that the published code has of a FAR model. Raises FarError where it has no such replacement.

    Units that were removed, of MLPs too, come back as zeros.
    """
    state = dict(model.state_dict())
    for i, mlp in mlps(model).items():
        missing = mlp.full_sizes - mlp.sizes
        for name, pad in (("fc1.weight", (0, 0, 0, missing)), ("fc1.bias", (0, missing)), ("fc2.weight", (0, missing))):
            state[f"blocks.{i}.mlp.{name}"] = F.pad(state[f"blocks.{i}.mlp.{name}"], pad)
    for i, attn in replacements(model).items():
        prefix = f"blocks.{i}.attn."
        laid_out, ours = attn.published(per_head), (f"{prefix}lstm.", f"{prefix}head_proj.")
        state = {name: value for name, value in state.items() if not name.startswith(ours)}
        state |= {prefix + name: value for name, value in laid_out.items()}
    return state


@torch.no_grad()
def from_published(
    content: dict[str, Any],
    source: str,
    base_model: str | None = None,
    rep_by: str = "multi-lstm",
    tolerance: float = 0,
) -> tuple[VisionTransformer, FarConfig, float]:
    """The FAR model of a published state dict, in either layout, in eval mode; its configuration; the largest size
    of what was dropped because it is off the heads' blocks.

    Raises FarError on weights of another model, and on values off the heads' blocks above the tolerance.
    """
    if isinstance(content.get("config"), dict) and "base_model" in content["config"]:
        raise FarError(
            f"{source}: is a FAR checkpoint already; give it as --far-weight to take it to the published form"
        )
    state = weights_of(content)
    config, per_head = _describe(state, source, base_model, rep_by)
    model = build_on_meta(config, source)
    check_state(to_published(model, per_head), state, source)
    model.to_empty(device="cpu")
    own, blocks, off = model.state_dict(), blocks_of(state), (0.0, "")
    for name in own.keys() & state.keys():
        own[name].copy_(state[name])
    for i, attn in replacements(model).items():
        off = max(off, _largest(attn.take_published(blocks[i], per_head), f"blocks.{i}.attn."))
    if off[0] > tolerance:
        raise FarError(
            f"{source}: {off[1]} is {off[0]:.3g}, off the heads' blocks and above --tolerance {tolerance:g}: its heads "
            "are joined; read it as one head, --rep-by lstm, or drop it by a higher tolerance"
        )
    return model.eval(), config, off[0]


def _describe(state: Mapping[str, Any], source: str, base_model: str | None, rep_by: str) -> tuple[FarConfig, bool]:
    """The configuration that the weights' shapes tell, and whether they are laid out head by head."""
    config = infer(state, source, base_model)
    blocks = {i: parts for i, parts in blocks_of(state).items() if "qkv.weight" not in parts}
    if not blocks:
        raise FarError(f"{source}: no block of it is replaced; a teacher's weights go to --base-weight as they are")
    units = {str(i): sizes for i, parts in blocks.items() if (sizes := units_of(parts))}
    config = replace(config, rep_by=rep_by, replaced=tuple(blocks), units=units)
    if damage := find_damage(config):
        raise FarError(f"{source}: weights of another model ({damage}); name the one they belong to")
    return config, any(name.startswith("lstms.") for parts in blocks.values() for name in parts)


def _largest(left: Mapping[str, Tensor], prefix: str) -> tuple[float, str]:
    """The largest size in tensors, and its place."""
    name = max(left, key=lambda name: left[name].abs().max())
    sizes = left[name].abs()
    place = [i.item() for i in torch.unravel_index(sizes.argmax(), sizes.shape)]
    return sizes.max().item(), f"{prefix}{name}{place}"
