"""Reading one image file: always 8-bit RGB, or one line that names the file."""

import stat
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from utils.errors import FarError

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff"}
TOP = {"I": 65535.0, "F": 1.0}  # white, by PIL's mode before any ";": integers are 16-bit greys, floats 0 to 1


def shown(name: object) -> str:
    """A path or flag value for a message: odd bytes and line breaks escaped, all else as it is."""
    return repr(str(name))[1:-1]


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB. PIL alone would clip deep greys; transparency is dropped, as by torchvision. Raises ValueError."""
    top = TOP.get(image.mode.split(";")[0])
    if top is None:
        image.info.pop("transparency", None)  # a palette's would make PIL warn at every image
        return image.convert("RGB")
    grey = np.asarray(image, dtype=np.float64)
    if not ((grey >= 0) & (grey <= top)).all():
        raise ValueError(f"greys of {grey.min():g} to {grey.max():g}, outside 0 to {top:g}")
    return Image.fromarray(np.round(grey * (255 / top)).astype(np.uint8)).convert("RGB")


def read_image(path: str | Path) -> Image.Image:
    """An RGB image; raises FarError naming a file that is not regular, is too large or cannot be decoded."""
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):  # opening a pipe would wait for ever
            raise ValueError("not a regular file")
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return to_rgb(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        limit = f"more than {Image.MAX_IMAGE_PIXELS:,} pixels"
        raise FarError(f"{shown(path)}: not a readable image ({limit}); shrink or remove the file") from error
    except (OSError, SyntaxError, TypeError, ValueError) as error:  # what PIL's decoders raise on broken bytes
        reason = type(error).__name__ if isinstance(error, OSError) else shown(error)
        raise FarError(f"{shown(path)}: not a readable image ({reason}); mend or remove the file") from error


def find_files(path: Path) -> list[Path]:
    """The file, or a folder's image files by name. Raises FarError where there are none."""
    if path.is_file():
        return [path]
    files = sorted(p for p in path.glob("*") if p.suffix.lower() in SUFFIXES)
    if not files:
        raise FarError(f"--images {path}: no such file, or a folder without images ({', '.join(sorted(SUFFIXES))})")
    return files
