"""FAR: regularize a FAR model's hidden units, remove the weak ones for good, fine-tune what is left. See README.md."""

import sys
from argparse import Namespace

from main import find_published
from utils.arguments import Parser, pick
from utils.configs import DataConfig, ModelConfig, Optim, PruneCommand, RunConfig, Settings, add_images_only
from utils.script import run_script


def build_parser() -> Parser:
    parser = Parser(description=__doc__)
    parser.add_flags(RunConfig, ModelConfig, PruneCommand, DataConfig, Settings, without=("replacement",))
    add_images_only(parser)
    parser.add_flags(Optim, title="optimisation while regularizing")
    fine_tuning = {"epochs": 30, "lr": 5e-6, "warmup_lr": 1e-6}
    parser.add_flags(Optim, prefix="ft-", title="optimisation of the fine-tuning", defaults=fine_tuning)
    return parser


def configure(args: Namespace) -> PruneCommand:
    if args.distill_loss is None and args.base_weight and args.distill is not False:
        args.distill_loss = "preserve"  # here, so that args.json says it and a run goes on with what it began
    args.model_path = args.model_path or find_published(args)
    return pick(
        PruneCommand,
        args,
        run=pick(RunConfig, args, mode="prune", record=vars(args)),
        ft_optim=pick(Optim, args, "ft_", family="ft-"),
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
