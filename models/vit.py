"""timm's VisionTransformers as teachers: which ones can be one, by name, and what replacing attention needs of them."""

import difflib
import functools
import re
from collections.abc import Callable
from typing import NamedTuple

import timm.layers
import torch
from timm.layers import PatchEmbed
from timm.layers.attention import Attention
from timm.models import create_model, get_deprecated_models, get_pretrained_cfg, is_model, list_models, model_entrypoint
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from models.parts import Mlp
from utils.errors import FarError
from utils.preprocessing import Preprocessing

NAME = re.compile(r"([a-z0-9_]{1,80})(\.[a-z0-9_]{1,80})?")  # an architecture, and a tag of its weights


# A distilled DeiT has two prefix tokens with a classifier each; its logits are the mean of both, unless it trains with
# `set_distilled_training`.
KINDS = (VisionTransformer, VisionTransformerDistilled)


class Teacher(NamedTuple):
    """An attention model that can be replaced.

    Args:
        build: makes it from timm's arguments (num_classes, img_size, ...).
        input_size: its default image side in pixels.
        patch_size: in pixels.
        published: True if timm has weights, which `build(pretrained=True)` downloads.
        classes: of those weights; 0 without a classifier.
        architecture: timm's name of it.
        preprocessing: how its weights expect images; None leaves that to the data set.
    """

    build: Callable[..., VisionTransformer]
    input_size: int = 224
    patch_size: int = 16
    published: bool = True
    classes: int = 1000
    architecture: str = ""
    preprocessing: Preprocessing | None = None


def is_vit(architecture: str) -> bool:
    """True if timm's entry point is annotated to return one of KINDS."""
    return model_entrypoint(architecture).__annotations__.get("return") in KINDS


def find_fault(model: nn.Module) -> str:
    """Why attention cannot be replaced in a model; empty if it can."""
    if type(model) not in KINDS:
        return f"is a {type(model).__name__}, no plain VisionTransformer"
    if type(model.patch_embed) is not PatchEmbed:
        return f"is a hybrid, its patches come from a {type(model.patch_embed).__name__}"
    for block in model.blocks:
        if type(block) is not Block:
            return f"has a {type(block).__name__} for a block, in which attention does not stand alone"
        if type(block.attn) is not Attention:
            return f"has {type(block.attn).__name__}, not plain Attention"
    return ""


@functools.cache
def timm_teacher(name: str) -> Teacher:
    """The teacher of a timm name, with or without a tag of its weights. Raises FarError where it cannot be one."""
    match = NAME.fullmatch(name)
    if not match or not is_model(match[1]):
        near = difflib.get_close_matches(name, [known for known in list_models() if is_vit(known)], 3)
        mend = f"did you mean {' or '.join(near)}" if near else "name a vit_*, deit_* or deit3_* of timm.list_models()"
        raise FarError(f"{name:.80}: timm has no such model; {mend}")
    mend = "name a plain vit_*, deit_* or deit3_* of timm's"
    if newer := get_deprecated_models().get(match[1]):
        raise FarError(f"{name}: timm has renamed it; name {newer}")
    try:
        known = get_pretrained_cfg(name)
    except RuntimeError as error:  # timm's, on an unknown tag
        raise FarError(f"{name}: timm has no such weights of {match[1]}; leave {match[2]} out") from error
    if not is_vit(match[1]):
        make = model_entrypoint(match[1])
        kind = getattr(make.__annotations__.get("return"), "__name__", make.__module__.rpartition(".")[2])
        raise FarError(f"{name}: is a {kind}, no VisionTransformer whose attention could be replaced; {mend}")
    with torch.device("meta"):
        model = create_model(name)
    if fault := find_fault(model):
        raise FarError(f"{name}: {fault}; {mend}")
    return Teacher(
        functools.partial(create_model, name),
        known.input_size[-1],
        model.patch_embed.patch_size[0],
        bool(known.has_weights),
        known.num_classes,
        match[1],
        Preprocessing(known.mean, known.std, known.crop_pct, known.crop_mode, known.interpolation),
    )


def adapt_mlps(model: VisionTransformer) -> VisionTransformer:
    """Makes the plain MLPs of timm's model prunable, in place."""
    for block in model.blocks:
        mlp = block.mlp
        if type(mlp) is timm.layers.Mlp and type(mlp.norm) is nn.Identity and mlp.fc1.bias is not None:
            mlp.__class__, mlp.full_sizes = Mlp, mlp.fc1.out_features
    return model


def prefix_positions(model: VisionTransformer) -> int:
    """The number of position embeddings that belong to prefix tokens."""
    return 0 if model.no_embed_class else model.num_prefix_tokens


def classifiers(model: VisionTransformer) -> list[nn.Module]:
    """The classifier; a distilled DeiT has two."""
    heads = model.get_classifier()
    return list(heads) if isinstance(heads, tuple) else [heads]
