"""Image files: which files of a folder are pictures, and reading one as upright 8-bit RGB."""

import logging
import os
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from utils.errors import FarError

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
TOP = {"I": 65535.0, "F": 1.0}  # white, by PIL's mode before any ";": integers are 16-bit greys, floats 0 to 1
# By EXIF's orientation, what makes a picture upright (as PIL.ImageOps.exif_transpose, without writing EXIF again).
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def shown(name: object) -> str:
    """A path or flag value for a message: odd bytes and line breaks escaped, all else as it is."""
    return repr(str(name))[1:-1]


def orientation(image: Image.Image) -> int:
    """EXIF's, 1 (upright) where there is none or it is damaged: viewers show such a picture too."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # noqa: BLE001  (PIL's parser raises a dozen unrelated types on damaged EXIF)
        return 1


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB, upright as its EXIF orientation says. PIL alone would clip deep greys; transparency is dropped, as by
    torchvision. Raises ValueError."""
    image.load()  # PIL turns a TIFF by itself, and then forgets its orientation
    turn = UPRIGHT.get(orientation(image))
    top = TOP.get(image.mode.split(";")[0])
    if top is None:
        image.info.pop("transparency", None)  # a palette's would make PIL warn at every image
        rgb = image.convert("RGB")
    else:
        grey = np.asarray(image, dtype=np.float64)
        if not ((grey >= 0) & (grey <= top)).all():
            raise ValueError(f"greys of {grey.min():g} to {grey.max():g}, outside 0 to {top:g}")
        rgb = Image.fromarray(np.round(grey * (255 / top)).astype(np.uint8)).convert("RGB")
    return rgb if turn is None else rgb.transpose(turn)


def read_image(path: str | Path) -> Image.Image:
    """An upright RGB image; raises FarError naming a file that is missing, not regular, too large or not decodable."""
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):  # opening a pipe would wait for ever
            raise ValueError("not a regular file")
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return to_rgb(image)
    except FileNotFoundError as error:
        raise FarError(f"{shown(path)}: no such file, though one is expected there; put it back") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        limit = f"more than {Image.MAX_IMAGE_PIXELS:,} pixels"
        raise FarError(f"{shown(path)}: not a readable image ({limit}); shrink or remove the file") from error
    except UnidentifiedImageError as error:  # whose text is the path again
        raise FarError(f"{shown(path)}: not a readable image (of no known format); mend or remove the file") from error
    except (OSError, SyntaxError, TypeError, ValueError) as error:  # what PIL's decoders raise on broken bytes
        reason = shown(getattr(error, "strerror", None) or error)
        raise FarError(f"{shown(path)}: not a readable image ({reason}); mend or remove the file") from error


def is_leftover(name: str) -> bool:
    """Whether a file or folder of this name was left by a system or a tool: hidden ones, thumbnails, waste bins."""
    return name.startswith(".") or name.lower() in LEFTOVERS


def walk(folder: str | Path, skipped: list[str], flag: str, deep: bool = True) -> Iterator[tuple[str, str]]:
    """(folder, name) of every picture in a folder, links followed; in no order. deep: below it, too.

    skipped: gets the path of whatever is left out: files that are no pictures by their suffix, leftovers. Raises
    FarError naming a link that leads back to a folder above it, or a picture that is no regular file.
    """
    return _walk(str(folder), skipped, flag, deep, ())


def _walk(folder: str, skipped: list[str], flag: str, deep: bool, above: tuple[tuple[int, int], ...]):
    status = Path(folder).stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        raise FarError(f"{flag} {shown(folder)}: a link back to a folder above it; remove the link")
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_leftover(entry.name):
                skipped.append(entry.path)
            elif entry.is_dir():
                if deep:
                    yield from _walk(entry.path, skipped, flag, deep, (*above, here))
            elif not entry.name.lower().endswith(SUFFIXES):
                skipped.append(entry.path)
            elif not entry.is_file():
                raise FarError(f"{flag} {shown(entry.path)}: a broken link or no regular file; remove it")
            else:
                yield folder, entry.name


def skipping(where: str, skipped: list[str]) -> str:
    """What was left out, in one line."""
    return f"{where}: skipped what is no picture there, {len(skipped)} in all, such as {shown(min(skipped))}"


def find_files(path: Path) -> list[Path]:
    """--images: the file, or a folder's image files by name. Raises FarError where there are none."""
    if path.is_file():
        return [path]
    skipped: list[str] = []
    found = walk(path, skipped, "--images", deep=False) if path.is_dir() else ()
    files = sorted(Path(folder) / name for folder, name in found)
    if not files:
        raise FarError(f"--images {shown(path)}: no such file, or a folder without images ({', '.join(SUFFIXES)})")
    if skipped:
        log.warning("%s", skipping(f"--images {shown(path)}", skipped))
    return files
