"""A run's text files as they may be after a crash: a cut last line is dropped, other damage is told by name."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils.checkpoint import is_int
from utils.errors import FarError

PLACE = ("stage_index", "epoch")  # what every line of a run's logs begins with


def read_lines(path: str | Path, place: Sequence[str] = PLACE) -> tuple[list[dict[str, Any]], bool]:
    """Rows of a file of one JSON object a line, and whether a last line that was cut off is left out.

    Args:
        path: the file; one that is not there has no rows.
        place: keys under which every row holds a whole number.

    Raises:
        FarError: unreadable, or a line but the last is damaged.
    """
    lines = _read(path, b"").split(b"\n")
    rows = [_parse(line) for line in lines[:-1]]
    cut = lines[-1] != b""
    if not cut and rows and rows[-1] is None:
        rows, cut = rows[:-1], True
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or not all(is_int(row.get(key), 0, 10**9) for key in place):
            raise FarError(f"{path}: line {number} is damaged; mend or remove it, or name another --output-dir")
    return rows, cut


def read_object(path: str | Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises FarError on anything else."""
    record = _parse(_read(path))
    if not isinstance(record, dict):
        raise FarError(f"{path}: damaged, or written by something else; name another --output-dir")
    return record


def read_record(path: str | Path, part: str = "args") -> dict[str, Any]:
    """A JSON file that holds an object with another one, `part`, in it. Raises FarError on anything else."""
    record = read_object(path)
    if not isinstance(record.get(part), dict):
        raise FarError(f"{path}: damaged, or written by something else; name another --output-dir")
    return record


def _read(path: str | Path, missing: bytes | None = None) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        if missing is not None and isinstance(error, FileNotFoundError):
            return missing
        raise FarError(f"{path}: {error.strerror.lower()}; name another --output-dir") from error


def _parse(text: bytes) -> Any:
    """What JSON says, None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # ValueError: also numbers too long to read, and bytes that are no UTF-8
        return None
