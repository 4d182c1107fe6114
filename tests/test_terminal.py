"""stdout and stderr that know only ASCII or are closed, and a reader that has gone: the work is done, quietly."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT

PROGRAM = """
import sys
from utils.script import run_script
sys.exit(run_script(lambda argv: print("猫 50.0 %", "犬 50.0 %", sep="\\n") or 0))
"""


@pytest.mark.parametrize(
    ("command", "codes", "answers"),
    [
        ('"$0" -c "$1" 2>&-', {0}, 2),
        ('"$0" -c "$1" >&-', {0}, 0),
        ('"$0" -c "$1" | true; exit ${PIPESTATUS[0]}', {0, 1}, 0),
    ],
    ids=["ascii, no stderr", "no stdout", "no reader"],
)
def test_streams_may_be_of_ascii_or_closed(command, codes, answers):
    call = ["bash", "-c", f"export PYTHONIOENCODING=ascii; {command}", sys.executable, PROGRAM]
    done = subprocess.run(call, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode in codes and done.stdout.count(" %") == answers and done.stderr == "", done
    assert ("\\u732b" in done.stdout) == bool(answers)
