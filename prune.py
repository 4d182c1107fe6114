"""FAR: regularize a FAR model's hidden units, remove the weak ones for good, fine-tune what is left. See README.md."""

import sys
from argparse import ArgumentTypeError

from main import PRETRAINED_PATH
from utils import arguments, names
from utils.arguments import Parser
from utils.errors import run_script


def ratios(text: str) -> list[float]:
    found = [arguments.PART(word) for word in text.split(",")]
    if len(set(found)) < len(found):
        raise ArgumentTypeError(f"{text}: names a ratio twice; each has a folder of its own")
    return found


def build_parser() -> Parser:
    parser = Parser(description=__doc__)
    arguments.add_run_group(parser)
    g = parser.add_argument_group("model")
    g.add_argument(
        "--model-path",
        type=arguments.path,
        metavar="FILE",
        help="the FAR checkpoint; default: PRETRAINED_PATH[scale] in main.py",
    )
    g.add_argument(
        "--scale", choices=tuple(names.SCALES), help="which model; default what the checkpoint holds, else Tiny"
    )
    g.add_argument("--base-model", choices=names.MODELS, help="long form of --scale")
    g.add_argument(
        "--base-weight",
        type=arguments.path,
        metavar="FILE",
        help="the teacher's weights, for --distill and the sweep's plot",
    )
    g.add_argument("--drop", type=arguments.SHARE, default=0.0, help="dropout before the classifier")
    g.add_argument("--drop-path", type=arguments.SHARE, default=0.1, help="stochastic depth at the last block")
    g = parser.add_argument_group("regularization")
    g.add_argument(
        "--reg",
        type=int,
        choices=names.REGULARIZERS,
        default=3,
        help="0 none, 1 group L1, 2 group Hoyer, 3 group Hoyer-square",
    )
    g.add_argument("--decay", type=arguments.RATE, default=1e-4, help="the regularizer's weight in the loss")
    g.add_argument(
        "--distill",
        action=arguments.OnOff,
        default=None,
        help="the teacher's block outputs besides the labels, in both trainings; default: on with --base-weight",
    )
    g = parser.add_argument_group("what to remove (one of these)")
    g.add_argument(
        "--sensitivity",
        type=arguments.RATE,
        default=None,
        help=f"units whose group norm is below this share of their block's mean; default {names.SENSITIVITY}, "
        "the units weaker than average: about two fifths of the digits model's",
    )
    g.add_argument("--keep-ratio", type=arguments.PART, help="all but this share of units, ranked over all blocks")
    g.add_argument("--target-params", type=arguments.SIZE, help="as many units as leave at most this many parameters")
    g.add_argument(
        "--sweep",
        type=ratios,
        metavar="R,R,...",
        help="prune and fine-tune at each of these keep ratios, and plot them",
    )
    g.add_argument(
        "--prune-mlp",
        type=arguments.PART,
        nargs="?",
        const=0.5,
        metavar="R",
        help="shrink the MLPs' hidden units to this share too, ranked among themselves; 0.5 if no share is given",
    )
    arguments.add_data_group(parser)
    arguments.add_optim_group(parser, "optimisation while regularizing", "", 200, 5e-4, 1e-5)
    arguments.add_optim_group(parser, "optimisation of the fine-tuning", "ft-", 30, 5e-6, 1e-6)
    parser.add_argument("--unscale-lr", action="store_true", help="take rates as given, not times global batch / 512")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    from engine.pruning import prune
    from models import kernels
    from utils import distributed

    with distributed.joined(args.distributed, args.device) as context:
        context.on_main(lambda: arguments.check_run(args))
        kernels.check(args.lstm_backend, context.device)
        prune(args, context, PRETRAINED_PATH)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
