"""How a picture becomes a model's input: plain data, in timm's terms, that travels with the weights."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform

CROPS, INTERPOLATIONS = ("center", "squash"), ("bicubic", "bilinear")
STRIP = 8
Colour = tuple[float, float, float]  # red, green, blue, of values 0 to 1


def cut_strip(image: Image.Image) -> Image.Image:
    """The middle of a picture that is more than STRIP times as long as wide, others as they are.

    A centre crop shows no more of it, and resized whole, a strip of few pixels may take gigabytes.
    """
    (w, h), most = image.size, STRIP * min(image.size)
    if max(w, h) <= most:
        return image
    left, top = (max(0, side - most) // 2 for side in (w, h))
    return image.crop((left, top, left + min(w, most), top + min(h, most)))


def _three(value: Any) -> bool:
    right = isinstance(value, list | tuple) and len(value) == 3 and all(type(v) in (int, float) for v in value)
    return right and all(map(math.isfinite, value))


@dataclass(frozen=True)
class Preprocessing:
    """timm's data configuration, but for the size, which is the model's.

    crop_mode: `center` resizes the shorter side to size / crop_pct and crops; `squash` resizes both sides to that.
    """

    mean: Colour = IMAGENET_DEFAULT_MEAN
    std: Colour = IMAGENET_DEFAULT_STD
    crop_pct: float = 0.875
    crop_mode: str = "center"
    interpolation: str = "bicubic"

    def transform(self, size: int):
        """From a PIL image to (3, size, size)."""
        transform = create_transform(size, is_training=False, **asdict(self))
        if self.crop_mode == "center":
            transform.transforms.insert(0, cut_strip)
        return transform

    @classmethod
    def read(cls, stored: Any) -> "Preprocessing":
        """From a file's plain data. Raises ValueError where it is none."""
        known = {field.name for field in fields(cls)}
        if not isinstance(stored, Mapping) or not set(stored) <= known:
            raise ValueError(f"must be a dictionary of {', '.join(sorted(known))}")
        found = cls(**stored)
        if not (_three(found.mean) and _three(found.std) and min(found.std) > 0):
            raise ValueError("mean and std must be three numbers each, those of std above 0")
        if type(found.crop_pct) not in (int, float) or not 0.1 <= found.crop_pct <= 1:
            raise ValueError("crop_pct must be a number from 0.1 to 1")
        if found.crop_mode not in CROPS or found.interpolation not in INTERPOLATIONS:
            raise ValueError(f"crop_mode is one of {CROPS}, interpolation of {INTERPOLATIONS}")
        return cls(tuple(found.mean), tuple(found.std), *(getattr(found, f.name) for f in fields(cls)[2:]))
