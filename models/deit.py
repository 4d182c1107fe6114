"""Teachers: timm's DeiT, and DeiT-Micro, a small one of ours for the digits."""

import logging
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from timm.layers import resample_abs_pos_embed, to_2tuple
from timm.models import build_model_with_cfg
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor

from models.parts import Mlp
from utils.checkpoint import FLOATS, check_dense, load, load_into, weights_of, whole
from utils.errors import FarError


class DeiT(VisionTransformer):
    """timm's, which asks its blocks before it takes another image size."""

    def set_input_size(self, img_size=None, patch_size=None) -> None:
        """timm's: positions are resized. Raises FarError where a block is tied to its number of tokens."""
        own = self.patch_embed
        size, patch = to_2tuple(img_size or own.img_size), to_2tuple(patch_size or own.patch_size)
        tokens = self.num_prefix_tokens + math.prod(side // cut for side, cut in zip(size, patch, strict=True))
        for block in self.blocks:
            if check := getattr(block.attn, "check_tokens", None):
                check(tokens)
        super().set_input_size(img_size, patch_size)


def _micro(img_size: int = 32, **kwargs) -> VisionTransformer:
    model = DeiT(img_size=img_size, patch_size=4, embed_dim=64, depth=4, num_heads=2, **kwargs)
    # Learned positions that start as 2-D sines and cosines (MAE, arXiv 2111.06377): a patch of DIGITS is about one
    # pixel, and from random positions the teacher needs several times the epochs to find out which pixel it is.
    with torch.no_grad():
        model.pos_embed[0, 1:] = sincos_2d(*model.patch_embed.grid_size, model.embed_dim)
    return model


def create_deit(kind: type[DeiT], name: str, width: int, pretrained: bool = False, **kwargs) -> VisionTransformer:
    """timm's DeiT of this width as a class of ours; name: what timm's registry has its configuration under."""
    return build_model_with_cfg(
        kind,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **{"patch_size": 16, "embed_dim": width, "depth": 12, "num_heads": width // 64, **kwargs},
    )


def sincos_2d(rows: int, columns: int, dim: int) -> torch.Tensor:
    """Fixed position codes (rows * columns, dim); dim divisible by 4."""
    frequency = 10000.0 ** (-torch.arange(dim // 4) / (dim // 4))
    y, x = torch.meshgrid(torch.arange(rows).float(), torch.arange(columns).float(), indexing="ij")
    angles = [p.reshape(-1, 1) * frequency for p in (y, x)]
    return torch.cat([wave(a) for a in angles for wave in (torch.sin, torch.cos)], dim=1)


class Teacher(NamedTuple):
    """build: of timm's arguments (num_classes, img_size, ...); input_size, patch_size: in pixels, by default.

    published: whether timm has weights, which `build(pretrained=True)` fetches.
    """

    build: Callable[..., VisionTransformer]
    input_size: int = 224
    patch_size: int = 16
    published: bool = True


# What --base-model names; a new one is a line here and its name in utils.names.
TEACHERS = {
    "DeiT-Tiny": Teacher(partial(create_deit, DeiT, "deit_tiny_patch16_224", 192)),
    "DeiT-Small": Teacher(partial(create_deit, DeiT, "deit_small_patch16_224", 384)),
    "DeiT-Base": Teacher(partial(create_deit, DeiT, "deit_base_patch16_224", 768)),
    "DeiT-Micro": Teacher(_micro, 32, 4, published=False),
}
LARGEST_INPUT = 4096


def fits_patches(base_model: str, img_size) -> bool:
    """Whether images of this size are cut into whole patches."""
    return whole(img_size, 1, LARGEST_INPUT) and img_size % TEACHERS[base_model].patch_size == 0


def check_size(base_model: str, img_size: int) -> None:
    """Raises FarError where a model cannot take images of this size."""
    if not fits_patches(base_model, img_size):
        patch = TEACHERS[base_model].patch_size
        raise FarError(
            f"--input-size {img_size}: {base_model} needs a multiple of its patch size, {patch}, up to {LARGEST_INPUT}"
        )


def create_teacher(base_model: str, num_classes: int, img_size: int, drop: float = 0.0, drop_path: float = 0.0):
    """A DeiT with fresh weights: images (B, 3, img_size, img_size) to logits (B, num_classes)."""
    check_size(base_model, img_size)
    return TEACHERS[base_model].build(
        num_classes=num_classes, img_size=img_size, drop_rate=drop, drop_path_rate=drop_path, mlp_layer=Mlp
    )


def teacher_state(content: dict, source: str) -> dict[str, Tensor]:
    """A vision transformer's weights by timm's names, whatever script wrapped them. Raises FarError on others."""
    state = weights_of(content)
    if "pos_embed" not in state:
        raise FarError(f"{source}: holds no vision transformer's weights; give timm's or DeiT's layout")
    if any(".post_proj." in name for name in state):
        raise FarError(f"{source}: is a FAR model, not a teacher; give it as --far-weight or --attn-weight")
    if "dist_token" in state:
        raise FarError(f"{source}: is a distilled DeiT (holds dist_token), unknown here; give the plain DeiT's weights")
    for name, value in state.items():
        check_dense(value, FLOATS, name, source)
    return state


def resize_positions(state: dict[str, Tensor], model: VisionTransformer, source: str) -> dict[str, Tensor]:
    """The weights with their position embeddings (1, 1 + n * n, D) interpolated to the model's grid, by timm."""
    own, positions = model.pos_embed, state["pos_embed"]
    if positions.shape == own.shape:
        return state
    side = math.isqrt(max(0, positions.shape[1] - 1)) if positions.ndim == 3 else 0
    largest = LARGEST_INPUT // model.patch_embed.patch_size[0]
    if positions.shape != (1, 1 + side**2, own.shape[2]) or not whole(side, 1, largest):
        raise FarError(
            f"{source}: pos_embed has shape {tuple(positions.shape)}, this model needs (1, 1 + n * n, {own.shape[2]}); "
            "name the model the weights belong to"
        )
    return {**state, "pos_embed": resample_abs_pos_embed(positions, list(model.patch_embed.grid_size))}


def load_teacher_weights(model: VisionTransformer, path: str | Path, flag: str = "--base-weight", head: bool = True):
    """Loads timm's or DeiT's layout (.pth or .safetensors); position embeddings are resized by timm.

    With `head=False` a classifier of another class count stays fresh (returns False then); else it is an error.
    """
    source = f"{flag} {path}".strip()
    state = resize_positions(teacher_state(load(path, flag), source), model, source)
    found = state.get("head.weight")
    fits = found is not None and (found.ndim != 2 or len(found) == model.num_classes)
    if not fits and not head:
        state = {**state, **{k: v for k, v in model.state_dict().items() if k.startswith("head.")}}
    elif not fits:
        raise FarError(
            f"{source}: its classifier has {0 if found is None else len(found)} classes, --dataset needs "
            f"{model.num_classes}; train a teacher on this data first with --mode teacher"
        )
    load_into(model, state, source)
    return fits


def count_answers(path: str | Path | None, flag: str = "--base-weight") -> int:
    """The classes that a file of teacher weights knows; without a file, those of timm's."""
    if path is None:
        return 1000
    head = teacher_state(load(path, flag), f"{flag} {path}").get("head.weight")
    if head is None or head.ndim != 2:
        raise FarError(f"{flag} {path}: holds no classifier; give a teacher's weights with one")
    return len(head)


def load_published_weights(model: VisionTransformer, base_model: str) -> None:
    """timm's pretrained weights by name, from its cache or the network; one clear error where neither has them."""
    if not TEACHERS[base_model].published:
        raise FarError(
            f"--base-weight: {base_model} has no published weights; train one with --mode teacher, then name it"
        )
    if model.num_classes != 1000:
        raise FarError(
            f"--base-weight: the published {base_model} knows 1000 classes, --dataset has {model.num_classes}; "
            "train a teacher on it with --mode teacher and name its best.pth"
        )
    # It tells each of its retries; the error below tells the end.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        published = TEACHERS[base_model].build(pretrained=True)
    except Exception as error:  # noqa: BLE001  (the hub's client raises a dozen unrelated types; each means the same here)
        raise FarError(
            f"--base-weight: no weights for {base_model}: none given and timm's could not be downloaded "
            f"({type(error).__name__}); give a local file with --base-weight FILE"
        ) from error
    source = f"timm's {base_model}"
    load_into(model, resize_positions(published.state_dict(), model, source), source)
