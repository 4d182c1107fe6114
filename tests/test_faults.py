"""What goes wrong outside FAR: kills, command lines nobody meant, a full disk. tests/faults.py does the same for longer."""

import json
import resource
from collections.abc import Iterator

import numpy as np
import pytest
from matplotlib.figure import Figure

from tests.conftest import DIGITS, ROOT, launch
from utils import checkpoint
from utils.errors import FarError
from utils.figures import save_figure

FULL_DISK = """
import resource, sys, main
from utils.errors import run_script
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
sys.exit(run_script(main.main, sys.argv[1:]))
"""


def test_a_full_disk_is_one_line_and_the_last_good_checkpoint_goes_on(teacher, tmp_path):
    """The optimiser's state makes the second last.pth three times as large as the first one, which still fits."""
    argv = ["--mode", "teacher", *DIGITS, "--batch-size", "64", "--epochs", "2", "--output-dir", "run"]
    program = FULL_DISK.format(limit=2 * teacher.stat().st_size)
    full = launch("-c", program, *argv, cwd=tmp_path)
    lines = [line for line in full.stderr.splitlines() if line.strip() and "step/s" not in line]
    assert full.returncode == 2 and len(lines) == 1, full.stderr
    assert lines[0].startswith("error: run/last.pth: cannot be written (File too large)")
    run = tmp_path / "run"
    assert checkpoint.load(run / "last.pth", "--test")["position"]["epoch"] == 0
    assert not list(run.glob(".*.tmp"))
    again = launch(str(ROOT / "main.py"), *argv, "--resume", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [0, 1, 2]


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file of this process may grow beyond a megabyte: Python meets the limit as the error of a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def half(file) -> None:
    file.write(b"half")
    raise RuntimeError("no more")


@pytest.mark.parametrize("write", [half, lambda file: file.write(bytes(2**21))])
def test_a_write_that_fails_keeps_the_old_file_and_leaves_no_other(write, tmp_path, small_files):
    path = tmp_path / "a.pth"
    path.write_bytes(b"old")
    with pytest.raises((FarError, RuntimeError), match=r"no more|a\.pth: cannot be written \(File too large\)"):
        checkpoint.write_atomic(path, write)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["a.pth"]


def test_a_figure_is_written_whole_or_not_at_all(tmp_path, small_files):
    save_figure(Figure(figsize=(1, 1)), tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()
    large = Figure(figsize=(20, 20))
    large.figimage(np.random.rand(1000, 1000))
    with pytest.raises(FarError, match=r"a\.png: cannot be written"):
        save_figure(large, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_a_folder_that_is_gone_is_one_line(tmp_path):
    with pytest.raises(FarError, match="No such file or directory"):
        checkpoint.save(tmp_path / "gone/last.pth", {})
