"""How a script ends: one line for what the user can mend, and for whatever else one line before its traceback."""

import contextlib
import hashlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from utils import signals

LATER = 60  # seconds: longer than torchrun takes to notice that a process has ended (its --monitor-interval)


def one_line(text: str) -> str:
    """The text with line breaks, and whatever else a terminal would not show, escaped: a file's name may hold any."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def first_line(error: Exception) -> str:
    """What an error of others says, in a line; its kind where it says nothing."""
    return one_line((str(error).strip().splitlines() or [type(error).__name__])[0])


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


def tell(text: str, late: bool = False) -> None:
    """Says an error on stderr, or under torchrun in the report with which that ends: below its own traceback.

    What several processes of a node meet is said by one of them. An attempt that torchrun follows with another has no
    report. late: a consequence of another error, and so never what the report calls the root cause.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    with contextlib.suppress(OSError):  # the folder is that of a torchrun that has ended, or cannot be written
        if file and _is_reported(Path(file), text, late):
            return
    print(text, file=sys.stderr)


def _is_reported(file: Path, text: str, late: bool) -> bool:
    """Whether torchrun, or another process of the node, says it. Raises OSError where this cannot be arranged."""
    told = file.parent.parent / f"{hashlib.sha256(ascii(text).encode()).hexdigest()[:16]}.told"
    try:
        told.touch(exist_ok=False)
    except FileExistsError:
        return True
    if os.environ.get("TORCHELASTIC_RESTART_COUNT") != os.environ.get("TORCHELASTIC_MAX_RESTARTS"):
        return False
    # The root cause is the earliest, in whole seconds, and what says nothing is as of when torchrun noticed it.
    when = str(int(time.time()) + (LATER if late else -1))
    content = {"message": {"message": text, "extraInfo": {"timestamp": when}}}
    file.write_text(json.dumps(content))
    return True


def run_script(main: Callable[[list[str] | None], int], argv: list[str] | None = None) -> int:
    """Runs a script's `main` and returns the exit code.

    0 done, 2 a FarError, 128 + n signal n (0 where SIGTERM found a training, which is then saved), 1 a fault of FAR.
    """
    with signals.ending_at_once():
        try:
            return main(argv)
        except FarError as error:
            if not error.told:
                tell(f"error: {error}", late=error.code == LostContact.code)
            return error.code
        except signals.Stopped as stopped:
            print(stopped, end="\n" if str(stopped) else "", flush=True)
            return stopped.code
        except BrokenPipeError:  # `... | head` has read enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except Exception:  # noqa: BLE001  (the door: nothing foreseen is left, and the traceback is shown)
            asked = "please report it with the command, its args.json if there is one, and the lines below"
            tell(f"error: a fault of FAR, not of yours: {asked}\n{traceback.format_exc().rstrip()}")
            return 1
