"""What goes wrong outside FAR: kills, command lines nobody meant, a full disk. tests/faults.py does the same for longer."""

import random
import resource
import signal
from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest
from matplotlib.figure import Figure

from tests import faults
from utils import checkpoint
from utils.distributed import Context
from utils.errors import FarError
from utils.figures import save_figure
from utils.run_folder import open_run


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A folder with the undisturbed runs, and how long each took."""
    cwd = tmp_path_factory.mktemp("faults")
    return cwd, faults.prepare(cwd, ["train", "prune"])


@pytest.mark.parametrize("case", ["train", "train", "prune"])
def test_a_run_killed_again_and_again_ends_bit_equal_to_the_undisturbed_one(case, undisturbed):
    cwd, seconds = undisturbed
    print(faults.disturb(cwd, case, seconds[case], random.SystemRandom().randrange(10**6), most=3))


@pytest.mark.parametrize("write", [5, 6])
def test_a_kill_between_two_writes_changes_no_log(write, undisturbed):
    """Around a teacher's second last.pth, which log.jsonl and steps.jsonl must agree with."""
    cwd, _ = undisturbed
    with faults.started(cwd, "teacher", f"teacher-{write}", faults.Kill(write=write).arm) as process:
        process.join()
        assert process.exitcode == -signal.SIGKILL
    faults.finish(cwd, "teacher", f"teacher-{write}")
    faults.assert_equal(cwd / f"teacher-{write}", cwd / "teacher")


def test_a_full_disk_is_one_line_and_the_last_good_checkpoint_goes_on(undisturbed):
    """The optimiser's state makes the second last.pth three times as large as the first one, which still fits."""
    cwd, _ = undisturbed
    limit = 2 * (cwd / "teacher/best.pth").stat().st_size
    with faults.started(cwd, "teacher", "full", partial(faults.full_disk, limit)) as process:
        process.join()
    output = (cwd / "full.log").read_text()
    lines = [line for line in output.splitlines() if "error: " in line]
    assert process.exitcode == 2 and "Traceback" not in output, output
    assert lines == ["error: full/last.pth: cannot be written (File too large); what was there before is kept; "
                     "make room or name another folder"]  # fmt: skip
    faults.assert_loads(cwd / "full")
    assert not list((cwd / "full").glob(".*.tmp")) and output.rstrip().endswith(lines[0])
    faults.finish(cwd, "teacher", "full")
    faults.assert_equal(cwd / "full", cwd / "teacher")


def test_a_kill_before_a_run_has_its_record_leaves_no_file_to_the_next(tmp_path):
    for name in (".args.json.12.tmp", ".last.pth.12.tmp"):  # the second one cannot be ours: nothing was trained here
        (tmp_path / name).write_text("half")
    with open_run({"output_dir": tmp_path, "resume": "auto"}, "train", Context()):
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
