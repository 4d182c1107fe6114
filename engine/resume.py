"""Where a run stands, and whether a last.pth is of this run."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.stages import Stage
from models.replace import FarConfig
from utils.errors import FarError

VERSION = 2  # of what last.pth holds and of the loop that goes on from it: raised with every change of either


@dataclass
class Position:
    """Where a run stands, all zero at first.

    sums: the running totals of the epoch's steps so far. best, best_loss: evaluation top-1 and loss of the stage's best
    weights.
    """

    stage: int = 0
    epoch: int = 0
    step: int = 0
    best: float = -1.0
    best_loss: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)


def fingerprint(config: FarConfig, stages: list[Stage], processes: int) -> str:
    """What must be the same for a training to go on: the model, the stages with their rates, the processes, the code.

    The flags themselves are compared one by one when the run's folder is opened (`utils.run_folder`).
    """
    model = config.base_model, config.num_classes, config.img_size, config.rep_by
    return hashlib.sha256(repr((VERSION, model, stages, processes)).encode()).hexdigest()


def read_position(content: dict[str, Any], wanted: str, path: Path) -> Position:
    """The position in a last.pth. Its bytes are known to be whole: loading compares their checksums.

    Raises FarError where another run, or another version of this code, wrote it.
    """
    if content.get("fingerprint") != wanted:
        raise FarError(
            f"--resume {path}: was written by another run or another version of FAR; finish it with that version, or "
            "start again with another --output-dir"
        )
    return Position(**content["position"])
