"""FAR: regularize a FAR model's hidden units, remove the weak ones for good, fine-tune what is left. See README.md."""

import sys

import utils  # noqa: F401  (first: makes torchvision importable beside a torch it was not built for)
from main import PRETRAINED_PATH
from models import kernels
from utils import distributed
from utils.errors import run_script

from engine.pruning import build_parser, prune  # isort: skip
from engine.train import Stopped  # isort: skip


def main(argv: list[str] | None = None) -> int:
    args = build_parser(__doc__).parse_args(argv)
    try:
        context = distributed.start(args.distributed, args.device)
        kernels.check(args.lstm_backend, context.device)
        prune(args, context, PRETRAINED_PATH)
    except Stopped as stopped:
        print(stopped)
    finally:
        distributed.stop()
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
