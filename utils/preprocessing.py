"""How a picture becomes a model's input: plain data, in timm's terms, that travels with the weights."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform

CROPS, INTERPOLATIONS = ("center", "squash"), ("bicubic", "bilinear")
STRIP = 8
Colour = tuple[float, float, float]  # red, green, blue, of values 0 to 1


def cut_strip(image: Image.Image) -> Image.Image:
    """The middle of an image more than STRIP times as long as wide; others as they are.

    A centre crop shows no more of it, and resized whole, a strip of few pixels may take gigabytes.
    """
    (w, h), most = image.size, STRIP * min(image.size)
    if max(w, h) <= most:
        return image
    left, top = (max(0, side - most) // 2 for side in (w, h))
    return image.crop((left, top, left + min(w, most), top + min(h, most)))


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
        try:
            read = cls(**stored)
            mean, std = tuple(map(float, read.mean)), tuple(map(float, read.std))
            right = len(mean) == len(std) == 3 and all(map(math.isfinite, mean + std)) and min(std) > 0
            right = right and 0.1 <= read.crop_pct <= 1
        except TypeError:  # other keys, or values of other types
            right = False
        if not right or read.crop_mode not in CROPS or read.interpolation not in INTERPOLATIONS:
            raise ValueError(
                "preprocessing: mean and std must be three numbers each, those of std above 0, crop_pct from 0.1 to 1, "
                f"crop_mode {' or '.join(CROPS)}, interpolation {' or '.join(INTERPOLATIONS)}, and nothing else"
            )
        return replace(read, mean=mean, std=std)
