"""Teachers by name, and their weights. DeiT-Micro is a small one of ours, for the digits."""

import logging
import math
import re
from functools import partial
from pathlib import Path

import torch
from timm.layers import resample_abs_pos_embed
from timm.models import create_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from models.vit import Teacher, adopt, prefix_positions, timm_teacher
from utils.checkpoint import FLOATS, check_dense, load, load_into, weights_of, whole
from utils.configs import ModelName
from utils.errors import FarError
from utils.preprocessing import Preprocessing

log = logging.getLogger(__name__)


def _micro(img_size: int = 32, **kwargs) -> VisionTransformer:
    model = VisionTransformer(img_size=img_size, patch_size=4, embed_dim=64, depth=4, num_heads=2, **kwargs)
    # Learned positions that start as 2-D sines and cosines (MAE, arXiv 2111.06377): a patch of DIGITS is about one
    # pixel, and from random positions the teacher needs several times the epochs to find out which pixel it is.
    with torch.no_grad():
        model.pos_embed[0, 1:] = sincos_2d(*model.patch_embed.grid_size, model.embed_dim)
    return model


def sincos_2d(rows: int, columns: int, dim: int) -> torch.Tensor:
    """Fixed position codes (rows * columns, dim); dim divisible by 4."""
    frequency = 10000.0 ** (-torch.arange(dim // 4) / (dim // 4))
    y, x = torch.meshgrid(torch.arange(rows).float(), torch.arange(columns).float(), indexing="ij")
    angles = [p.reshape(-1, 1) * frequency for p in (y, x)]
    return torch.cat([wave(a) for a in angles for wave in (torch.sin, torch.cos)], dim=1)


def _deit(scale: str) -> Teacher:
    """Its crop is that of DeiT's own evaluation and the published code's, not timm's 0.9."""
    name = f"deit_{scale}_patch16_224"
    return Teacher(partial(create_model, name), architecture=name, preprocessing=Preprocessing(crop_pct=0.875))


# What --base-model names in short; a new one is a line here and its name in utils.names.
TEACHERS = {
    "DeiT-Tiny": _deit("tiny"),
    "DeiT-Small": _deit("small"),
    "DeiT-Base": _deit("base"),
    "DeiT-Micro": Teacher(_micro, 32, 4, published=False, architecture="deit_micro_patch4_32"),
}
LARGEST_INPUT = 4096


def find_teacher(base_model: str) -> Teacher:
    """By its short name or timm's. Raises FarError, the name first, where there is none or it cannot be a teacher."""
    return TEACHERS.get(base_model) or timm_teacher(base_model)


def named_teacher(config: ModelName) -> Teacher:
    """What --base-model or --scale names, else DeiT-Tiny. Raises FarError naming the flag."""
    try:
        return find_teacher(config.name)
    except FarError as error:
        raise FarError(f"--base-model {error}") from error


def fits_patches(base_model: str, img_size) -> bool:
    """Whether images of this size are cut into whole patches, or are what the model was made for."""
    teacher = find_teacher(base_model)
    fits = whole(img_size, 1, LARGEST_INPUT) and img_size % teacher.patch_size == 0
    return fits or type(img_size) is int and img_size == teacher.input_size


def check_size(base_model: str, img_size: int) -> None:
    """Raises FarError where a model cannot take images of this size."""
    if not fits_patches(base_model, img_size):
        patch = find_teacher(base_model).patch_size
        raise FarError(
            f"--input-size {img_size}: {base_model} needs a multiple of its patch size, {patch}, up to {LARGEST_INPUT}"
        )


def create_teacher(base_model: str, num_classes: int, img_size: int, drop: float = 0.0, drop_path: float = 0.0):
    """A teacher with fresh weights: images (B, 3, img_size, img_size) to logits (B, num_classes)."""
    check_size(base_model, img_size)
    build = find_teacher(base_model).build
    return adopt(build(num_classes=num_classes, img_size=img_size, drop_rate=drop, drop_path_rate=drop_path))


def teacher_state(content: dict, source: str) -> dict[str, Tensor]:
    """A vision transformer's weights by timm's names, whatever script wrapped them. Raises FarError on others."""
    state = weights_of(content)
    if "pos_embed" not in state:
        raise FarError(f"{source}: holds no vision transformer's weights; give timm's or DeiT's layout")
    if any(".post_proj." in name for name in state):
        raise FarError(f"{source}: is a FAR model, not a teacher; give it as --far-weight or --attn-weight")
    for name, value in state.items():
        check_dense(value, FLOATS, name, source)
    return {re.sub(r"\.gamma_([12])$", r".ls\1.gamma", name): value for name, value in state.items()}  # DeiT-III's own


def resize_positions(state: dict[str, Tensor], model: VisionTransformer, source: str) -> dict[str, Tensor]:
    """The weights with their position embeddings (1, prefix + n * n, D) interpolated to the model's grid, by timm."""
    own, positions, prefix = model.pos_embed, state["pos_embed"], prefix_positions(model)
    if ("dist_token" in state) > hasattr(model, "dist_token"):
        raise FarError(f"{source}: is a distilled DeiT; name it, as --base-model deit_tiny_distilled_patch16_224")
    if positions.shape == own.shape:
        return state
    side = math.isqrt(max(0, positions.shape[1] - prefix)) if positions.ndim == 3 else 0
    largest = LARGEST_INPUT // model.patch_embed.patch_size[0]
    if positions.shape != (1, prefix + side**2, own.shape[2]) or not whole(side, 1, largest):
        raise FarError(
            f"{source}: pos_embed has shape {tuple(positions.shape)}, this model needs "
            f"(1, {prefix} + n * n, {own.shape[2]}); name the model the weights belong to"
        )
    grid = list(model.patch_embed.grid_size)
    return {**state, "pos_embed": resample_abs_pos_embed(positions, grid, num_prefix_tokens=prefix)}


def load_teacher_weights(
    model: VisionTransformer, path: str | Path, flag: str = "--base-weight", keep_head: bool = True
) -> None:
    """Loads timm's or DeiT's layout (.pth or .safetensors); position embeddings are resized by timm.

    keep_head: whether the file's classifier is wanted, which must then fit; else the model's own stays.
    """
    source = f"{flag} {path}".strip()
    state = resize_positions(teacher_state(load(path, flag), source), model, source)
    head = state.get("head.weight")
    if not keep_head:
        state = {**state, **{k: v for k, v in model.state_dict().items() if k.startswith(("head.", "head_dist."))}}
    elif head is None or head.ndim == 2 and len(head) != model.num_classes:
        raise FarError(
            f"{source}: its classifier has {0 if head is None else len(head)} classes, --dataset needs "
            f"{model.num_classes}; train a teacher on this data first with --mode teacher"
        )
    load_into(model, state, source)


def count_answers(content: dict, source: str) -> int:
    """The classes that a teacher's weights know; 0 where they hold no classifier."""
    head = teacher_state(content, source).get("head.weight")
    return 0 if head is None or not head.dim() else len(head)


def load_published_weights(model: VisionTransformer, base_model: str) -> None:
    """timm's pretrained weights by name, from its cache or the network; one clear error where neither has them."""
    teacher = find_teacher(base_model)
    if not teacher.published:
        raise FarError(
            f"--base-weight: {base_model} has no published weights; train one with --mode teacher, then name it"
        )
    if not teacher.classes:
        raise FarError(
            f"--base-weight: the published {base_model} has no classifier; give it one with --mode teacher "
            "--base-weight FILE, on your data, and name its best.pth"
        )
    if model.num_classes != teacher.classes:
        raise FarError(
            f"--base-weight: the published {base_model} knows {teacher.classes} classes, --dataset has "
            f"{model.num_classes}; "
            "train a teacher on it with --mode teacher and name its best.pth"
        )
    log.warning("fetching timm's weights of %s, once; without a network it takes a minute to give up", base_model)
    # It tells each of its retries; the error below tells the end.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        published = teacher.build(pretrained=True)
    except Exception as error:  # noqa: BLE001  (the hub's client raises a dozen unrelated types; each means the same here)
        raise FarError(
            f"--base-weight: no weights for {base_model}: none given and timm's could not be downloaded "
            f"({type(error).__name__}); give a local file with --base-weight FILE"
        ) from error
    source = f"timm's {base_model}"
    load_into(model, resize_positions(published.state_dict(), model, source), source)
