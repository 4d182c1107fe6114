"""What goes wrong outside FAR: a full disk, a folder that is gone."""

import resource
from collections.abc import Iterator

import numpy as np
import pytest
from matplotlib.figure import Figure

from plots.figures import save_figure
from utils import checkpoint
from utils.errors import FarError


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file of this process may grow beyond a megabyte: Python meets the limit as the error of a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def large_checkpoint(path) -> None:
    checkpoint.write_atomic(path, lambda file: file.write(bytes(2**21)))


def large_figure(path) -> None:
    figure = Figure(figsize=(20, 20))
    figure.figimage(np.random.rand(1000, 1000))
    save_figure(figure, path)


@pytest.mark.parametrize(("write", "name"), [(large_checkpoint, "a.pth"), (large_figure, "a.png")])
def test_a_write_that_fails_keeps_the_old_file_and_leaves_no_other(write, name, tmp_path, full_disk):
    path = tmp_path / name
    path.write_bytes(b"old")
    with pytest.raises(FarError, match=rf"{name}: cannot be written"):
        write(path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_gone_is_one_line(tmp_path):
    with pytest.raises(FarError, match="No such file or directory"):
        checkpoint.save(tmp_path / "gone/last.pth", {})
