"""Teachers by name, and their weights. DeiT-Micro is a small one of ours, for the digits."""

import logging
import math
from functools import partial

import torch
from timm.layers import resample_abs_pos_embed
from timm.models import create_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from models.vit import Teacher, adapt_mlps, prefix_positions, timm_teacher
from utils.checkpoint import load_into
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
    """timm's DeiT with the crop of DeiT's own evaluation and of the published code, 0.875; timm's is 0.9."""
    name = f"deit_{scale}_patch16_224"
    return Teacher(partial(create_model, name), architecture=name, preprocessing=Preprocessing(crop_pct=0.875))


# Short names of --base-model; a new one is a line here and its name in utils.names.
TEACHERS = {
    "DeiT-Tiny": _deit("tiny"),
    "DeiT-Small": _deit("small"),
    "DeiT-Base": _deit("base"),
    "DeiT-Micro": Teacher(_micro, 32, 4, published=False, architecture="deit_micro_patch4_32"),
}
LARGEST_INPUT = 4096


def find_teacher(base_model: str) -> Teacher:
    """The teacher of a short name or timm's. Raises FarError where there is no such model or it cannot be a teacher."""
    return TEACHERS.get(base_model) or timm_teacher(base_model)


def named_teacher(config: ModelName) -> Teacher:
    """What --base-model or --scale names, else DeiT-Tiny. Raises FarError naming the flag."""
    try:
        return find_teacher(config.name)
    except FarError as error:
        raise FarError(f"--base-model {error}") from error


def fits_patches(base_model: str, img_size: int) -> bool:
    """True if images of this side are cut into whole patches, or are what the model was made for."""
    teacher = find_teacher(base_model)
    return img_size == teacher.input_size or 0 < img_size <= LARGEST_INPUT and img_size % teacher.patch_size == 0


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
    return adapt_mlps(build(num_classes=num_classes, img_size=img_size, drop_rate=drop, drop_path_rate=drop_path))


def resize_positions(state: dict[str, Tensor], model: VisionTransformer, source: str) -> dict[str, Tensor]:
    """The state dict with its position embeddings (1, prefix + n * n, D) interpolated to the model's grid, by timm."""
    positions, prefix, dim = state["pos_embed"], prefix_positions(model), model.embed_dim
    if "dist_token" in state and not hasattr(model, "dist_token"):
        raise FarError(f"{source}: is a distilled DeiT; name it, as --base-model deit_tiny_distilled_patch16_224")
    if positions.shape == model.pos_embed.shape:
        return state
    side = math.isqrt(max(0, positions.shape[1] - prefix)) if positions.ndim == 3 else 0
    if not side or positions.shape != (1, prefix + side**2, dim):
        raise FarError(
            f"{source}: pos_embed has shape {tuple(positions.shape)}, this model needs "
            f"(1, {prefix} + n * n, {dim}); name the model the weights belong to"
        )
    grid = list(model.patch_embed.grid_size)
    return {**state, "pos_embed": resample_abs_pos_embed(positions, grid, num_prefix_tokens=prefix)}


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
    # It logs each of its retries; the error below is enough.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        published = teacher.build(pretrained=True)
    except Exception as error:  # noqa: BLE001  (the hub's client raises a dozen unrelated types; each means the same)
        raise FarError(
            f"--base-weight: no weights for {base_model}: none given and timm's could not be downloaded "
            f"({type(error).__name__}); give a local file with --base-weight FILE"
        ) from error
    source = f"timm's {base_model}"
    load_into(model, resize_positions(published.state_dict(), model, source), source)
