"""FAR: train a teacher, replace its attention, distil, move downstream, evaluate. See README.md."""

import sys

from engine.jobs import JOBS, build_parser, parse
from models import kernels
from utils import distributed
from utils.errors import run_script

# Where downstream finds a FAR model when --far-weight is not given, by scale.
PRETRAINED_PATH = {"Tiny": "", "Small": "", "Base": "", "Micro": "runs/demo/far/best.pth"}
PRETRAINED_PATH_PRUNE = {"Tiny": "", "Small": "", "Base": "", "Micro": "runs/demo/prune/best.pth"}


def main(argv: list[str] | None = None) -> int:
    args = parse(build_parser(__doc__), argv)
    with distributed.joined(args.distributed, args.device) as context:
        kernels.check(args.lstm_backend, context.device)
        JOBS[args.mode].run(args, context, (PRETRAINED_PATH, PRETRAINED_PATH_PRUNE))
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
