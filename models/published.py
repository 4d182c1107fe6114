"""State dicts of the published code (arXiv 2505.21535), to FAR models and back; `models.bilstm` has their layouts."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from models.infer import blocks_of, infer, units_of
from models.replace import FarConfig, build_on_meta, mlps, replacements
from models.weights import Weights
from utils.checkpoint import check_state
from utils.errors import FarError


@torch.no_grad()
def to_published(model: VisionTransformer, per_head: bool = False) -> dict[str, Tensor]:
    """The state dict of a FAR model in the published code's layout; removed units, of MLPs too, come back as zeros.

    per_head: one nn.LSTM a head, not a dense one. Raises FarError where that code has no such replacement.
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
    weights: Weights, base_model: str | None = None, rep_by: str = "multi-lstm", tolerance: float = 0
) -> tuple[VisionTransformer, FarConfig, float]:
    """The FAR model of a published state dict, dense or per head.

    Args:
        weights: of the published code.
        base_model: the model they belong to; None: told by their shapes.
        rep_by: `lstm` reads a dense LSTM as one head.
        tolerance: the largest magnitude off the heads' blocks that is dropped.

    Returns:
        The model in eval mode, its configuration, and the largest magnitude that was dropped.

    Raises:
        FarError: weights of another model, or values off the heads' blocks above the tolerance.
    """
    state, source = weights.state, weights.source
    if weights.config:
        raise FarError(
            f"{source}: is a FAR checkpoint already; give it as --far-weight to take it to the published form"
        )
    config, blocks = infer(state, source, base_model), blocks_of(state)
    replaced = [i for i, parts in blocks.items() if "qkv.weight" not in parts]
    if not replaced:
        raise FarError(f"{source}: no block of it is replaced; a teacher's weights go to --base-weight as they are")
    units = {str(i): sizes for i in replaced if (sizes := units_of(blocks[i]))}
    config = replace(config, rep_by=rep_by, replaced=tuple(replaced), units=units)
    per_head = any(name.startswith("lstms.") for i in replaced for name in blocks[i])
    model = build_on_meta(config, source)
    check_state(to_published(model, per_head), state, source)
    model.to_empty(device="cpu")
    for name, value in model.state_dict().items():
        if name in state:
            value.copy_(state[name])
    largest, place = 0.0, ""
    for i, attn in replacements(model).items():
        for name, dropped in attn.take_published(blocks[i], per_head).items():
            sizes = dropped.abs()
            if (most := sizes.max().item()) > largest:
                index = [int(k) for k in torch.unravel_index(sizes.argmax(), sizes.shape)]
                largest, place = most, f"blocks.{i}.attn.{name}{index}"
    if largest > tolerance:
        raise FarError(
            f"{source}: {place} is {largest:.3g}, off the heads' blocks and above --tolerance {tolerance:g}: its heads "
            "are joined; read it as one head, --rep-by lstm, or drop it by a higher tolerance"
        )
    return model.eval(), config, largest
