"""--lstm-backend auto where several kernels could serve: each is checked against torch's LSTM and timed.

A run remembers in kernels.json what was taken, so that it goes on with the same. A kernel's name stands in there while
it runs for the first time: one that ends the process is left out when the run starts again.
"""

import contextlib
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer

from engine.trial import Clock, Probe, Trial, milliseconds, pick, room, trial
from models import kernels
from models.kernels import Task
from models.replace import replacements, set_backend
from utils.checkpoint import write_atomic
from utils.distributed import Context
from utils.errors import FarError
from utils.records import read_record
from utils.run_folder import RunFolder

FILE = "kernels.json"
# By type of device; torch's is the measure of the others. Elsewhere `kernels.AUTO` decides without measuring.
CANDIDATES = {"cuda": ("torch", "dense", "triton", "triton-lean", "flashrnn")}
NUMBERS = ("units", "heads", "channels", "batch", "tokens")
ROW = dict.fromkeys(("kind", "device", "dtype", "kernel"), str) | dict.fromkeys(NUMBERS, int)
ROW |= {"learns": bool, "ms": dict, "left_out": dict}  # times, and reasons, by kernel


class Memory:
    """What a run decided, as rows of plain data, and the kernels that ended its process; kept in its folder if any."""

    def __init__(self, run: RunFolder | None):
        self.path = run and run.path / FILE
        self.rows: list[dict[str, Any]] = []
        self.distrusted: list[str] = []
        if self.path and self.path.exists():
            self.rows, self.distrusted = read(self.path)

    def write(self) -> None:
        if self.path:
            content = {"choice": {"rows": self.rows, "distrusted": self.distrusted}}
            write_atomic(self.path, lambda file: file.write(json.dumps(content, indent=1).encode()))

    @contextlib.contextmanager
    def trying(self, name: str) -> Iterator[None]:
        """While a kernel runs for the first time, the file says that it has not come back; nor does it on an error."""
        self.distrusted.append(name)
        self.write()
        yield
        self.distrusted.remove(name)
        self.write()

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self.write()


def read(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows and distrusted names that a run wrote. Raises FarError on anything else."""
    record = read_record(path, "choice")["choice"]
    rows, distrusted = record.get("rows"), record.get("distrusted")
    right = isinstance(rows, list) and isinstance(distrusted, list) and all(isinstance(n, str) for n in distrusted)
    right = right and all(isinstance(row, dict) and {k: type(v) for k, v in row.items()} == ROW for row in rows)
    if not right:
        raise FarError(f"{path}: damaged, or written by something else; name another --output-dir")
    return rows, distrusted


def place(task: Task) -> dict[str, Any]:
    """A task as plain data: what its row begins with."""
    cuda = task.device.type == "cuda"
    device = torch.cuda.get_device_name(task.device) if cuda else task.device.type
    return {**task._asdict(), "kind": task.kind.name, "device": device, "dtype": str(task.dtype).removeprefix("torch.")}


def attempt(name: str, probe: Probe, expected: list[torch.Tensor], memory: Memory, clock: Clock) -> Trial:
    """`trial` of a kernel that has not ended this run's process before; torch's is beyond doubt."""
    if name in memory.distrusted:
        return Trial(0, 0, "it ended this run before")
    with contextlib.nullcontext() if name == "torch" else memory.trying(name):
        return trial(name, probe, expected, clock)


def measure(task: Task, layers: int, memory: Memory, clock: Clock) -> dict[str, Any]:
    """The row of a task in a model of so many layers. Says what is taken, and what is left out and why."""
    what = f"{task.heads} heads of {task.units}, batch {task.batch}, {task.tokens} tokens"
    what = f"LSTM kernel, {what}, {'training' if task.learns else 'evaluation'}:"
    names = [name for name in CANDIDATES[task.device.type] if not kernels.KERNELS[name].refusal(task)]
    with torch.set_grad_enabled(task.learns), torch.autocast(task.device.type, enabled=False):
        probe = Probe.of(task)
        expected = probe.run("torch")
        trials = {name: attempt(name, probe, expected, memory, clock) for name in names}
    left_out = {name: found.fault for name, found in trials.items() if found.fault}
    for name, reason in left_out.items():
        print(f"{what} {name} is left out: {reason}", flush=True)
    right = {name: found for name, found in trials.items() if not found.fault} or {"torch": trials["torch"]}
    times = {name: round(found.ms, 4) for name, found in sorted(right.items(), key=lambda item: item[1].ms)}
    taken = pick(right, room(task.device) / layers)
    print(f"{what} {taken} of {', '.join(f'{name} {ms:.3g} ms' for name, ms in times.items())}", flush=True)
    return {**place(task), "kernel": taken, "ms": times, "left_out": left_out}


def decide(tasks: Collection[Task], layers: int, run: RunFolder | None, clock: Clock) -> list[dict[str, Any]]:
    """The rows of this device, those of `tasks` among them, in a model of so many layers."""
    memory = Memory(run)

    def usable(row: dict[str, Any], like: dict[str, Any]) -> bool:
        known = row["kernel"] in kernels.KERNELS and row["kernel"] not in memory.distrusted
        return known and like.items() <= row.items()

    for task in tasks:
        if not any(usable(row, place(task)) for row in memory.rows):
            memory.add(measure(task, layers, memory, clock))
    return [row for row in memory.rows if any(usable(row, {"device": place(task)["device"]}) for task in tasks)]


def settle(
    model: VisionTransformer,
    backend: str,
    batch: int,
    context: Context,
    run: RunFolder | None = None,
    learns: bool = True,
    clock: Clock = milliseconds,
) -> None:
    """Sets how the model's replacements are computed, at so many images a step and process.

    `auto` on a device of CANDIDATES measures what this run has not: rank 0 does, and all take its choice. All processes
    call it at once. learns: they will train, not only be evaluated.
    """
    set_backend(model, backend)
    if backend != "auto" or context.device.type not in CANDIDATES:
        return
    tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    asked = [task for attn in replacements(model).values() if (task := attn.task(batch, tokens))]
    tasks = dict.fromkeys(task._replace(learns=way) for task in asked for way in {False, learns})
    rows = context.on_main(lambda: decide(tasks, len(model.blocks), run, clock)) if tasks else []
    names: dict[kernels.Shape, dict[int, str]] = {}
    for task in tasks:
        same = {key: value for key, value in place(task).items() if key not in ("device", "batch")}
        names[kernels.shape_of(task)] = {row["batch"]: row["kernel"] for row in rows if same.items() <= row.items()}
    set_backend(model, kernels.Choice(names))
