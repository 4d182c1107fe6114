"""Several commands in one folder, resumed where they stopped: what demo.py, real.py and study.py run."""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from utils.arguments import PART, SEED, SIZE, Parser, path
from utils.errors import Echo
from utils.signals import Stopped

ROOT = Path(__file__).parent.parent
RESULTS = {"main.py": "result.json", "prune.py": "prune_report.json"}


def recipe_parser(description: str, folder: str, seeds: Sequence[int] = (0,)) -> Parser:
    """The flags that every recipe has. folder, seeds: their defaults."""
    parser = Parser(description=description)
    parser.add_argument("--output-dir", type=path, default=Path(folder), help="where everything goes")
    parser.add_argument("--seeds", type=SEED, nargs="+", default=seeds, help="one run each; several have a folder each")
    parser.add_argument("--epochs", type=SIZE, help="every stage's epochs, to try it out")
    parser.add_argument("--train-subset", type=PART, default=1.0, help="share of the training images, to try it out")
    return parser


class Recipe:
    """Runs main.py and prune.py into folders below `root`; an interrupted recipe goes on where it stopped.

    Args:
        root: made where it is missing.
        common: flags of every command, such as the seed's.
        epochs: what every stage's epochs are cut to, to try a recipe out; 0 epochs, a stage left out, stay 0.
        processes: more than one: each command by torchrun, one process a GPU.
    """

    def __init__(self, root: Path, common: Sequence[str], epochs: int | None = None, processes: int = 1):
        self.root, self.common, self.epochs, self.processes = root, common, epochs, processes
        self.seconds: dict[str, float] = {}  # by folder
        root.mkdir(parents=True, exist_ok=True)

    def run(self, script: str, name: str, *argv: str) -> dict[str, Any]:
        """Runs `script` into root/name; returns its result.json, or prune.py's prune_report.json."""
        run, timing, result = self.root / name, self.root / f"{name}.seconds", self.root / name / RESULTS[script]
        argv = [*self.common, *argv, "--output-dir", str(run), "--resume", "auto"]
        for k, word in enumerate(argv[:-1]):
            if self.epochs and word in ("--epochs", "--block-ft-epochs", "--ft-epochs") and argv[k + 1] != "0":
                argv[k + 1] = str(self.epochs)
        print(f"\n== {name}: python3 {script} {' '.join(argv)}", flush=True)
        finished, started = result.exists(), time.perf_counter()
        if self.processes > 1:
            self._torchrun(script, argv)
        else:
            import_module(Path(script).stem).main(argv)  # a finished run too: one of other flags is refused
        if not finished:
            timing.write_text(f"{time.perf_counter() - started:.1f}")
        self.seconds[name] = float(timing.read_text()) if timing.exists() else 0.0  # killed right after its result
        return json.loads(result.read_text())

    def _torchrun(self, script: str, argv: Sequence[str]) -> None:
        """Raises Echo where the command fails, having said why."""
        print(f"   by torchrun --nproc-per-node={self.processes}, with --distributed", flush=True)
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.processes}"]
        with subprocess.Popen([sys.executable, *launcher, str(ROOT / script), "--distributed", *argv]) as process:
            try:
                code = process.wait()
            except Stopped:
                process.terminate()  # torchrun passes it on, and the processes save
                process.wait()
                raise
        if code:
            raise Echo(f"{script} ended with exit code {code}")

    def best(self, name: str) -> str:
        """The weights of root/name."""
        return str(self.root / name / "best.pth")
