"""How a script begins and ends: one line for what the user can mend, for whatever else one before its traceback."""

import contextlib
import os
import sys
import traceback
from collections.abc import Callable

from utils import signals
from utils.errors import FarError, LostContact, tell


def run_script(main: Callable[[list[str] | None], int], argv: list[str] | None = None) -> int:
    """Runs a script's `main` and returns the exit code.

    0 done, 2 a FarError, 128 + n signal n (0 where SIGTERM found a training, which is then saved), 1 a fault of FAR.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed
            setattr(sys, name, open(os.devnull, "w"))  # noqa: PTH123, SIM115  (as long as the process)
        if hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="backslashreplace")  # names may hold what an encoding lacks
    try:
        with signals.ending_at_once():
            try:
                code = main(argv)
                sys.stdout.flush()
                return code
            except FarError as error:
                if not error.told:
                    tell(f"error: {error}", late=error.code == LostContact.code)
                return error.code
            except signals.Stopped as stopped:
                with contextlib.suppress(OSError):
                    print(stopped, end="\n" if str(stopped) else "", flush=True)
                return stopped.code
            except BrokenPipeError:  # `... | head` has read enough; Python is not to try again at its end
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return 1
            except Exception:  # noqa: BLE001  (the last resort; the traceback is shown)
                request = "please report it with the command, its args.json if there is one, and the lines below"
                tell(f"error: a fault of FAR, not of yours: {request}\n{traceback.format_exc().rstrip()}")
                return 1
    except signals.Stopped as stopped:  # it came while the script was already ending
        return stopped.code
