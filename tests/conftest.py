"""Shared fixtures: small runs of main.py, fake data in real layouts, weights made here."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import main
import models  # noqa: F401  (makes torchvision importable, which test files import first)

ROOT = Path(__file__).parent.parent
PLAIN = ["--aa", "none", "--reprob", "0", "--color-jitter", "0"]
QUIET = [*PLAIN, "--num-workers", "0"]
EVAL = ["--dataset", "DIGITS", "--num-workers", "0"]
DIGITS = ["--dataset", "DIGITS", "--scale", "Micro", "--train-subset", "0.1", *QUIET]
BATCH, BLOCK_BATCH = ["--batch-size", "64"], ["--block-ft-batch-size", "64"]
TEACH = ["--mode", "teacher", *DIGITS, *BATCH]
TRAIN = ["--mode", "train", *DIGITS, *BATCH, *BLOCK_BATCH]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The test that the whole chain learns comes first: the longest, and the one that tells most."""
    items.sort(key=lambda item: item.path.name != "test_learning.py")


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


def launch(*command: str, cwd: Path, timeout: int = 300, **env: str) -> subprocess.CompletedProcess:
    """Runs a command of the README from `cwd`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **env}
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def torchrun(*flags: str, script: str = "main.py", processes: int = 2, before: tuple[str, ...] = ()) -> list[str]:
    """The arguments that start a script in several processes."""
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master-port={free_port()}", *before]
    return [*launcher, str(ROOT / script), "--distributed", *flags]


def spawn(*command: str, cwd: Path, **env: str) -> subprocess.Popen:
    """The same as `launch`, going on by itself; its output comes together from `communicate()`."""
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=cwd,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **env},
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen, seconds: float = 120) -> None:
    """Until the condition holds; fails where the process ends first."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.communicate(timeout=10)[0]
        time.sleep(0.01)


def lines_in(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.fixture(autouse=True)
def full_float32() -> None:
    """On CUDA main.main() allows TF32 for its process; a test begins without."""
    torch.set_float32_matmul_precision("highest")


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
def failure(capsys):
    """Runs a script (main.py) in this process, expects exit code 2 and one line; returns it."""
    from utils.script import run_script

    def run(*argv: str, script=main.main) -> str:
        capsys.readouterr()
        try:
            code = run_script(script, [str(a) for a in argv])
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
