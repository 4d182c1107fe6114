"""What scripts print: text tables, and stdout and stderr that take any text and survive being closed or full."""

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from utils.errors import FarError


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as text, the first row the heads: the first column left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
    return "\n".join("  ".join(line) for line in lines)


class Stream:
    """A stream that survives being closed or full: what it cannot take is lost.

    Where `needed`, the failure to write ends the script: FarError, or BrokenPipeError where the reader has gone.
    """

    def __init__(self, stream: TextIO, needed: bool):
        self.stream, self.needed = stream, needed
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # names may hold what an encoding lacks

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError as error:
            self.failed(error)
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError as error:
            self.failed(error)

    def failed(self, error: OSError) -> None:
        with contextlib.suppress(OSError, ValueError):  # Python does not try to write it again at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        if self.needed and isinstance(error, BrokenPipeError):
            raise error
        if self.needed:
            raise FarError(f"standard output: cannot be written ({error.strerror}); make room, or send it elsewhere")


@contextlib.contextmanager
def dependable() -> Iterator[None]:
    """Inside, sys.stdout (needed) and sys.stderr are such streams."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed: the next file that is opened would take its place
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    nowhere = Path(os.devnull).open("w")  # noqa: SIM115  (as long as the streams)
    sys.stdout, sys.stderr = Stream(before[0] or nowhere, True), Stream(before[1] or nowhere, False)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        nowhere.close()
