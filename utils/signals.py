"""SIGINT, SIGTERM and SIGHUP: they end a script at once with one line, and a training at its next safe point."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator

ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
SAME_REQUEST_S = 1.0  # a job manager often signals a process and, through its launcher, the same process again


class Stopped(BaseException):
    """A signal ended the script. Not an Exception, so that nothing takes it for an error and goes on."""

    def __init__(self, number: int, message: str, saved: bool = False):
        super().__init__(message)
        self.code = 0 if saved and number == signal.SIGTERM else 128 + number


class Request:
    """Whether a signal came: `number` is 0 until one does."""

    def __init__(self):
        self.number, self.at = 0, 0.0

    def note(self, number: int) -> None:
        """The first one is remembered; a second one ends the process at once."""
        if self.number and time.monotonic() - self.at > SAME_REQUEST_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not self.number:
            self.number, self.at = number, time.monotonic()


@contextlib.contextmanager
def _handled(handler: Callable[[int, object], None] | signal.Handlers) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in ENDING}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def ending_at_once() -> contextlib.AbstractContextManager[None]:
    """Inside, a signal raises Stopped. A forked child (a loader's process) dies of it, silently, as by default."""
    owner = os.getpid()

    def end(number: int, frame) -> None:
        if os.getpid() != owner:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        raise Stopped(number, f"stopped by {signal.Signals(number).name}")

    return _handled(end)


def by_default() -> contextlib.AbstractContextManager[None]:
    """Inside, signals do what the system does by default: for calls that block where no Python handler would run."""
    return _handled(signal.SIG_DFL)


@contextlib.contextmanager
def deferred() -> Iterator[Request]:
    """Inside, a signal is only noted, for a training to stop where it can be saved; children ignore it."""
    owner, request = os.getpid(), Request()
    with _handled(lambda number, frame: request.note(number) if os.getpid() == owner else None):
        yield request
    if request.number:  # it came too late for the training to notice
        os.kill(os.getpid(), request.number)
