"""FAR: regularize a FAR model's hidden units, remove the weak ones for good, fine-tune what is left. See README.md."""

import sys
from argparse import ArgumentTypeError, Namespace

from main import PRETRAINED_PATH
from utils import arguments, names
from utils.arguments import Parser, pick
from utils.script import run_script


def ratios(text: str) -> list[float]:
    found = [arguments.PART(word) for word in text.split(",")]
    if len(set(found)) < len(found):
        raise ArgumentTypeError(f"{text}: names a ratio twice; each has a folder of its own")
    return found


def add_model_group(parser: Parser) -> None:
    g = parser.add_argument_group("model")
    arguments.add_file(g, "--model-path", "the FAR checkpoint; default: PRETRAINED_PATH[scale] in main.py")
    arguments.add_model_name(g, "which model; default: what the checkpoint holds, else DeiT-Tiny")
    arguments.add_file(g, "--base-weight", "the teacher's weights, for --distill and the sweep's plot")
    arguments.add_student(g)


def add_regularization_group(parser: Parser) -> None:
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
        help="learn from the teacher in both trainings, on --distill-loss; default: on with --base-weight",
    )
    g.add_argument(
        "--distill-loss",
        type=arguments.loss,
        help="one of main.py's --train-loss; default preserve, which learns from block outputs and answers, without "
        "labels",
    )


def add_removal_group(parser: Parser) -> None:
    g = parser.add_argument_group("what to remove (one of these)")
    g.add_argument(
        "--sensitivity",
        type=arguments.RATE,
        default=None,
        help="units whose --score is below this share of their block's mean; default "
        + ", ".join(f"{share} of {score}" for score, share in names.SENSITIVITY.items())
        + ", about two fifths of the digits model's",
    )
    g.add_argument("--keep-ratio", type=arguments.PART, help="all but this share of units, ranked over all blocks")
    g.add_argument("--target-params", type=arguments.SIZE, help="as many units as leave at most this many parameters")
    g.add_argument(
        "--target-latency",
        type=arguments.latency,
        metavar="MS",
        help="as many units as leave a fused model that answers in so many milliseconds on this CPU, or in a share of "
        "the teacher's time (60%%): by a table measured on as many threads as torch uses, kept in the run's folder",
    )
    g.add_argument(
        "--sweep",
        type=ratios,
        metavar="R,R,...",
        help="prune and fine-tune at each of these keep ratios, and plot them",
    )


def add_choice_group(parser: Parser) -> None:
    g = parser.add_argument_group("how to remove")
    g.add_argument("--latency-batch", type=arguments.SIZE, help="images in the batch that --target-latency times; 1")
    g.add_argument(
        "--score",
        choices=names.SCORES,
        default="carried",
        help="how units are ranked. norm: of all weights that die with one; carried: how far its value varies on "
        "training images, times the norm of the weights that carry it on",
    )
    g.add_argument(
        "--refit",
        action=arguments.OnOff,
        default=True,
        help="what reads removed units reads their best linear guess from the kept ones instead (least squares on "
        "training images, in closed form)",
    )
    g.add_argument(
        "--prune-mlp",
        type=arguments.PART,
        nargs="?",
        const=0.5,
        metavar="R",
        help="shrink the MLPs' hidden units to this share too, ranked among themselves; 0.5 if no share is given",
    )


def build_parser() -> Parser:
    parser = Parser(description=__doc__)
    arguments.add_run_group(parser)
    add_model_group(parser)
    add_regularization_group(parser)
    add_removal_group(parser)
    add_choice_group(parser)
    arguments.add_data_group(parser)
    arguments.add_augmentation_group(parser)
    arguments.add_optim_group(parser, "optimisation while regularizing", "", 200, 5e-4, 1e-5)
    arguments.add_optim_group(parser, "optimisation of the fine-tuning", "ft-", 30, 5e-6, 1e-6)
    arguments.add_unscale(parser)
    return parser


def configure(args: Namespace):
    """The flags as typed configurations, an `engine.pruning.PruneCommand`."""
    from engine.configs import FarSource, Rates
    from engine.pruning import PruneCommand
    from engine.stages import Optim
    from utils.run_folder import Record, RunConfig

    if args.distill_loss is None and args.base_weight and args.distill is not False:
        args.distill_loss = "preserve"  # here, so that args.json says it and a run goes on with what it began
    return pick(
        PruneCommand,
        args,
        run=pick(RunConfig, args, mode="prune", record=Record(vars(args), vars(build_parser().parse_args([])))),
        rates=Rates(pick(Optim, args), "--opt", args.unscale_lr),
        ft_rates=Rates(pick(Optim, args, "ft_"), "--ft-opt", args.unscale_lr),
        far=FarSource("--model-path", args.model_path, (PRETRAINED_PATH,)),
    )


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    from engine.pruning import Pruning
    from models import kernels
    from utils import distributed

    with distributed.joined(args.distributed, args.device, args.dist_timeout) as context:
        command = configure(args)
        context.on_main(command.run.check)
        kernels.check(args.lstm_backend, context.device)
        Pruning(command, context).run()
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
