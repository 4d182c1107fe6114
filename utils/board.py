"""--tensorboard: a run's logs once more, as TensorBoard draws them."""

import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FOLDER = "tensorboard"
PLACE = {"stage_index", "epoch", "step"}  # of a step's row; the rest are its losses


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
            if "step" in row:
                for name in row.keys() - PLACE:
                    tag = f"steps of stage {row['stage_index'] + 1}/{name}"
                    self.writer.add_scalar(tag, row[name], self.steps[tag])
                    self.steps[tag] += 1
                continue
            run = {name: row[name] for name in ("lr", "images_per_s", "data_seconds", "peak_memory_mb")}
            for part, values in (("train", row["train"]), ("val", row["val"]), ("run", run)):
                for name, value in values.items():
                    self.writer.add_scalar(f"{row['stage']}/{part}/{name}", value, row["epoch"])
        self.writer.flush()
