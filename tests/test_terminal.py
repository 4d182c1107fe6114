"""stdout that knows only ASCII, or whose reader has gone."""

import subprocess
import sys

from tests.conftest import ROOT

PROGRAM = """
import sys
from utils.script import run_script
sys.exit(run_script(lambda argv: print("猫 50.0 %", "犬 50.0 %", sep="\\n") or 0))
"""


def run(command: str) -> subprocess.CompletedProcess:
    call = ["bash", "-c", f"PYTHONIOENCODING=ascii {command}", sys.executable, PROGRAM]
    return subprocess.run(call, capture_output=True, text=True, check=False, cwd=ROOT)


def test_a_stream_may_be_of_ascii():
    done = run('exec "$0" -c "$1"')
    assert done.returncode == 0 and done.stdout.count(" %") == 2 and "\\u732b" in done.stdout and done.stderr == ""


def test_a_reader_may_have_read_enough():
    done = run('"$0" -c "$1" | true; exit ${PIPESTATUS[0]}')
    assert done.returncode in (0, 1) and done.stderr == ""
