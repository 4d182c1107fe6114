"""The one exception that scripts print as one line."""

import sys
from collections.abc import Callable


class FarError(Exception):
    """A mistake the user can mend. The message is one line: the flag or file, what is wrong, what to do."""

    def __init__(self, message: str):
        # A DataLoader worker re-raises with its whole traceback as the message: the cause is the last line.
        prefix = f"{type(self).__module__}.{type(self).__name__}: "
        super().__init__(message.strip().splitlines()[-1].removeprefix(prefix))


def run_script(main: Callable[[list[str] | None], int], argv: list[str] | None = None) -> int:
    """Runs a script's `main`; a FarError becomes one line on standard error and exit code 2."""
    try:
        return main(argv)
    except FarError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
