"""SIGINT, SIGTERM and SIGHUP: they end a script at once with one line, and a training at its next safe point."""

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
SAME_REQUEST_S = 1.0  # a job manager often signals a process and, through its launcher, the same process again
PARENT_S = 1.0  # how often a loader's process asks whether its parent lives
noted_at = -math.inf  # when a signal was last taken for a request to stop


class Stopped(BaseException):
    """A signal ended the script. Not an Exception, so that nothing takes it for an error and goes on."""

    def __init__(self, number: int, message: str, saved: bool = False):
        super().__init__(message)
        self.code = 0 if saved and number == signal.SIGTERM else 128 + number


class Request:
    """Which signal came; `number` is 0 until one does."""

    number = 0


@contextlib.contextmanager
def _handled(handler: Callable[[int, object], None] | signal.Handlers) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in ENDING}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
    """Inside, a signal raises Stopped, unless it is the last request again.

    Right after a request signals are ignored outside too: Python's own end takes a second, and by default the same
    request would change the exit code there.
    A forked child (a loader's process) dies of it, silently, as by default.
    """
    owner = os.getpid()

    def end(number: int, frame) -> None:
        global noted_at
        if os.getpid() != owner:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if time.monotonic() - noted_at > SAME_REQUEST_S:
            noted_at = time.monotonic()
            raise Stopped(number, f"stopped by {signal.Signals(number).name}")

    with _handled(end):
        yield
    if time.monotonic() - noted_at <= SAME_REQUEST_S:
        for number in ENDING:
            signal.signal(number, signal.SIG_IGN)


def by_default() -> contextlib.AbstractContextManager[None]:
    """Inside, signals do what the system does by default: for calls that block where no Python handler would run."""
    return _handled(signal.SIG_DFL)


def end_by_parent_alone(worker: int) -> None:
    """In a loader's process: signals do not end it, but for a SIGTERM of its parent's, and the end of its parent.

    torch's handler ends it by a SIGTERM to a whole group of processes, and so ends a training that the same signal asks
    to stop where it can be saved; and a Ctrl-C would be told twice, by a traceback of torch's too.
    """
    for number in ENDING:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    if not hasattr(signal, "sigtimedwait"):  # macOS, Windows
        return
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while os.getppid() == parent:  # a worker that hangs would outlive it: torch asks between batches alone
            received = signal.sigtimedwait({signal.SIGTERM}, PARENT_S)
            if received and received.si_pid == parent:
                break
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


@contextlib.contextmanager
def deferred() -> Iterator[Request]:
    """Inside, a first signal is only noted, for a training to stop where it can be saved; a second one ends at once.

    Children ignore it.
    """
    global noted_at
    owner, request = os.getpid(), Request()

    def note(number: int, frame) -> None:
        global noted_at
        if os.getpid() == owner and not request.number:
            request.number, noted_at = number, time.monotonic()
        elif os.getpid() == owner and time.monotonic() - noted_at > SAME_REQUEST_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    with _handled(note):
        yield request
    if request.number:  # it came too late for the training to notice
        noted_at = -math.inf
        os.kill(os.getpid(), request.number)
