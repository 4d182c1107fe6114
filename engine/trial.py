"""A kernel tried on made input: whether its results are torch's, how long it takes, what it keeps."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from models import kernels
from models.kernels import Cell, Task
from models.kernels.gpu import tf32_allowed
from utils.errors import FarError, first_line

REPEATS = 7
CLOSE = 1.05  # times the fastest's time: of those within it, the one that keeps the least is taken
ROOM = 1 / 3  # of the free memory may be kept for the way back by all layers together
# Relative error of hidden states and of each gradient, against torch's in the same precision.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
TF32_TOLERANCE = 2e-2  # and of bfloat16: products of 8 to 11 bits, through hundreds of tokens
Clock = Callable[[Callable[[], object], torch.device], float]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(call: Callable[[], object], device: torch.device) -> float:
    """The median of several calls, each waited for."""
    times = []
    for _ in range(REPEATS):
        synchronize(device)
        started = time.perf_counter()
        call()
        synchronize(device)
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)


def room(device: torch.device) -> float:
    """Bytes that all layers together may keep for the way back."""
    if device.type != "cuda":
        return float("inf")
    free, _ = torch.cuda.mem_get_info(device)
    return ROOM * (free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


class Probe(NamedTuple):
    """Input and weights of a task, drawn alike for every kernel; `grad` of hidden states where a way back follows."""

    task: Task
    x: Tensor
    cells: list[Cell]
    grad: Tensor | None

    @classmethod
    def of(cls, task: Task) -> "Probe":
        dice = torch.Generator(task.device).manual_seed(0)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            drawn = torch.randn(*shape, generator=dice, device=task.device, dtype=task.dtype) * scale
            return drawn.requires_grad_(task.learns)

        rows, scale = task.kind.gates * task.units, task.units**-0.5
        shapes = Cell((rows, task.channels), (rows, task.units), (rows,), (rows,))
        cells = [Cell(*(draw(*shape, scale=scale) for shape in shapes)) for _ in range(2 * task.heads)]
        x = draw(task.batch, task.tokens, task.heads, task.channels)
        grad = draw(task.batch, task.tokens, 2 * task.heads * task.units).detach() if task.learns else None
        return cls(task, x, cells, grad)

    def run(self, name: str) -> list[Tensor]:
        """Hidden states and, where a way back follows, the gradients of input and weights."""
        hidden = kernels.KERNELS[name].run(self.task.kind, self.x, self.cells)
        if self.grad is None:
            return [hidden]
        asked = [self.x, *(w for cell in self.cells for w in cell)]
        return [hidden.detach(), *torch.autograd.grad(hidden, asked, self.grad, materialize_grads=True)]

    def kept(self, name: str) -> int:
        """Bytes that a layer keeps for the way back besides its input and weights."""
        own = {t.untyped_storage().data_ptr() for t in (self.x, *(w for cell in self.cells for w in cell))}
        found: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                found[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            hidden = kernels.KERNELS[name].run(self.task.kind, self.x, self.cells)
        del hidden
        return sum(found.values())


class Trial(NamedTuple):
    """How a kernel did: its time, the bytes that a layer keeps, and what is wrong with it, if anything."""

    ms: float
    kept: int
    fault: str = ""


def fault(found: list[Tensor], expected: list[Tensor], task: Task) -> str:
    """What is wrong with a kernel's results, in words; empty where they are torch's.

    A gradient that almost cancels is held to a thousandth of the hidden states' norm instead of its own.
    """
    half = task.dtype == torch.float32 and task.device.type == "cuda" and tf32_allowed()
    most = TF32_TOLERANCE if half else TOLERANCE.get(task.dtype, TF32_TOLERANCE)
    least = 1e-3 * expected[0].norm()
    for ours, theirs in zip(found, expected, strict=True):
        error = float((ours - theirs).norm() / torch.maximum(theirs.norm(), least))
        if not error <= most:  # no number either
            return f"it is off torch's by {error:.1e}, more than {most:.0e}"
    return ""


def trial(name: str, probe: Probe, expected: list[Tensor], clock: Clock) -> Trial:
    """Runs a kernel and compares it. Raises FarError where it leaves a GPU on which nothing runs any more."""
    try:
        kept = probe.kept(name)
        if wrong := fault(probe.run(name), expected, probe.task):
            return Trial(math.inf, kept, wrong)
        return Trial(clock(partial(probe.run, name), probe.task.device), kept)
    except Exception as error:  # noqa: BLE001  (a compiler, a driver, memory: whatever it is, another kernel serves)
        reason = first_line(error)
    try:
        synchronize(probe.task.device)
    except RuntimeError as error:
        raise FarError(
            f"--lstm-backend auto: kernel {name} broke the GPU's state ({reason}); start the run again, which then "
            "goes on without it (where it has a folder), or name another kernel"
        ) from error
    return Trial(math.inf, 0, reason)


def pick(trials: Mapping[str, Trial], most: float) -> str:
    """The fastest of those that keep at most so many bytes a layer, or else of those that keep the least.

    Of those about as fast, the one that keeps the least.
    """
    least = min(found.kept for found in trials.values())
    fitting = {name: found for name, found in trials.items() if found.kept <= max(most, least)}
    fastest = min(found.ms for found in fitting.values())
    return min((name for name in fitting if fitting[name].ms <= CLOSE * fastest), key=lambda name: fitting[name].kept)
