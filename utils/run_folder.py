"""A run's folder: args.json, log.jsonl, steps.jsonl, curves.png, last.pth, best.pth. Only rank 0 writes."""

import json
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy
import timm
import torch
import torchvision

from utils import checkpoint
from utils.distributed import Context
from utils.errors import FarError
from utils.figures import save_figure, training_curves

# Flags that change where or how fast a run goes, not what it computes: a resumed run may change them.
FREE_ON_RESUME = {"resume", "output_dir", "num_workers", "device", "download"}


def versions() -> dict[str, str]:
    """Package versions and the git commit of this copy, `unknown` outside a checkout."""
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    modules = {"torch": torch, "torchvision": torchvision, "timm": timm, "numpy": numpy}
    return {"python": platform.python_version(), "commit": commit, **{k: m.__version__ for k, m in modules.items()}}


class RunFolder:
    """Opens a new folder, or an old one with `resume`.

    Raises:
        FarError: the folder holds a run and `resume` is off, or a run of other arguments, or none to resume.
    """

    def __init__(self, args: dict[str, Any], mode: str, context: Context):
        self.context = context
        self.path = Path(args["output_dir"] or f"runs/{mode}-{time.strftime('%Y%m%d-%H%M%S')}")
        self.resumed = bool(args["resume"])
        record = {key: str(value) if isinstance(value, Path) else value for key, value in args.items()}
        written = self.path / "args.json"
        if self.resumed:
            self._check(written, record)
        elif (self.path / "last.pth").exists():
            raise FarError(f"--output-dir {self.path}: already holds a run; add --resume to continue it or name another")
        context.barrier()
        if context.main and not self.resumed:
            self.path.mkdir(parents=True, exist_ok=True)
            self.write_json("args.json", {"args": record, "versions": versions()})
            for name in ("log.jsonl", "steps.jsonl"):
                (self.path / name).unlink(missing_ok=True)
        context.barrier()

    def _check(self, written: Path, record: dict[str, Any]) -> None:
        if not written.is_file():
            raise FarError(f"--resume: no run in {self.path}; name its folder with --output-dir, or leave --resume out")
        before = json.loads(written.read_text())["args"]
        for key in sorted(before.keys() | record.keys()):
            if key not in FREE_ON_RESUME and before.get(key) != json.loads(json.dumps(record.get(key))):
                raise FarError(
                    f"--resume: {self.path} was run with --{key.replace('_', '-')} {before.get(key)}, not {record.get(key)}; "
                    "give the same arguments or another --output-dir"
                )

    def load_last(self) -> dict[str, Any] | None:
        """The newest state to go on from; None where the run stopped before its first one."""
        path = self.path / "last.pth"
        return checkpoint.load(path, "--resume") if self.resumed and path.exists() else None

    def save(self, name: str, content: dict[str, Any]) -> None:
        if self.context.main:
            checkpoint.save(self.path / name, content)

    def write_json(self, name: str, content: Any) -> None:
        if self.context.main:
            text = json.dumps(content, indent=2).encode()
            checkpoint.write_atomic(self.path / name, lambda file: file.write(text))

    def rows(self, name: str = "log.jsonl") -> list[dict[str, Any]]:
        path = self.path / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def append(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Adds lines to log.jsonl (an epoch each) or steps.jsonl (a step each); what runs again after a kill replaces its own."""
        if not self.context.main or not rows:
            return
        place = lambda row: (row["stage_index"], row["epoch"], row.get("step", 0))  # noqa: E731
        kept = [r for r in self.rows(name) if place(r) < place(rows[0])]
        text = "".join(json.dumps(r) + "\n" for r in [*kept, *rows]).encode()
        checkpoint.write_atomic(self.path / name, lambda file: file.write(text))

    def draw(self) -> None:
        if self.context.main and (rows := self.rows()):
            save_figure(training_curves(rows), self.path / "curves.png")
