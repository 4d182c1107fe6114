"""Errors that end a script: one line for what the user can mend, said once however many processes meet it."""

import hashlib
import importlib.util
import json
import os
import sys
import time
from pathlib import Path

LATER = 60  # seconds: longer than torchrun takes to notice that a process has ended (its --monitor-interval)


def one_line(text: str) -> str:
    """The text with line breaks, and whatever else a terminal would not show, escaped: a file's name may hold any."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def first_line(error: Exception) -> str:
    """What a third-party error says, in a line; its kind where it says nothing."""
    return one_line((str(error).strip().splitlines() or [type(error).__name__])[0])


class FarError(Exception):
    """A mistake the user can mend. The message is one line: the flag or file, what is wrong, what to do."""

    code = 2
    told = False  # whether another process says it

    def __init__(self, message: str):
        # A DataLoader worker re-raises with its whole traceback as message: the cause stands behind its last prefix.
        cause = message.rpartition(f"{type(self).__module__}.{type(self).__name__}: ")[-1]
        super().__init__(one_line(cause.strip()))


def require(flag: str, package: str, instead: str = "", install: str = "") -> None:
    """Raises FarError where a package that a flag needs is missing. instead: what else to do; install: for pip."""
    if not importlib.util.find_spec(package):
        raise FarError(f"{flag}: needs the package {package}; pip install {install or package}{instead}")


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
    if file:
        told = Path(file).parent.parent / f"{hashlib.sha256(ascii(text).encode()).hexdigest()[:16]}.told"
        try:
            told.touch(exist_ok=False)
            if os.environ.get("TORCHELASTIC_RESTART_COUNT") == os.environ.get("TORCHELASTIC_MAX_RESTARTS"):
                # The root cause is the earliest, in whole seconds, and one without a text is as of its end.
                when = str(int(time.time()) + (LATER if late else -1))
                content = {"message": {"message": text, "extraInfo": {"timestamp": when}}}
                Path(file).write_text(json.dumps(content))
                return
        except FileExistsError:
            return
        except OSError:
            pass  # the folder is that of a torchrun that has ended, or cannot be written
    print(text, file=sys.stderr)
