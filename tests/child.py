"""What a child of the tests runs: one of our scripts or a program, forked from a process that has imported all of it.

`python3 main.py` spends seconds on imports; a child forked from such a process spends none of them again.
"""

import faulthandler
import importlib
import multiprocessing
import os
import sys
from pathlib import Path

import torch

import main  # noqa: F401
import prune  # noqa: F401
from engine import modes, pruning, steps
from models.replace import FarConfig, build
from plots import figures
from utils.script import run_script

with torch.device("meta"):  # what torch imports for the device, in seconds, a child then has
    build(FarConfig("DeiT-Micro", 10, 32, replaced=(0,), units={"0": [[3, 32], [32, 32]]}))


def run(script: str, argv: list[str], cwd: Path, env: dict[str, str], stdout: Path, stderr: Path) -> None:
    os.chdir(cwd)
    os.environ.update(env)
    for number, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    faulthandler.enable(2)
    multiprocessing.set_start_method("fork", force=True)  # of loaders, as python3 has it by default
    torch.set_num_threads(1)
    for module in (figures, modes, pruning, steps):  # a figure takes half a second; the process of the tests draws them
        module.save_figure = lambda figure, path: path.touch()
    if script == "-c":
        sys.argv = ["-c", *argv[1:]]
        exec(argv[0], {"__name__": "__main__"})
        return
    sys.exit(run_script(importlib.import_module(script).main, argv))
