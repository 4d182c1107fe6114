"""stdout and stderr that know only ASCII, are closed or full, or have no reader: the work is done, or one line."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT

PROGRAM = """
import sys
from tqdm import tqdm
from utils.script import run_script
def main(argv):
    for answer in tqdm(["猫 50.0 %", "犬 50.0 %"], disable=len(sys.argv) < 2):
        print(answer)
    return 0
sys.exit(run_script(main))
"""
FULL = "error: standard output: cannot be written (No space left on device)"


@pytest.mark.parametrize(
    ("command", "codes", "answers", "line"),
    [
        ('"$0" -c "$1" bar 2>&-', {0}, 2, ""),
        ('"$0" -c "$1" bar 2>/dev/full', {0}, 2, ""),
        ('"$0" -c "$1" >&-', {0}, 0, ""),
        ('"$0" -c "$1" | true; exit ${PIPESTATUS[0]}', {0, 1}, 0, ""),
        ('"$0" -c "$1" >/dev/full', {2}, 0, FULL),
    ],
    ids=["ascii, no stderr", "stderr full", "no stdout", "no reader", "stdout full"],
)
def test_streams_may_be_of_ascii_closed_or_full(command, codes, answers, line):
    call = ["bash", "-c", f"export PYTHONIOENCODING=ascii; {command}", sys.executable, PROGRAM]
    done = subprocess.run(call, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode in codes and done.stdout.count(" %") == answers, done
    assert done.stderr.startswith(line) and len(done.stderr.splitlines()) == bool(line), done.stderr
    assert ("\\u732b" in done.stdout) == bool(answers)
