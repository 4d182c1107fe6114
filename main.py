"""FAR: train a teacher, replace its attention, distil, move downstream, evaluate. See README.md."""

import sys
from argparse import Namespace
from dataclasses import dataclass

from utils import arguments, names
from utils.arguments import Parser, pick
from utils.script import run_script

# Where downstream finds a FAR model when --far-weight is not given, by scale.
PRETRAINED_PATH = {"Tiny": "", "Small": "", "Base": "", "Micro": "runs/demo/far/best.pth"}
PRETRAINED_PATH_PRUNE = {"Tiny": "", "Small": "", "Base": "", "Micro": "runs/demo/prune/best.pth"}


@dataclass(frozen=True)
class Mode:
    """What a mode does, and the flags it reads: groups of them, some of those left out, some others besides."""

    does: str
    job: str  # a function of engine.modes, imported when it runs: --help must not wait for torch
    groups: frozenset[str]
    ignores: frozenset[str] = frozenset()
    reads: frozenset[str] = frozenset()


_TRAINING = frozenset({"run", "model", "student", "data", "augmentation", "rates"})
_DISTILLING = _TRAINING | {"replacement", "distillation", "optimisation of the block stage"}
MODES = {
    "train": Mode("swap attention, then distil: stage attn, stage block", "train", _DISTILLING | {"optimisation"}),
    "block-distill": Mode("the block stage alone", "train", _DISTILLING, frozenset({"train_loss"})),
    "downstream": Mode(
        "move a FAR model to another data set",
        "downstream",
        _TRAINING | {"optimisation", "FAR model"},
        frozenset({"base_weight", "fuse"}),
    ),
    "teacher": Mode("train the attention model itself", "teacher", _TRAINING | {"optimisation"}),
    "eval": Mode(
        "evaluate a FAR model, against its teacher where --base-weight names one, or a teacher alone",
        "eval_mode",
        frozenset({"run", "model", "data", "FAR model"}),
        frozenset("resume select dry_run ds_mode eval_every save_every compile tensorboard".split()),
        frozenset({"batch_size"}),
    ),
    "predict": Mode(
        "name what a checkpoint sees in --images",
        "predict",
        frozenset({"FAR model", "prediction"}),
        frozenset({"ds_mode"}),
        frozenset("device lstm_backend amp scale base_model input_size batch_size num_workers".split()),
    ),
}


def add_distillation_group(parser: Parser) -> None:
    g = parser.add_argument_group("distillation")
    kinds = f"{', '.join(names.LOSSES)}, or a sum like similarity+0.5*kl of {', '.join(names.TERMS)}"
    g.add_argument("--train-loss", type=arguments.loss, default="combine", help=f"loss of the attention stage: {kinds}")
    g.add_argument(
        "--block-ft-train-loss",
        type=arguments.loss,
        default="classification",
        help="loss of the block stage, alike; preserve is the sum of the first three and needs no label",
    )
    g.add_argument(
        "--block-ft-mode", choices=("block", "FC", "FC+head"), default="block", help="what the block stage trains"
    )
    g.add_argument(
        "--train-mode",
        choices=("parallel", "sequential"),
        default="sequential",
        help="all replaced blocks at once, or --step at a time, front to back",
    )
    g.add_argument("--step", type=arguments.SIZE, default=12, help="blocks a step of sequential training")
    g.add_argument(
        "--distill-input",
        choices=("teacher", "student"),
        default="student",
        help="what a student block reads: the teacher's input to it, or the student's running state",
    )
    g.add_argument("--skip-train-attn", action="store_true", help="go straight to the block stage")
    arguments.add_file(g, "--attn-weight", "FAR weights to start from, after the attention stage")
    g.add_argument(
        "--finetune-head", action="store_true", help="then train the classifier alone, with the block-ft flags"
    )


def add_far_group(parser: Parser) -> None:
    g = parser.add_argument_group("FAR model")
    arguments.add_file(g, "--far-weight", "FAR checkpoint; default: PRETRAINED_PATH in main.py")
    g.add_argument(
        "--fuse",
        choices=names.PRECISIONS,
        help="eval, predict: as one operator where the CPU engine covers the model, matrix products in this precision",
    )
    g.add_argument("--ds-pruned", action="store_true", help="start from the pruned model, PRETRAINED_PATH_PRUNE")
    g.add_argument("--ds-mode", choices=("full", "FC", "FC+head"), default="full", help="what downstream trains")


def add_prediction_group(parser: Parser) -> None:
    g = parser.add_argument_group("prediction")
    g.add_argument("--images", type=arguments.path, metavar="PATH", help="a picture, or a folder of them")
    g.add_argument("--output", type=arguments.table, metavar="FILE", help="write a .csv or .json, not to the terminal")
    g.add_argument("--top", type=arguments.SIZE, default=5, help="classes named a picture")


def build_parser() -> Parser:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--mode",
        choices=tuple(MODES),
        default="train",
        help="; ".join(f"{name}: {mode.does}" for name, mode in MODES.items()),
    )
    arguments.add_run_group(parser)
    arguments.add_model_group(parser)
    arguments.add_data_group(parser)
    arguments.add_augmentation_group(parser)
    add_distillation_group(parser)
    add_far_group(parser)
    add_prediction_group(parser)
    arguments.add_optim_group(parser, "optimisation", "", 200, 5e-4, 1e-5)
    arguments.add_optim_group(parser, "optimisation of the block stage", "block-ft-", 100, 5e-5, 1e-6)
    arguments.add_unscale(parser.add_argument_group("rates"))
    return parser


def parse(argv: list[str] | None) -> Namespace:
    """The flags. Ends with one line where the mode would ignore one, or two contradict each other."""
    parser = build_parser()
    args = parser.parse_args(argv)
    mode = MODES[args.mode]
    read = parser.titled(mode.groups) - mode.ignores | mode.reads | {"mode", "help"}
    parser.refuse(argv, {action.dest for action in parser._actions} - read, f"--mode {args.mode} does not use it")
    return args


def configure(args: Namespace):
    """The flags as typed configurations, an `engine.modes.ModeCommand`: the modes know no others."""
    from engine.configs import FarSource, Rates
    from engine.modes import ModeCommand
    from engine.stages import Optim, Plan
    from utils.run_folder import Record, RunConfig

    tables = (PRETRAINED_PATH_PRUNE, PRETRAINED_PATH) if args.ds_pruned else (PRETRAINED_PATH, PRETRAINED_PATH_PRUNE)
    return pick(
        ModeCommand,
        args,
        run=pick(RunConfig, args, record=Record(vars(args), vars(build_parser().parse_args([])))),
        rates=Rates(pick(Optim, args), "--opt", args.unscale_lr),
        block_rates=Rates(pick(Optim, args, "block_ft_"), "--block-ft-opt", args.unscale_lr),
        plan=pick(Plan, args, skip_train_attn=args.skip_train_attn or args.mode == "block-distill"),
        far=FarSource("--far-weight", args.far_weight, tables),
    )


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    from engine import modes
    from models import kernels
    from utils import distributed

    with distributed.joined(args.distributed, args.device, args.dist_timeout) as context:
        command = configure(args)
        context.on_main(command.run.check)
        kernels.check(args.lstm_backend, context.device)
        getattr(modes, MODES[args.mode].job)(command, context)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
