"""Shared fixtures: small runs of main.py, fake data in real layouts, weights made here."""

import contextlib
import json
import multiprocessing
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import main
import models  # noqa: F401  (makes torchvision importable, which test files import first)
from datasets.loading import Data
from deploy.engine_file import why_no_program
from engine import modes, pruning, steps
from plots import figures
from tests import child
from utils.checkpoint import load
from utils.configs import DataConfig, Settings
from utils.distributed import Context
from utils.script import run_script

ROOT = Path(__file__).parent.parent
PLAIN = ["--aa", "none", "--reprob", "0", "--color-jitter", "0"]
QUIET = [*PLAIN, "--num-workers", "0"]
EVAL = ["--dataset", "DIGITS", "--num-workers", "0"]
DIGITS = ["--dataset", "DIGITS", "--scale", "Micro", "--train-subset", "0.104", "--holdout", "0.04", *QUIET]
BATCH, BLOCK_BATCH = ["--batch-size", "64"], ["--block-ft-batch-size", "64"]
TEACH = ["--mode", "teacher", *DIGITS, *BATCH]
TRAIN = ["--mode", "train", *DIGITS, *BATCH, *BLOCK_BATCH]
FLOAT32 = Settings().autocast(torch.device("cpu"))


def pytest_sessionstart() -> None:
    """Of two test processes the first soon compiles the kernels: the second makes far-run rather than wait for them."""
    if os.environ.get("PYTEST_XDIST_WORKER") == "gw1":
        why_no_program()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The test that the whole chain learns comes first, the one that tells most, then those that wait for compilers."""
    first = ("test_learning.py", "test_runtime.py", "test_int8.py", "test_web.py")
    items.sort(key=lambda item: first.index(item.path.name) if item.path.name in first else len(first))


def write_images(folder: Path, count: int, size: int = 40, seed: int = 0) -> None:
    """`count` noise JPEGs."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(folder / f"{i}.jpg")


def image_folder(root: Path, classes: int = 2, count: int = 4, size: int = 40) -> Path:
    """train/ and val/ class folders."""
    for split in ("train", "val"):
        for c in range(classes):
            write_images(root / split / f"class{c}", count, size, seed=c)
    return root


ALONE = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def launch(*command: str, cwd: Path, timeout: int = 300, **env: str) -> subprocess.CompletedProcess:
    """Runs a command of the README from `cwd`."""
    options = {"cwd": cwd, "env": {**os.environ, **ALONE, **env}, "text": True, "timeout": timeout}
    return subprocess.run([sys.executable, *command], **options, capture_output=True, check=False)


def spawn(*command: str, cwd: Path, **env: str) -> subprocess.Popen:
    """The same, going on by itself; its output comes together from `communicate()`."""
    options = {"cwd": cwd, "env": {**os.environ, **ALONE, **env}, "text": True}
    return subprocess.Popen([sys.executable, *command], **options, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


SERVER = multiprocessing.get_context("forkserver")  # imports all of FAR once, and forks what `start` asks for
SERVER.set_forkserver_preload(["tests.child"])


class Started:
    """A script of ours, or "-c" and a program, in a process of its own, as python3 runs it."""

    def __init__(self, script: str, *argv: str, cwd: Path, **env: str):
        self.files = [cwd / f".{uuid.uuid4().hex}.{name}" for name in ("stdout", "stderr")]
        with pytest.MonkeyPatch.context() as patch:  # the server is started with these
            for name, value in ALONE.items():
                patch.setenv(name, value)
            args = Path(script).stem, [str(word) for word in argv], cwd, {**ALONE, **env}, *self.files
            self.process = SERVER.Process(target=child.run, args=args)
            self.process.start()

    def poll(self) -> int | None:
        return self.process.exitcode

    def said(self) -> str:
        return "".join(file.read_text() for file in self.files if file.exists())

    def send_signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def finish(self, timeout: float = 300) -> subprocess.CompletedProcess:
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.send_signal(signal.SIGABRT)  # it says where it stands
            self.process.join(10)
            pytest.fail(f"it does not end:\n{self.said()}")
        out, err = (file.read_text() if file.exists() else "" for file in self.files)
        for file in self.files:
            file.unlink(missing_ok=True)
        return subprocess.CompletedProcess([], self.process.exitcode, out, err)


def start_ranks(script: str, *argv: str, cwd: Path) -> list[Started]:
    """A script with --distributed, or "-c" and a program, in two processes, as torchrun starts them."""
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    argv = argv if script == "-c" else ("--distributed", *argv)
    return [Started(script, *argv, cwd=cwd, RANK=rank, LOCAL_RANK=rank, **shared) for rank in "01"]


def run_ranks(script: str, *argv: str, cwd: Path) -> subprocess.CompletedProcess:
    """The same until they end: rank 0, or the one that failed."""
    done = [job.finish() for job in start_ranks(script, *argv, cwd=cwd)]
    return next((result for result in done if result.returncode), done[0])


def free_port() -> str:
    """A port below those that systems hand out and of this process of the tests, so that nobody takes it meanwhile."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        port = random.SystemRandom().randrange(20_000 + worker, 32_000, 16)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return str(port)


def torchrun(*flags: str, script: str = "main.py", processes: int = 2, before: tuple[str, ...] = ()) -> list[str]:
    """The arguments that start a script in several processes."""
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master-port={free_port()}", *before]
    return [*launcher, str(ROOT / script), "--distributed", *flags]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen | Started, seconds: float = 120) -> None:
    """Until the condition holds; fails where the process ends first."""
    end = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() >= end:
            said = getattr(process, "said", None) or (lambda: process.communicate(timeout=10)[0])
            raise AssertionError(said())
        time.sleep(0.01)


def lines_in(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


def rows(run: Path, name: str = "log.jsonl") -> list[dict]:
    """A run's epochs, or its steps."""
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def weights(run: Path, name: str = "last.pth") -> dict[str, torch.Tensor]:
    return load(run / name, "--test")["model"]


def digits(rank: int = 0, world: int = 1, size: int = 32, **flags) -> Data:
    """DIGITS as one of several processes reads them, with these flags."""
    return Data(DataConfig("DIGITS", None, size, **{"num_workers": 0, **flags}), Context(rank, world))


def report(run: Path, name: str = "result.json") -> dict:
    return json.loads((run / name).read_text())


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    """Every part counts: nothing stays zero or one."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                p.add_(torch.randn_like(p) * 0.2)
            elif "token" in name or "pos_embed" in name or name == "head.weight":
                p.normal_(std=0.3)
    return model.eval().requires_grad_(False)


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """The same weights, to the bit."""
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(autouse=True)
def alike() -> Iterator[None]:
    """A test draws the same numbers whichever tests ran before it, and without the TF32 that main.main() allows."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def figures_drawn_once() -> Iterator[None]:
    """A recipe's figure takes half a second: of each name the first is drawn, the later ones are copies of it."""
    drawn, save_figure = {}, figures.save_figure

    def save(figure, path: Path) -> None:
        if path.name not in drawn:
            save_figure(figure, path)
            drawn[path.name] = path.read_bytes()
        path.write_bytes(drawn[path.name])

    with pytest.MonkeyPatch.context() as patch:
        for module in (figures, modes, pruning, steps):
            patch.setattr(module, "save_figure", save)
        yield


@pytest.fixture(scope="session")
def teacher(tmp_path_factory) -> Path:
    """A DeiT-Micro teacher's best.pth, one epoch old."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    assert main.main([*TEACH, "--epochs", "1", "--output-dir", str(folder)]) == 0
    return folder / "best.pth"


@pytest.fixture(scope="session")
def far(tmp_path_factory, teacher) -> Path:
    """A FAR model's run folder, one epoch a stage."""
    folder = tmp_path_factory.mktemp("far") / "run"
    args = [*TRAIN, "--base-weight", str(teacher), "--epochs", "1", "--block-ft-epochs", "1"]
    assert main.main([*args, "--output-dir", str(folder)]) == 0
    return folder


@pytest.fixture
def failure(capsys, request):
    """Runs a script (main.py) in this process, expects exit code 2 and one line; returns it.

    TEACHER and FAR stand for the weights made here.
    """

    def word(given) -> str:
        if given == "FAR":
            return str(request.getfixturevalue("far") / "best.pth")
        return str(request.getfixturevalue("teacher") if given == "TEACHER" else given)

    def run(*argv: str, script=main.main) -> str:
        argv = [word(given) for given in argv]
        capsys.readouterr()
        try:
            code = run_script(script, argv)
        except SystemExit as stop:  # argparse
            code = stop.code
        lines = [
            line
            for line in capsys.readouterr().err.splitlines()
            if line.strip() and not line.endswith(("step/s]", "s/step]"))
        ]
        assert code == 2, lines
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        return lines[0]

    return run


@pytest.fixture
def mistake(failure, tmp_path, monkeypatch):
    """Runs a script in a folder: it says one line, which matches a pattern, and leaves the folder as it was."""

    def run(line: str, said: str, script=main.main, folder: Path = tmp_path) -> None:
        monkeypatch.chdir(folder)
        before = sorted(folder.rglob("*"))
        found = failure(*line.split(), script=script)
        assert re.search(said, found), found
        assert sorted(folder.rglob("*")) == before

    return run
