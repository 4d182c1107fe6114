"""stdout and stderr that know only ASCII, are closed or are full: the work done, or one line."""

import subprocess
import sys

import pytest

from models.replace import FarConfig, build, pack
from tests.conftest import ROOT, write_images
from utils.checkpoint import save
from utils.preprocessing import Preprocessing
from utils.terminal import table


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """Predicts two pictures with a model whose classes have Chinese names."""
    root = tmp_path_factory.mktemp("predict")
    config = FarConfig("DeiT-Micro", 2, 32, classes=("猫", "犬"), preprocessing=Preprocessing())
    save(root / "a.pth", pack(build(config), config))
    write_images(root / "pictures", 2)
    flags = f"--mode predict --far-weight {root}/a.pth --images {root}/pictures --top 2 --num-workers 0"
    return f"{sys.executable} {ROOT}/main.py {flags}"


FULL = "error: standard output: cannot be written (No space left on device)"


@pytest.mark.parametrize(
    ("streams", "code", "answers", "line"),
    [("2>&-", 0, 4, ""), (">&-", 0, 0, ""), (">/dev/full", 2, 0, FULL)],
    ids=["ascii, no stderr", "no stdout", "full"],
)
def test_streams_may_be_of_ascii_closed_or_full(streams, code, answers, line, command):
    call = ["bash", "-c", f"PYTHONIOENCODING=ascii exec {command} {streams}"]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert done.returncode == code and done.stdout.count(" %  ") == answers, done
    assert done.stderr.startswith(line) and len(done.stderr.splitlines()) == bool(line), done.stderr
    assert ("\\u732b" in done.stdout) == bool(answers)


def test_a_table_aligns_its_first_column_left_and_the_others_right():
    text = table([["model", "ms", "top-1 %"], ["FAR", "10.25", "98.6"], ["attention", "", "9"]])
    assert text.splitlines() == ["model         ms  top-1 %", "FAR        10.25     98.6", "attention               9"]
