"""How a script ends: one line for what the user can mend, and for whatever else one line before its traceback."""

import os
import sys
import traceback
from collections.abc import Callable

from utils import signals


def one_line(text: str) -> str:
    """The text with line breaks, and whatever else a terminal would not show, escaped: a file's name may hold any."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class FarError(Exception):
    """A mistake the user can mend. The message is one line: the flag or file, what is wrong, what to do."""

    code = 2
    told = False  # whether another process says it

    def __init__(self, message: str):
        # A DataLoader worker re-raises with its whole traceback as message: the cause stands behind its last prefix.
        cause = message.rpartition(f"{type(self).__module__}.{type(self).__name__}: ")[-1]
        super().__init__(one_line(cause.strip()))


class Echo(FarError):
    """Rank 0's error, raised in the other processes too; rank 0 says it."""

    told = True


class LostContact(FarError):
    """Another process of the run is gone; that one says why."""

    code = 1


def run_script(main: Callable[[list[str] | None], int], argv: list[str] | None = None) -> int:
    """Runs a script's `main` and returns the exit code.

    0 done, 2 a FarError, 128 + n signal n (0 where SIGTERM found a training, which is then saved), 1 a fault of FAR.
    """
    with signals.ending_at_once():
        try:
            return main(argv)
        except FarError as error:
            if not error.told:
                print(f"error: {error}", file=sys.stderr)
            return error.code
        except signals.Stopped as stopped:
            print(stopped, end="\n" if str(stopped) else "", flush=True)
            return stopped.code
        except BrokenPipeError:  # `... | head` has read enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except Exception:  # noqa: BLE001  (the door: nothing foreseen is left, and the traceback is shown)
            print(
                "error: a fault of FAR, not of yours: please report it with the command, its "
                "args.json if there is one, "
                "and the lines below",
                file=sys.stderr,
            )
            traceback.print_exc()
            return 1
