"""FAR: pictures of what teacher, FAR and pruned FAR look at. With no flag, of the newest demo run. See README.md."""

import sys

from engine.pictures import build_parser, visualize
from utils.errors import run_script


def main(argv: list[str] | None = None) -> int:
    visualize(build_parser(__doc__).parse_args(argv))
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
