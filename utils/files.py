"""Folders to write to, checked before work begins, and files told apart by what they hold."""

import hashlib
import os
import tempfile
from pathlib import Path

from utils.errors import FarError


def expanded(path: str | Path) -> Path:
    """With `~` as the home folder; as it is where there is no such user, which pathlib's own raises at."""
    return Path(os.path.expanduser(path))  # noqa: PTH111


def check_writable(path: Path, flag: str = "--output-dir") -> None:
    """Raises FarError where a folder `path` could not be made or written to; makes nothing."""
    try:
        there = next(p for p in (path, *path.absolute().parents) if p.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        reason = "a file is in its place" if isinstance(error, NotADirectoryError) else error.strerror
        raise FarError(f"{flag} {path}: cannot be written ({reason}); name another") from error


def fingerprint(path: Path, flag: str) -> str:
    """The SHA-256 of a file. Raises FarError where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise FarError(f"{flag} {path}: {error.strerror.lower()}; check the path") from error
