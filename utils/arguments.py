"""The argument groups, shared by the scripts. A name here is the flag; its help says what it does."""

import argparse
from pathlib import Path

from utils.errors import FarError

SCHEDULES = ("cosine", "tanh", "step", "poly")


class Parser(argparse.ArgumentParser):
    """Errors are one line; help shows defaults."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message: str):
        self.exit(2, f"error: {message}; see --help\n")


def number(kind: type, low: float, high: float = float("inf"), open_low: bool = False):
    """A converter for numbers in [low, high], or (low, high] with `open_low`."""

    def convert(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not (low < value if open_low else low <= value) or not value <= high:
            edge = "above" if open_low else "at least"
            most = f" and at most {high:g}" if high != float("inf") else ""
            raise argparse.ArgumentTypeError(f"{text} must be {edge} {low:g}{most}")
        return value

    return convert


COUNT, SIZE = number(int, 0), number(int, 1)
RATE, SHARE, PART = number(float, 0), number(float, 0, 1), number(float, 0, 1, open_low=True)
OnOff = argparse.BooleanOptionalAction


def optional_rate(text: str) -> float | None:
    return None if text == "none" else number(float, 0, open_low=True)(text)


def add_run_group(parser: Parser, backends: tuple[str, ...], amp: tuple[str, ...]) -> None:
    g = parser.add_argument_group("run")
    g.add_argument("--output-dir", type=Path, help="the run's folder; default runs/<mode>-<time>")
    g.add_argument("--resume", action="store_true", help="continue the run in --output-dir from its last.pth")
    g.add_argument("--seed", type=COUNT, default=42, help="seed of every random draw")
    g.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto is CUDA where there is one")
    g.add_argument("--distributed", action="store_true", help="join torchrun's processes (NCCL on CUDA, else gloo)")
    g.add_argument("--amp", choices=amp, default="off", help="mixed precision")
    g.add_argument("--lstm-backend", choices=backends, default="auto", help="LSTM kernel; auto: the C++ one on a CPU, else torch")
    g.add_argument("--select", choices=("best", "last"), default="best",
                   help="weights a stage hands on: best evaluation top-1, or the last epoch's")  # fmt: skip


def add_model_group(parser: Parser, models, scales, replacements) -> None:
    g = parser.add_argument_group("model")
    g.add_argument("--base-model", choices=tuple(models), help="the teacher; default by --scale, else DeiT-Tiny")
    g.add_argument("--scale", choices=tuple(scales), help="short form of --base-model")
    g.add_argument("--base-weight", type=Path, metavar="FILE",
                   help="teacher weights, timm or DeiT layout, .pth or .safetensors; default: timm's pretrained")  # fmt: skip
    g.add_argument("--rep-by", choices=tuple(replacements), default="multi-lstm", help="what replaces attention")
    g.add_argument("--replace", nargs="+", default=["all"], metavar="BLOCKS", help="blocks to replace: 0-11 or 0,2,5-7")
    g.add_argument("--rep-init", choices=("chrono", "value", "random"), default="chrono",
                   help="value: pre_proj starts as the teacher's value projection; chrono: long memory besides; random: neither")  # fmt: skip
    g.add_argument("--drop", type=SHARE, default=0.0, help="dropout before the classifier and in the MLPs' projections")
    g.add_argument("--drop-path", type=SHARE, default=0.1, help="stochastic depth of the student at its last block")


def add_data_group(parser: Parser) -> None:
    g = parser.add_argument_group("data")
    g.add_argument("--dataset", default="IMNET", help="IMNET, CIFAR10, CIFAR100, FLOWER, CAR, INAT18, INAT19, FOLDER or DIGITS")
    g.add_argument("--data-path", type=Path, help="the data set's folder; default data/<dataset>")
    g.add_argument("--download", action="store_true", help="fetch the data set where torchvision can")
    g.add_argument("--input-size", type=SIZE, help="image side in pixels; default 224, DeiT-Micro 32")
    g.add_argument("--train-subset", type=PART, default=1.0, help="share of the training images used")
    g.add_argument("--holdout", type=number(float, 0, 0.9), default=0.0,
                   help="evaluate on this share of the training split, kept out of training: for tuning choices")  # fmt: skip
    g.add_argument("--num-workers", type=COUNT, default=8, help="loader processes; results do not depend on it")
    g = parser.add_argument_group("augmentation")
    g.add_argument("--color-jitter", type=RATE, default=0.3, help="used where --aa is none")
    g.add_argument("--aa", default="rand-m9-mstd0.5-inc1", help="timm's auto-augment policy, or none")
    g.add_argument("--train-interpolation", choices=("random", "bilinear", "bicubic"), default="bicubic", help="resizing")
    g.add_argument("--eval-crop-ratio", type=PART, default=0.875, help="centre crop over resized side")
    g.add_argument("--reprob", type=SHARE, default=0.25, help="random erasing: probability")
    g.add_argument("--remode", choices=("const", "rand", "pixel"), default="pixel", help="random erasing: fill")
    g.add_argument("--recount", type=SIZE, default=1, help="random erasing: rectangles")
    g.add_argument("--repeated-aug", action="store_true", help="repeated augmentation: 3 views of a third of the images")
    g.add_argument("--mixup", type=RATE, default=0.0, help="mixup alpha, 0 is off")
    g.add_argument("--cutmix", type=RATE, default=0.0, help="CutMix alpha, 0 is off")
    g.add_argument("--smoothing", type=number(float, 0, 0.99), default=0.1, help="label smoothing")


def add_optim_group(parser: Parser, title: str, prefix: str, epochs: int, lr: float, warmup_lr: float) -> None:
    """One family of optimiser flags; `prefix` is empty or `block-ft-`."""
    g = parser.add_argument_group(title)

    def add(name: str, **kwargs) -> None:
        g.add_argument(f"--{prefix}{name}", **kwargs)

    add("batch-size", type=SIZE, default=256, help="images a process and step")
    add("epochs", type=COUNT, default=epochs, help="passes over the training images, for each step of --step blocks; 0 leaves the stage out")
    add("lr", type=RATE, default=lr, help="peak rate for a global batch of 512")
    add("warmup-epochs", type=RATE, default=5, help="epochs of linear warm-up")
    add("warmup-lr", type=RATE, default=warmup_lr, help="rate at the start of warm-up")
    add("min-lr", type=RATE, default=1e-6, help="rate at the end of the schedule")
    add("sched", choices=SCHEDULES, default="cosine", help="schedule, by timm")
    add("opt", default="adamw", help="optimiser, any of timm's")
    add("momentum", type=RATE, default=0.9, help="for sgd and rmsprop")
    add("weight-decay", type=RATE, default=0.05, help="biases and norms never decay")
    add("clip-grad", type=optional_rate, default=None, help="clip the gradient's norm at this value, or none")
    add("accum-steps", type=SIZE, default=1, help="batches added up for one step")


def choose_model(args, scales: dict[str, str]) -> str:
    """--base-model and --scale name one model. Raises FarError where they disagree."""
    by_scale = scales.get(args.scale)
    if args.base_model and by_scale and args.base_model != by_scale:
        raise FarError(f"--scale {args.scale}: means {by_scale}, but --base-model is {args.base_model}; make them agree")
    return args.base_model or by_scale or "DeiT-Tiny"
