"""FAR: train a teacher, replace its attention, distil, move downstream, evaluate. See README.md."""

import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from utils.arguments import Parser, pick
from utils.configs import (
    DataConfig,
    ModeCommand,
    ModelConfig,
    ModelName,
    Optim,
    Plan,
    Prediction,
    RunConfig,
    Settings,
    add_images_only,
)
from utils.files import expanded
from utils.script import run_script

# Where downstream finds a FAR model when --far-weight is not given, by scale.
PRETRAINED_PATH = {"Tiny": "", "Small": "", "Base": "", "Micro": "runs/demo/far/best.pth"}
PRETRAINED_PATH_PRUNE = {"Tiny": "", "Small": "", "Base": "", "Micro": "runs/demo/prune/best.pth"}


@dataclass(frozen=True)
class Mode:
    """What a mode does, and the flags it reads: groups of them, some of those left out, some others besides."""

    does: str
    function: str  # a function of engine.modes, imported when it runs: --help must not wait for torch
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
    "teacher": Mode("train the attention model itself", "train_teacher", _TRAINING | {"optimisation"}),
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


def build_parser() -> Parser:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--mode",
        choices=tuple(MODES),
        default="train",
        help="; ".join(f"{name}: {mode.does}" for name, mode in MODES.items()),
    )
    parser.add_flags(RunConfig, ModelConfig, DataConfig, Settings, Plan, ModeCommand, Prediction)
    add_images_only(parser)
    parser.add_flags(Optim, title="optimisation")
    block = {"epochs": 100, "lr": 5e-5, "warmup_lr": 1e-6}
    parser.add_flags(Optim, prefix="block-ft-", title="optimisation of the block stage", defaults=block)
    return parser


def parse(argv: list[str] | None) -> Namespace:
    """The flags. Ends with one line where the mode would ignore one, or two contradict each other."""
    parser = build_parser()
    args = parser.parse_args(argv)
    mode = MODES[args.mode]
    read = parser.titled(mode.groups) - mode.ignores | mode.reads | {"mode", "help"}
    parser.refuse(argv, {action.dest for action in parser._actions} - read, f"--mode {args.mode} does not use it")
    return args


def find_published(args: Namespace, table: dict[str, str] = PRETRAINED_PATH) -> Path | None:
    """The checkpoint that a table names for the model's scale."""
    file = table.get(pick(ModelName, args).name.removeprefix("DeiT-"))
    return expanded(file) if file else None


def configure(args: Namespace) -> ModeCommand:
    if args.mode in ("downstream", "predict") or args.ds_pruned or (args.mode == "eval" and not args.base_weight):
        table = PRETRAINED_PATH_PRUNE if args.ds_pruned else PRETRAINED_PATH
        args.far_weight = args.far_weight or find_published(args, table)
    return pick(
        ModeCommand,
        args,
        run=pick(RunConfig, args, record=vars(args)),
        block_ft_optim=pick(Optim, args, "block_ft_", family="block-ft-"),
        plan=pick(Plan, args, skip_train_attn=args.skip_train_attn or args.mode == "block-distill"),
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
        getattr(modes, MODES[args.mode].function)(command, context)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
