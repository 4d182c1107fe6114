"""A FAR checkpoint as timm's users know a model: what torch.hub loads (hubconf.py)."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from timm.models.vision_transformer import VisionTransformer

from models.replace import load_model, resize
from utils.files import expanded
from utils.preprocessing import Preprocessing


def data_config(model: VisionTransformer, preprocessing: Preprocessing | None = None) -> dict[str, Any]:
    """timm's configuration of a model's data, at its image size; label_names: its classes, where they are known."""
    known = {**getattr(model, "pretrained_cfg", {}), **(asdict(preprocessing) if preprocessing else {})}
    if len(known.get("label_names") or ()) != model.num_classes:
        known.pop("label_names", None)  # of another classifier
    return {**known, "input_size": (3, *model.patch_embed.img_size), "num_classes": model.num_classes}


def load(
    checkpoint: str | Path, input_size: int | None = None, num_classes: int | None = None, drop_path: float = 0.0
) -> VisionTransformer:
    """The model of a FAR checkpoint in eval mode, as a timm VisionTransformer.

    input_size: image side in pixels, positions resized. num_classes: with a fresh classifier where it differs. Raises
    FarError on a file or a size that does not serve.
    """
    model, config = load_model(expanded(checkpoint), drop_path=drop_path)
    if input_size is not None:
        resize(model, config, input_size, str(checkpoint))
    if num_classes is not None and num_classes != model.num_classes:
        model.reset_classifier(num_classes)
    model.pretrained_cfg = {**getattr(model, "pretrained_cfg", {}), "label_names": config.classes}
    model.pretrained_cfg = model.default_cfg = data_config(model, config.expected_preprocessing or Preprocessing())
    return model
