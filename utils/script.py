"""How a script begins and ends: one line for what the user can mend, for whatever else one before its traceback."""

import contextlib
import errno
import os
import sys
import traceback
from collections.abc import Callable
from typing import TextIO

from utils import signals
from utils.errors import FarError, LostContact, tell


class Remarks:
    """A stream that loses what it cannot write, as its reader has gone or its disk is full: the work goes on."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self.stream.flush()


def run_script(main: Callable[[list[str] | None], int], argv: list[str] | None = None) -> int:
    """Runs a script's `main` and returns the exit code.

    0 done, 2 a FarError, 128 + n signal n (0 where SIGTERM found a training, which is then saved), 1 a fault of FAR.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:  # closed: the next file that is opened would take its place
        pass
    os.close(number)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: PTH123, SIM115  (as long as the process)
        if hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="backslashreplace")  # names may hold what an encoding lacks
    try:
        with contextlib.redirect_stderr(Remarks(sys.stderr)), signals.ending_at_once():
            try:
                code = main(argv)
                sys.stdout.flush()
                return code
            except (Exception, signals.Stopped) as error:  # noqa: BLE001  (the last resort; the traceback is shown)
                code, dist = exit_code(error), sys.modules.get("torch.distributed")
                if isinstance(error, LostContact) or (dist and dist.is_initialized()):
                    # The error's frames hold torch's process group. Freed, it joins its threads while it holds Python's
                    # lock, which they may wait for; and the other processes wait until this one's connections close.
                    with contextlib.suppress(OSError):
                        sys.stdout.flush()
                    os._exit(code)
                return code
    except signals.Stopped as stopped:  # it came while the script was already ending
        return stopped.code


def exit_code(error: BaseException) -> int:
    """Says what ended a script and returns its exit code."""
    match error:
        case FarError():
            if not error.told:
                tell(f"error: {error}", late=isinstance(error, LostContact))
            return error.code
        case signals.Stopped():
            with contextlib.suppress(OSError):
                print(error, end="\n" if str(error) else "", flush=True)
            return error.code
        case BrokenPipeError():  # `... | head` has read enough; Python is not to try again at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        case OSError(errno=errno.ENOSPC):  # files say by themselves that they are full
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            tell(f"error: standard output: cannot be written ({error.strerror}); make room, or send it elsewhere")
            return 2
    request = "please report it with the command, its args.json if there is one, and the lines below"
    tell(f"error: a fault of FAR, not of yours: {request}\n{traceback.format_exc().rstrip()}")
    return 1
