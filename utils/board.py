"""--tensorboard: a run's logs once more, as TensorBoard draws them."""

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from utils.errors import FarError

FOLDER = "tensorboard"
PLACE = {"stage_index", "epoch", "step"}  # of a step's row; the rest are its losses


def check_board() -> None:
    """Raises FarError where the package is missing."""
    if not find_spec("tensorboard"):
        raise FarError("--tensorboard: needs the package tensorboard; pip install tensorboard, or leave the flag out")


class Board:
    """Writes into FOLDER of a run's folder, anew from both logs whenever a process begins: the logs are what counts.

    Epochs' values by epoch; steps' losses by their place among those logged, about 50 an epoch.
    """

    def __init__(self, path: Path):
        from torch.utils.tensorboard import SummaryWriter

        shutil.rmtree(path / FOLDER, ignore_errors=True)
        self.writer = SummaryWriter(path / FOLDER)
        self.steps: Counter[str] = Counter()

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        for row in rows:
            for tag, value, step in self._steps(row) if "step" in row else self._epochs(row):
                self.writer.add_scalar(tag, value, step)
        self.writer.flush()

    def _epochs(self, row: dict[str, Any]) -> Iterator[tuple[str, float, int]]:
        parts = {part: row[part] for part in ("train", "val")}
        parts["run"] = {name: row[name] for name in ("lr", "images_per_s", "data_seconds", "peak_memory_mb")}
        for part, values in parts.items():
            for name, value in values.items():
                yield f"{row['stage']}/{part}/{name}", value, row["epoch"]

    def _steps(self, row: dict[str, Any]) -> Iterator[tuple[str, float, int]]:
        for name in row.keys() - PLACE:
            tag = f"steps of stage {row['stage_index'] + 1}/{name}"
            yield tag, row[name], self.steps[tag]
            self.steps[tag] += 1
