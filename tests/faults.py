"""Kills at random moments: whatever a run was doing, its restarts end with the undisturbed run's files.

    python -m tests.faults --rounds 20             every case in turn; each line says how to repeat it
    python -m tests.faults --case prune --seed 7   one round of one case

A process is forked for each attempt from one that has imported everything, so that the kills fall into the run.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

import main
import prune
from utils import checkpoint
from utils.script import run_script

os.environ.setdefault("OMP_NUM_THREADS", "1")
START = multiprocessing.get_context("forkserver")
START.set_forkserver_preload(["main", "prune"])
SMALL = """--scale Micro --dataset DIGITS --num-workers 0 --train-subset 0.05 --holdout 0.02 --aa none --batch-size 16
--drop 0.1 --drop-path 0.2 --seed 5""".split()
TEACHER = ["--mode", "teacher", *SMALL, "--epochs", "1"]
TRAIN = """--mode train --block-ft-batch-size 16 --epochs 2 --block-ft-epochs 1 --step 2 --accum-steps 2 --lr 1e-2
--base-weight teacher/best.pth""".split()
PRUNE = """--ft-batch-size 16 --epochs 2 --ft-epochs 2 --warmup-epochs 0 --ft-warmup-epochs 0 --lr 1e-2 --ft-lr 1e-2
--decay 1e-2 --base-weight teacher/best.pth --model-path train/best.pth""".split()
CASES = {  # name: (main of the script, flags); teacher and train are what the later ones start from
    "teacher": (main.main, TEACHER),
    "train": (main.main, [*TRAIN, *SMALL]),
    "prune": (prune.main, [*PRUNE, *SMALL, "--keep-ratio", "0.5", "--prune-mlp", "0.5"]),
    "sweep": (prune.main, [*PRUNE, *SMALL, "--sweep", "0.6,0.3"]),
}
CLOCKS = {"seconds", "images_per_s", "data_seconds", "peak_memory_mb"}  # of log.jsonl: what may differ


def _work(cwd: Path, script, argv: list[str], log: Path, fault: Callable[[], None]) -> None:
    """In the forked process: a script as from a shell, its output in a file, with something to go wrong in it."""
    os.chdir(cwd)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    tqdm.set_lock(threading.RLock())  # its own is shared among processes, and told of at the end where one was killed
    fault()
    sys.exit(run_script(script, argv))


@contextlib.contextmanager
def started(cwd: Path, case: str, folder: str, fault: Callable[[], None] = int) -> Iterator[BaseProcess]:
    """The case's command, writing to cwd/folder, its output to cwd/folder.log; killed at the end of the block."""
    script, flags = CASES[case]
    argv = [*flags, "--output-dir", folder, "--resume", "auto"]
    process = START.Process(target=_work, args=(cwd, script, argv, cwd / f"{folder}.log", fault))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def finish(cwd: Path, case: str, folder: str) -> float:
    """Runs a case without a fault; returns its seconds."""
    began = time.monotonic()
    with started(cwd, case, folder) as process:
        process.join()
        assert process.exitcode == 0, (cwd / f"{folder}.log").read_text()
    return time.monotonic() - began


def full_disk(largest: int) -> None:
    """No file may grow beyond `largest` bytes: Python meets the limit as the error of a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))


@dataclass(frozen=True)
class Kill:
    """`seconds` after the start; or, `write` above 0, just before or after that many files were put in their places."""

    seconds: float = 0.0
    write: int = 0
    before: bool = False

    @classmethod
    def draw(cls, rng: random.Random, seconds: float) -> "Kill":
        if rng.random() < 0.5:
            return cls(seconds=rng.uniform(0, seconds))
        return cls(write=rng.randint(1, 8), before=rng.random() < 0.5)

    def arm(self) -> None:
        """In the process to be killed: counts its renames."""
        if self.write:
            count, replace = itertools.count(1), Path.replace

            def deadly(path: Path, target: Path) -> Path:
                last = next(count) == self.write
                if not (last and self.before):
                    path = replace(path, target)
                if last:
                    os.kill(os.getpid(), signal.SIGKILL)
                return path

            Path.replace = deadly

    def hits(self, process: BaseProcess) -> bool:
        """Waits for the moment and kills; false where the process ended by itself before."""
        process.join(None if self.write else self.seconds)
        process.kill()
        process.join()
        return process.exitcode == -signal.SIGKILL

    def __str__(self) -> str:
        return f"{'before' if self.before else 'after'} write {self.write}" if self.write else f"{self.seconds:.2f} s"


def assert_loads(run: Path) -> None:
    """Every file that a kill left is whole; temporary ones do not count."""
    for path in run.rglob("[!.]*"):
        if path.suffix == ".pth":
            assert checkpoint.load(path, "--test")
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".jsonl":
            [json.loads(line) for line in path.read_text().splitlines()]
        elif path.suffix == ".png":
            with Image.open(path) as image:
                image.load()


def same(a, b) -> bool:
    """Bit-equal: tensors, and plain data whose NaN equals itself."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return repr(a) == repr(b)


def content(path: Path):
    """What of a file must not depend on kills."""
    if path.suffix == ".pth":
        return checkpoint.load(path, "--test")
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return [{k: v for k, v in row.items() if k not in CLOCKS} for row in rows]
    if path.suffix == ".json" and path.name != "args.json":
        return json.loads(path.read_text())
    return None


def assert_equal(run: Path, whole: Path) -> None:
    """The two folders hold the same files, no temporary ones among them, with the same content."""
    names = [sorted(str(p.relative_to(root)) for p in root.rglob("*")) for root in (run, whole)]
    assert names[0] == names[1], sorted(set(names[0]) ^ set(names[1]))
    for name in names[0]:
        assert same(content(run / name), content(whole / name)), f"{name} differs"


def disturb(cwd: Path, case: str, seconds: float, seed: int, most: int) -> str:
    """One round: at most so many kills, then the case ends by itself, equal to cwd/case. Returns the round's line."""
    rng, kills, hit = random.Random(f"{case} {seed}"), [], True
    run = cwd / f"{case}-{seed}"
    try:
        while hit and len(kills) < most:
            kill = Kill.draw(rng, seconds / min(len(kills) + 1, 3))  # a restarted run has less before it
            with started(cwd, case, run.name, kill.arm) as process:
                if hit := kill.hits(process):
                    kills.append(kill)
                assert hit or process.exitcode == 0, (cwd / f"{run.name}.log").read_text()
            assert_loads(run)
            if not (hit or kills):  # it ended before the first moment: nothing was tried
                shutil.rmtree(run)
                hit = True
        finish(cwd, case, run.name)  # where it ended by itself, a finished run is found as it was left
        assert_equal(run, cwd / case)
    except Exception as error:  # noqa: BLE001  (whatever it is, the draws must be told with it)
        raise AssertionError(f"{told(case, seed, kills)}: {error}") from error
    shutil.rmtree(run)
    return told(case, seed, kills)


def told(case: str, seed: int, kills: list[Kill]) -> str:
    return f"--case {case} --seed {seed}: killed {', '.join(map(str, kills)) or 'never'}"


def prepare(cwd: Path, cases: list[str]) -> dict[str, float]:
    """The undisturbed runs, and those that they start from; returns their seconds."""
    needed = {"teacher": [], "train": ["teacher"], "prune": ["teacher", "train"], "sweep": ["teacher", "train"]}
    first = sorted({name for case in cases for name in [*needed[case], case]}, key=list(CASES).index)
    return {name: finish(cwd, name, name) for name in first}


def rounds(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1, help="rounds of each case")
    parser.add_argument("--seed", type=int, help="of the first round; default drawn")
    parser.add_argument("--kills", type=int, default=12, help="at most so many in a round; then it may end")
    parser.add_argument(
        "--case", choices=tuple(CASES), nargs="+", default=["train", "prune", "sweep"], help="what is killed"
    )
    args = parser.parse_args(argv)
    seed = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
    cwd, failures = Path(tempfile.mkdtemp(prefix="faults-")), 0
    seconds = prepare(cwd, args.case)
    print("undisturbed: " + ", ".join(f"{name} {s:.1f} s" for name, s in seconds.items()), flush=True)
    for k in range(args.rounds):
        for case in args.case:
            try:
                print(disturb(cwd, case, seconds[case], seed + k, args.kills), flush=True)
            except AssertionError as error:
                failures += 1
                print(f"FAILED {error}", flush=True)
    if failures:
        print(f"{failures} rounds failed; their folders stay in {cwd}")
        return 1
    shutil.rmtree(cwd)
    return 0


if __name__ == "__main__":
    sys.exit(rounds())
