"""A run's folder: args.json, log.jsonl, steps.jsonl, curves.png, last.pth, best.pth. Rank 0 alone touches it."""

import contextlib
import json
import platform
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import filelock

from utils import checkpoint, names
from utils.board import Board
from utils.configs import RunConfig
from utils.distributed import Context
from utils.errors import FarError
from utils.files import check_writable, fingerprint
from utils.records import read_lines, read_record

LEFT_OVER = re.compile(r"\..+\.(pth|jsonl?|png)\.\d+\.tmp")  # as checkpoint.write_atomic names them
# Flags that change where or how fast a run goes, not what it computes: a resumed run may change them.
FREE_ON_RESUME = {
    "resume",
    "output_dir",
    "num_workers",
    "device",
    "download",
    "distributed",
    "dist_timeout",
    "dry_run",
    "tensorboard",
}
# Flags that name what a run reads: a resumed run may find it elsewhere, but must find the same.
WEIGHTS = ("base_weight", "attn_weight", "far_weight", "model_path")
LOCATIONS = {"data_path", *WEIGHTS}


def versions() -> dict[str, str]:
    """Package versions and the git commit of this copy, `unknown` outside a checkout."""
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    packages = {name: metadata.version(name) for name in ("torch", "torchvision", "timm", "numpy")}
    return {"python": platform.python_version(), "commit": commit, **packages}


def as_lines(rows: list[dict[str, Any]]) -> bytes:
    """A JSON object a line."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


class RunFolder:
    """Reads and writes one folder.

    resumed: it continues a run that an earlier call began there. shows: its logs go to TensorBoard besides.
    """

    def __init__(self, path: Path, context: Context, resumed: bool, shows: bool = False):
        self.path, self.context, self.resumed, self.shows = path, context, resumed, shows
        self.board: Board | None = None
        self.begun: set[str] = set()  # logs that this process has written to

    def child(self, name: str) -> "RunFolder":
        """A folder inside, for one of several trainings of a run."""
        if self.context.main:
            (self.path / name).mkdir(exist_ok=True)
        return RunFolder(self.path / name, self.context, self.resumed, self.shows)

    def has(self, name: str) -> bool:
        return self.context.on_main(lambda: (self.path / name).exists())

    def load_last(self) -> dict[str, Any] | None:
        """The newest state to go on from; None where the run stopped before its first one."""
        return checkpoint.load(self.path / "last.pth", "--resume") if self.resumed and self.has("last.pth") else None

    def save(self, name: str, content: dict[str, Any]) -> None:
        if self.context.main:
            checkpoint.save(self.path / name, content)

    def write_json(self, name: str, content: Any) -> None:
        if self.context.main:
            checkpoint.write_json(self.path / name, content)

    def read_json(self, name: str) -> dict[str, Any]:
        """What `write_json` wrote, on every process. Raises FarError where it is damaged."""
        return self.context.on_main(lambda: read_record(self.path / name))

    def rows(self, name: str = "log.jsonl") -> list[dict[str, Any]]:
        """A log's rows; a last line cut by a kill is dropped."""
        return read_lines(self.path / name)

    def append(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Adds lines to log.jsonl (epochs) or steps.jsonl (steps); what runs again after a kill replaces its own."""
        if not self.context.main or not rows:
            return

        def place(row: dict[str, Any]) -> tuple[int, int, int]:
            return row["stage_index"], row["epoch"], row.get("step", 0)

        first = name not in self.begun
        if first:
            kept = [row for row in self.rows(name) if place(row) < place(rows[0])]
            checkpoint.write_atomic(self.path / name, lambda file: file.write(as_lines([*kept, *rows])))
            self.begun.add(name)
        else:
            checkpoint.append(self.path / name, as_lines(rows))
        if self.shows and first:  # the board may hold rows that these replace
            if self.board:
                self.board.writer.close()
            self.board = Board(self.path)
            self.board.add([*self.rows("log.jsonl"), *self.rows("steps.jsonl")])
        elif self.shows:
            self.board.add(rows)


def plain(flags: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives them back."""
    return json.loads(
        json.dumps({key: str(value) if isinstance(value, Path) else value for key, value in flags.items()})
    )


@contextlib.contextmanager
def open_run(config: RunConfig, context: Context, data: Callable[[], str] | None = None) -> Iterator[RunFolder]:
    """Makes a run's folder, or opens an old one as `resume` says, and owns it until the end of the block.

    data: the fingerprint of the run's data set, where it has one.

    Raises:
        FarError: the folder holds a run and `resume` is None, or a run of other arguments or of another number of
            processes, or none to resume, or another run owns it now.
    """
    flags, record = config.record, plain({**config.record, "processes": context.world})

    def claim() -> tuple[str, bool]:
        path = config.output_dir or _new_folder(config.mode)
        began = (path / "args.json").is_file()
        if config.resume == "must" and not began:
            raise FarError(f"--resume: no run in {path}; name its folder with --output-dir, or use --resume auto")
        check_writable(path)
        path.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(path / ".lock", thread_local=False)
        try:
            owner.enter_context(lock.acquire(timeout=0))  # the system takes it back, however the process ends
        except filelock.Timeout as error:
            raise FarError(f"--output-dir {path}: another run is writing there; wait or name another") from error
        except OSError as error:  # network disks may know no locks
            raise FarError(f"--output-dir {path}: cannot be locked ({error.strerror}); name another") from error
        # Fingerprints of what a run reads, by the flag that says where it lies.
        held = {key: fingerprint(Path(flags[key]), _flag(key)) for key in WEIGHTS if flags.get(key)}
        if data:
            held["data_path"] = data()
        resumed = bool(config.resume) and began
        if resumed:
            _check_same(path, record, held)
        elif any(any(path.glob(name)) for name in ("last.pth", "*/last.pth", "best.pth", "*/best.pth")):
            raise FarError(f"--output-dir {path}: already holds a run; continue it with --resume, or name another")
        for pattern in (".*.tmp", "*/.*.tmp") if began else (".args.json.*.tmp",):  # left by a kill within a write
            for file in path.glob(pattern):
                if LEFT_OVER.fullmatch(file.name):
                    file.unlink()
        if began and not resumed:  # that run never got to its first checkpoint
            for name in ("log.jsonl", "steps.jsonl"):
                (path / name).unlink(missing_ok=True)
        if not resumed:
            args = {"args": record, "versions": versions(), "contents": held}
            RunFolder(path, context, resumed).write_json("args.json", args)
        return str(path), resumed

    with contextlib.ExitStack() as owner:
        path, resumed = context.on_main(claim)
        yield RunFolder(Path(path), context, resumed, config.tensorboard)


def _new_folder(mode: str) -> Path:
    """runs/<mode>-<time>, made here so that two runs of one second get two folders."""
    name = Path("runs") / f"{mode}-{time.strftime('%Y%m%d-%H%M%S')}"
    check_writable(name)
    path, number = name, 1
    while True:
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            number += 1
            path = name.with_name(f"{name.name}-{number}")


def _flag(key: str) -> str:
    return "torchrun's number of processes" if key == "processes" else f"--{key.replace('_', '-')}"


def _check_same(path: Path, record: dict[str, Any], held: dict[str, str]) -> None:
    mend = "give the same arguments or another --output-dir"
    stored = read_record(path / "args.json", "args", "contents")
    before, known = stored["args"], stored["contents"]
    # Which sample comes when follows from the loader processes where each reads a part of a stream.
    free = (FREE_ON_RESUME | LOCATIONS) - ({"num_workers"} if names.is_stream(record.get("dataset", "")) else set())
    if before.keys() != record.keys():
        other = f"--resume: {path} was run by another script or another version of FAR"
        raise FarError(f"{other}; finish it with that, or name another --output-dir")
    for key in sorted(known.keys() | held.keys()):
        if known.get(key) != held.get(key):
            where = f"{_flag(key)} {record.get(key) or ''}".strip()
            raise FarError(f"--resume: {where}: does not hold what {path} was run with; {mend}")
    for key in sorted(record):
        if key not in free and before[key] != record[key]:
            raise FarError(f"--resume: {path} was run with {_flag(key)} {before[key]}, not {record[key]}; {mend}")
