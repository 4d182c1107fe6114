"""stdout and stderr that know only ASCII, are closed or are full: the work done, or one line."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT

PROGRAM = """
import sys
from utils.script import run_script
sys.exit(run_script(lambda argv: print("猫 50.0 %", "犬 50.0 %", sep="\\n") or 0))
"""
FULL = "error: standard output: cannot be written (No space left on device)"


@pytest.mark.parametrize(
    ("streams", "code", "answers", "line"),
    [("2>&-", 0, 2, ""), (">&-", 0, 0, ""), (">/dev/full", 2, 0, FULL)],
    ids=["ascii, no stderr", "no stdout", "full"],
)
def test_streams_may_be_of_ascii_closed_or_full(streams, code, answers, line):
    call = ["bash", "-c", f'PYTHONIOENCODING=ascii exec "$0" -c "$1" {streams}', sys.executable, PROGRAM]
    done = subprocess.run(call, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == code and done.stdout.count(" %") == answers, done
    assert done.stderr.startswith(line) and len(done.stderr.splitlines()) == bool(line), done.stderr
    assert ("\\u732b" in done.stdout) == bool(answers)
