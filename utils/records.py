"""A run's text files as they may be after a crash: a cut last line is dropped, other damage is told by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from utils.errors import FarError

T = TypeVar("T")
PLACE = ("stage_index", "epoch")  # what every line of a run's logs begins with


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a file of one JSON object a line, without a last line that was cut off; none where there is no file.

    Raises:
        FarError: unreadable, or a line but the last is damaged.
    """
    if not Path(path).exists():
        return []
    *lines, cut = _read(path).split(b"\n")
    rows = [_parse(line) for line in lines]
    if not cut and rows and rows[-1] is None:
        rows.pop()
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or not all(isinstance(row.get(key), int) for key in PLACE):
            raise FarError(f"{path}: line {number} is damaged; mend or remove it, or name another --output-dir")
    return rows


def read_record(path: str | Path, *parts: str) -> dict[str, Any]:
    """A JSON file that holds an object, and in it others, `parts`. Raises FarError on anything else."""
    record = _parse(_read(path))
    if not isinstance(record, dict) or not all(isinstance(record.get(part), dict) for part in parts):
        raise _other(path)
    return record


def read_part(path: str | Path, part: str, build: Callable[[dict[str, Any]], T]) -> T:
    """What `build` makes of a record's part. Raises FarError where the file is damaged or `build` raises."""
    try:
        return build(read_record(path, part)[part])
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise _other(path) from error


def _other(path: str | Path) -> FarError:
    return FarError(f"{path}: damaged, or written by something else; name another --output-dir")


def _read(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise FarError(f"{path}: {error.strerror.lower()}; name another --output-dir") from error


def _parse(text: bytes) -> Any:
    """What JSON says, None where it is none."""
    try:
        return json.loads(text)
    except ValueError:  # also numbers too long to read, and bytes that are no UTF-8
        return None
