"""A model as one file for runtime/, which runs it without Python; its layout stands in runtime/far.cpp."""

import functools
import json
import struct
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch
from torch import Tensor

from deploy.packed import LAYOUT, Natural
from utils.errors import first_line

ROOT = Path(__file__).parent.parent
PROGRAM = ROOT / "runtime/build/native/far-run"
MAGIC, LINE = b"\x89FAR\r\n\x1a\n", 64  # every part begins at a multiple of so many bytes


def checksum(parts: bytes) -> tuple[int, int]:
    """Fletcher's, of 64-bit words: their sum, and the sum of the sums after each word."""
    words = np.frombuffer(parts, "<u8")
    return int(words.sum(dtype=np.uint64)), int((words * np.arange(len(words), 0, -1, dtype=np.uint64)).sum())


def to_bytes(model: Natural, facts: dict[str, Any]) -> bytes:
    """The file's content. facts: what the program is told about the model and its pictures, plain data."""
    products = model.products.view({4: torch.int32, 2: torch.int16, 1: torch.int8}[model.products.element_size()])
    arrays = ((model.plan, "<i8"), (model.vectors, "<f4"), (products, f"<i{products.element_size()}"))
    parts = [json.dumps(facts).encode(), *(tensor.numpy().astype(dtype).tobytes() for tensor, dtype in arrays)]
    content = b"".join(part + bytes(-len(part) % LINE) for part in parts)
    return struct.pack("<8s5q2Q", MAGIC, LAYOUT, *map(len, parts), *checksum(content)) + content


@functools.cache
def why_no_program() -> str:
    """Builds far-run for this machine; why it cannot be, in words, or nothing."""
    try:
        PROGRAM.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(PROGRAM.with_name("lock")):
            done = subprocess.run(["make", "-s", "-C", ROOT, "runtime"], capture_output=True, text=True, check=False)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if not line.startswith("make: ***")] or ["make failed"]
            return next((line for line in said if "error" in line.lower()), said[0])
        starts = subprocess.run([PROGRAM, "--help"], capture_output=True, check=False).returncode == 0
        return "" if starts else f"{PROGRAM.parent} was made on another kind of machine: remove it"
    except OSError as error:
        return first_line(error)


def run_program(path: Path) -> Callable[[Tensor], Tensor]:
    """A file in far-run: images to logits. Raises OSError with what the program says."""

    def call(images: Tensor) -> Tensor:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "images.f32"
            file.write_bytes(images.float().contiguous().numpy().astype("<f4").tobytes())
            command = [PROGRAM, path, "--raw", "--threads", str(torch.get_num_threads()), file]
            done = subprocess.run(command, capture_output=True, check=False)
        if done.returncode:
            raise OSError(done.stderr.decode(errors="replace").strip() or f"far-run ended with {done.returncode}")
        return torch.from_numpy(np.frombuffer(done.stdout, "<f4").reshape(len(images), -1).astype(np.float32))

    return call
