"""FAR: regularize a FAR model's hidden units, remove the weak ones for good, fine-tune what is left. See README.md."""

import sys

from engine.pruning import build_parser, prune
from main import PRETRAINED_PATH
from models import kernels
from utils import arguments, distributed
from utils.errors import run_script


def main(argv: list[str] | None = None) -> int:
    args = build_parser(__doc__).parse_args(argv)
    arguments.check_run(args)
    with distributed.joined(args.distributed, args.device) as context:
        kernels.check(args.lstm_backend, context.device)
        prune(args, context, PRETRAINED_PATH)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
