"""Teachers: timm's DeiT, and DeiT-Micro, a small one of ours for the digits."""

import logging
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

from utils.checkpoint import load, load_into
from utils.errors import FarError


def _micro(img_size: int = 32, **kwargs) -> VisionTransformer:
    model = VisionTransformer(img_size=img_size, patch_size=4, embed_dim=64, depth=4, num_heads=2, **kwargs)
    # Learned positions that start as 2-D sines and cosines (MAE, arXiv 2111.06377): a patch of DIGITS is about one
    # pixel, and from random positions the teacher needs several times the epochs to find out which pixel it is.
    with torch.no_grad():
        model.pos_embed[0, 1:] = sincos_2d(*model.patch_embed.grid_size, model.embed_dim)
    return model


def _timm(name: str) -> Callable[..., VisionTransformer]:
    def build(**kwargs) -> VisionTransformer:
        return timm.create_model(name, **kwargs)

    return build


def sincos_2d(rows: int, columns: int, dim: int) -> torch.Tensor:
    """Fixed position codes (rows * columns, dim); dim divisible by 4."""
    frequency = 10000.0 ** (-torch.arange(dim // 4) / (dim // 4))
    y, x = torch.meshgrid(torch.arange(rows).float(), torch.arange(columns).float(), indexing="ij")
    angles = [p.reshape(-1, 1) * frequency for p in (y, x)]
    return torch.cat([wave(a) for a in angles for wave in (torch.sin, torch.cos)], dim=1)


TEACHERS: dict[str, Callable[..., VisionTransformer]] = {
    "DeiT-Tiny": _timm("deit_tiny_patch16_224"),
    "DeiT-Small": _timm("deit_small_patch16_224"),
    "DeiT-Base": _timm("deit_base_patch16_224"),
    "DeiT-Micro": _micro,
}
SCALES = {name.removeprefix("DeiT-"): name for name in TEACHERS}
PUBLISHED = {name for name in TEACHERS if name != "DeiT-Micro"}
INPUT_SIZE = {name: 32 if name == "DeiT-Micro" else 224 for name in TEACHERS}


def create_teacher(base_model: str, num_classes: int, img_size: int, drop: float = 0.0, drop_path: float = 0.0):
    """A DeiT with fresh weights: images (B, 3, img_size, img_size) to logits (B, num_classes)."""
    try:
        return TEACHERS[base_model](
            num_classes=num_classes, img_size=img_size, drop_rate=drop, drop_path_rate=drop_path
        )
    except AssertionError as error:
        raise FarError(f"--input-size {img_size}: {base_model} needs a multiple of its patch size") from error


def load_teacher_weights(model: VisionTransformer, path: str | Path, flag: str = "--base-weight", head: bool = True):
    """Loads timm's or DeiT's layout (.pth or .safetensors); position embeddings are resized by timm.

    With `head=False` a classifier of another class count stays fresh (returns False then); else it is an error.
    """
    content = load(path, flag)
    state = content.get("model", content.get("state_dict", content))
    if not all(isinstance(v, torch.Tensor) for v in state.values()) or "pos_embed" not in state:
        raise FarError(f"{flag} {path}: holds no vision transformer's weights; give timm's or DeiT's layout")
    if any(".post_proj." in key for key in state):
        raise FarError(f"{flag} {path}: is a FAR model, not a teacher; give it as --far-weight or --attn-weight")
    if "patch_embed.proj.weight" in state and state["patch_embed.proj.weight"].shape == model.patch_embed.proj.weight.shape:
        # timm would also reshape a patch embedding of another width, silently: only positions may be resized here.
        state = checkpoint_filter_fn(state, model)
    classes = state["head.weight"].shape[0] if "head.weight" in state else None
    fits = classes == model.num_classes
    if not fits and not head:
        state = {**state, **{k: v for k, v in model.state_dict().items() if k.startswith("head.")}}
    elif not fits:
        raise FarError(
            f"{flag} {path}: its classifier has {classes} classes, --dataset needs {model.num_classes}; "
            "train a teacher on this data first with --mode teacher"
        )
    load_into(model, state, f"{flag} {path}")
    return fits


def load_published_weights(model: VisionTransformer, base_model: str) -> None:
    """timm's pretrained weights by name, from its cache or the network; one clear error where neither has them."""
    if base_model not in PUBLISHED:
        raise FarError(f"--base-weight: {base_model} has no published weights; train one with --mode teacher, then name it")
    if model.num_classes != 1000:
        raise FarError(
            f"--base-weight: the published {base_model} knows 1000 classes, --dataset has {model.num_classes}; "
            "train a teacher on it with --mode teacher and name its best.pth"
        )
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells each of its retries; the error below tells the end
    try:
        published = TEACHERS[base_model](pretrained=True)
    except Exception as error:  # noqa: BLE001  (the hub's client raises a dozen unrelated types; each means the same here)
        raise FarError(
            f"--base-weight: no weights for {base_model}: none given and timm's could not be downloaded "
            f"({type(error).__name__}); give a local file with --base-weight FILE"
        ) from error
    load_into(model, checkpoint_filter_fn(published.state_dict(), model), f"timm's {base_model}")
