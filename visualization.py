"""FAR: pictures of what teacher, FAR and pruned FAR look at. With no flag, of the newest demo run. See README.md."""

import sys

from utils.arguments import Parser, pick
from utils.configs import PictureConfig
from utils.script import run_script


def build_parser() -> Parser:
    parser = Parser(description=__doc__)
    parser.add_flags(PictureConfig)
    parser.group("model").description = "with no weights, the models of the newest demo run"
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    from plots.pictures import visualize

    page, _ = visualize(pick(PictureConfig, args))
    print(f"open {page}")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
