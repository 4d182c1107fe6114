"""FAR: weights of the published code to a FAR checkpoint and back, DINOv2 from ONNX. See docs/exchange.md."""

import sys

from utils.arguments import Parser, pick
from utils.configs import ConvertConfig
from utils.script import run_script

READS = {
    "published": {"base_model", "scale", "rep_by", "tolerance", "remove_zeroed"},
    "onnx": {"base_model", "scale"},
    "far_weight": {"per_head"},
}


def build_parser() -> Parser:
    parser = Parser(description=__doc__)
    parser.add_flags(ConvertConfig)
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    given = [name for name in READS if getattr(args, name)]
    if len(given) != 1:
        parser.error("--published, --onnx, --far-weight: name the one file that is to be converted")
    others = set().union(*READS.values()) - READS[given[0]]
    parser.refuse(argv, others, f"--{given[0].replace('_', '-')} does not use it")
    from deploy.convert import convert

    print(convert(pick(ConvertConfig, args)))
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
