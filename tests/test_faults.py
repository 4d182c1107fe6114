"""What goes wrong outside FAR: a full disk, a folder that is gone."""

import resource
from collections.abc import Iterator

import numpy as np
import pytest
from matplotlib.figure import Figure

from plots.figures import save_figure
from utils import checkpoint
from utils.configs import Record, RunConfig
from utils.distributed import Context
from utils.errors import FarError
from utils.run_folder import open_run


def test_a_kill_before_a_run_has_its_record_leaves_no_file_to_the_next(tmp_path):
    for name in (".args.json.12.tmp", ".last.pth.12.tmp"):  # the second one cannot be ours: nothing was trained here
        (tmp_path / name).write_text("half")
    with open_run(RunConfig("train", tmp_path, "auto", Record({}, {})), Context()):
        assert {p.name for p in tmp_path.iterdir()} == {".lock", ".last.pth.12.tmp", "args.json"}


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
