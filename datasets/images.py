"""Image files: which files of a folder are pictures, and reading one as upright 8-bit RGB."""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import Dataset

from utils.errors import FarError, one_line

log = logging.getLogger(__name__)

# The suffixes of pictures, for every reader.
SUFFIXES = tuple(".png .jpg .jpeg .jfif .jpe .bmp .webp .gif .tif .tiff .ppm .pgm .pbm .pnm".split())
# Folders that systems and tools leave among pictures, some with thumbnails inside, besides all that begin with a dot.
LEFTOVERS = {
    *("__macosx", "temporary items", "network trash folder"),  # macOS
    *("$recycle.bin", "recycler", "system volume information"),  # Windows
    *("@eadir", "@tmp", "#recycle", "#snapshot", "@recycle", "@recently-snapshot"),  # Synology, QNAP
    *("lost+found", "__pycache__"),
}
WHITE = {"I": 65535.0, "F": 1.0}  # by PIL's mode before any ";": integers are 16-bit greys, floats 0 to 1


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB, upright as its EXIF orientation says; transparency is dropped, as torchvision does.

    16-bit and float greys are scaled to 0 to 255, where PIL alone would clip them. Raises ValueError for greys outside
    the range of their type.
    """
    image.load()
    with warnings.catch_warnings(), contextlib.suppress(Exception):  # damaged EXIF: upright, as viewers show it
        warnings.simplefilter("ignore", UserWarning)
        ImageOps.exif_transpose(image, in_place=True)
    white = WHITE.get(image.mode.split(";")[0])
    if white is None:
        image.info.pop("transparency", None)  # a palette's would make PIL warn at every image
        return image.convert("RGB")
    grey = np.asarray(image, dtype=np.float64)
    if not ((grey >= 0) & (grey <= white)).all():
        raise ValueError(f"greys of {grey.min():g} to {grey.max():g}, outside 0 to {white:g}")
    return Image.fromarray(np.round(grey * (255 / white)).astype(np.uint8)).convert("RGB")


def read_image(path: str | Path) -> Image.Image:
    """An upright RGB image. Raises FarError naming a file that is missing, not regular, too large or not decodable."""
    try:
        if Path(path).exists() and not Path(path).is_file():  # opening a pipe would wait for ever
            raise ValueError("not a regular file")
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return to_rgb(image)
    except FileNotFoundError as error:
        raise FarError(f"{path}: no such file, though one is expected there; put it back") from error
    except UnidentifiedImageError:  # whose text is the path again
        reason = "of no known format"
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        reason = f"more than {Image.MAX_IMAGE_PIXELS:,} pixels"
    except (OSError, SyntaxError, TypeError, ValueError) as error:  # what PIL's decoders raise on broken bytes
        reason = getattr(error, "strerror", None) or error
    raise FarError(f"{path}: not a readable image ({reason}); mend or remove the file")


class ImageFiles(Dataset):
    """Image files in or below `root`, and their labels: 0 for each where there are none."""

    def __init__(self, root: Path, files: Sequence[str | Path], targets: list[int] | None = None):
        self.root, self.files, self.targets = root, files, targets

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return read_image(self.files[index]), self.targets[index] if self.targets else 0


def is_leftover(name: str) -> bool:
    """True for the names of files and folders that a system or a tool leaves: hidden ones, thumbnails, waste bins."""
    return name.startswith(".") or name.lower() in LEFTOVERS


def is_picture(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not is_leftover(name)


def walk(root: str | Path, skipped: list[str]) -> Iterator[str]:
    """Paths of the pictures in and below a folder, links followed, in no order.

    skipped: gets the paths of what is left out: leftovers, and files that are no pictures by their suffix. Raises
    OSError at a folder that cannot be read, and FarError at a link that leads back to a folder above it.
    """

    def fail(error: OSError):
        raise error

    for folder, folders, files in os.walk(root, followlinks=True, onerror=fail):
        for name in folders:
            link = Path(folder, name).absolute()
            if link.is_symlink() and link.resolve() in {above.resolve() for above in link.parents}:
                raise FarError(f"--data-path {link}: a link back to a folder above it; remove the link")
        left = [name for name in folders if is_leftover(name)] + [name for name in files if not is_picture(name)]
        skipped += [os.path.join(folder, name) for name in left]  # noqa: PTH118  (pathlib is slow, a million times)
        folders[:] = [name for name in folders if not is_leftover(name)]
        yield from (os.path.join(folder, name) for name in files if is_picture(name))  # noqa: PTH118


def skipping(where: str, skipped: list[str]) -> str:
    """What was left out, in one line."""
    return one_line(f"{where}: skipped what is no picture there, {len(skipped)} in all, such as {min(skipped)}")


def find_files(path: Path) -> list[Path]:
    """--images: the file, or a folder's image files by name. Raises FarError where there are none."""
    if path.is_file():
        return [path]
    entries = sorted(path.iterdir()) if path.is_dir() else []
    files = [entry for entry in entries if is_picture(entry.name) and not entry.is_dir()]
    if not files:
        raise FarError(f"--images {path}: no such file, or a folder without images ({', '.join(SUFFIXES)})")
    skipped = [str(e) for e in entries if is_leftover(e.name) or not (is_picture(e.name) or e.is_dir())]
    if skipped:
        log.warning("%s", skipping(f"--images {path}", skipped))
    return files
