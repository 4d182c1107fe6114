"""One process or many: the few collective operations FAR needs, the same calls in both cases."""

import contextlib
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from utils import signals
from utils.errors import Echo, FarError, LostContact, one_line
from utils.memory import keep_freed

# A gloo group of all processes, set by `joined`: what they agree on and the files they share travel over it, from CPU
# memory to CPU memory. The default group is NCCL's on CUDA and would move them through the GPU and wait for its stream.
control_group: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class Context:
    """This process's rank among `world` processes. Rank 0 alone reads and writes files and draws progress bars."""

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def main(self) -> bool:
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sums a tensor over all processes (in float64, so that counts stay exact)."""
        values = values.to(self.device, torch.float64)
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def most(self, value: int) -> int:
        """The largest of all processes' values."""
        if self.world == 1:
            return value
        shared = torch.tensor(value)
        dist.all_reduce(shared, dist.ReduceOp.MAX, group=control_group)
        return int(shared)

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier(group=control_group)

    def on_main(self, work: Callable[[], Any]) -> Any:
        """Rank 0 does the work; every process returns its result (plain data), or raises its FarError."""
        return work() if self.world == 1 else broadcast(work)


def say(context: Context, text: str) -> None:
    """Prints a line on rank 0."""
    if context.main:
        print(text, flush=True)


def broadcast(work: Callable[[], Any]) -> Any:
    """Returns rank 0's `work()` on every process, or raises its FarError on every process."""
    message: list[Any] = [None]
    failure = None
    if dist.get_rank() == 0:
        try:
            message = [(work(), "")]
        except FarError as error:
            failure, message = error, [(None, str(error))]
    dist.broadcast_object_list(message, 0, group=control_group)
    if failure:
        raise failure
    result, error = message[0]
    if error:
        raise Echo(error)
    return result


def load_from_rank_0(load: Callable[[Path], Any], path: Path) -> Any:
    """Returns `load(path)` of rank 0's file on every process: they may share no disk. Raises rank 0's FarError."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return load(path)
    loaded = []

    def read() -> bytes:
        loaded.append(load(path))  # before the bytes go out: a damaged file is one error, on every process
        return path.read_bytes()

    content = broadcast(read)
    if loaded:
        return loaded[0]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        copy.write_bytes(content)
        return load(copy)


def cores() -> int:
    """CPU cores of this machine for each of the run's processes on it."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of a name; `auto` is CUDA where there is one. Raises FarError where the named device is missing."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise FarError("--device cuda: no CUDA device is visible here; use --device cpu or auto")
        if local_rank >= torch.cuda.device_count():
            count = torch.cuda.device_count()
            raise FarError(f"--device cuda: local rank {local_rank} but {count} CUDA devices; lower --nproc_per_node")
        return torch.device("cuda", local_rank)
    return torch.device(name)


def prepare(device: torch.device) -> torch.device:
    """Sets up a device for this process: on CUDA float32 matrix products run in TF32, as cuDNN's do by default."""
    if device.type == "cpu":
        keep_freed()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    return device


def fresh_store(store: dist.Store, rank: int, world: int, wait: timedelta) -> dist.Store:
    """A prefix of the store that no earlier attempt has written to, agreed on by all processes.

    Under a static rendezvous (`--master-port`) torchrun keeps one store over its restarts, so a process could read the
    address of one that is gone. Every process announces a new random name; rank 0 answers each with its own name, again
    and again, until all have taken that name as their prefix.
    """
    me = uuid.uuid4().hex
    if rank:
        store.set(f"far/hello/{rank}", me)
        token = store.get(f"far/answer/{me}").decode()
        store.set(f"far/joined/{token}/{rank}", "")
        return dist.PrefixStore(token, store)
    waiting, end = set(range(1, world)), time.monotonic() + wait.total_seconds()
    while waiting:
        for other in sorted(waiting):
            if store.check([f"far/hello/{other}"]):
                store.set(f"far/answer/{store.get(f'far/hello/{other}').decode()}", me)
            if store.check([f"far/joined/{me}/{other}"]):
                waiting.remove(other)
        if time.monotonic() > end:
            raise dist.DistError(f"process {min(waiting)} did not come")
        time.sleep(0.02)
    return dist.PrefixStore(me, store)


@contextlib.contextmanager
def joined(distributed: bool, device: str = "auto", minutes: float = 30.0) -> Iterator[Context]:
    """Inside, this process belongs to torchrun's group (NCCL on CUDA, gloo on CPU), or is alone.

    Args:
        minutes: how long processes wait for one another.

    Raises:
        FarError: `--distributed` outside torchrun, torchrun without `--distributed`, or no memory is left.
        LostContact: another process did not come, or is gone.
    """
    global control_group
    processes = int(os.environ["WORLD_SIZE"]) if {"RANK", "WORLD_SIZE"} <= os.environ.keys() else 0
    if distributed and not processes:
        raise FarError("--distributed: not started by torchrun; use `torchrun --nproc_per_node=N ... --distributed`")
    if processes > 1 and not distributed:
        raise FarError("torchrun started several processes but --distributed is missing; add --distributed")
    try:
        where = prepare(pick_device(device, int(os.environ.get("LOCAL_RANK", 0)) if distributed else 0))
        rank, world, wait = 0, 1, timedelta(minutes=minutes)
        if distributed:
            backend = "nccl" if where.type == "cuda" else "gloo"
            try:
                with signals.by_default():
                    store, rank, world = next(dist.rendezvous("env://", timeout=wait))
                    store = fresh_store(store, rank, world, wait)
                    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=wait)
                    control_group = (
                        dist.group.WORLD if backend == "gloo" else dist.new_group(backend="gloo", timeout=wait)
                    )
            except dist.DistError as error:
                raise LostContact(
                    f"the processes did not find one another within {wait} (--dist-timeout): {one_line(str(error))}"
                ) from error
        yield Context(rank, world, where)
        if distributed:  # not after an error, see run_script
            control_group = None
            dist.destroy_process_group()
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):  # a GPU's, the CPU's
            mend = "lower the stage's batch size (--batch-size or its like) and raise its --accum-steps as much"
            raise FarError(f"out of memory: {mend}") from error
        # Both backends raise bare RuntimeErrors, from collectives and within backward; their text alone names them.
        if distributed and any(name in str(error) for name in ("gloo", "Gloo", "NCCL")):
            raise LostContact(
                f"process {os.environ['RANK']} lost contact with the others: one of them ended or cannot be reached; "
                "what it says itself is the cause"
            ) from error
        raise
