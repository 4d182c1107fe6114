"""FAR: a model as a file that runs without this repository, checked where it will run. See docs/deploy.md."""

import sys

from utils.arguments import Parser, pick
from utils.configs import ExportConfig
from utils.script import run_script


def build_parser() -> Parser:
    parser = Parser(description=__doc__)
    parser.add_flags(ExportConfig)
    parser.group("model").description = "one of the two files"
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    from deploy.export import export

    export(pick(ExportConfig, args))
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
