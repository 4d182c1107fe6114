"""The argument groups, shared by the scripts. A name here is the flag; its help says what it does."""

import argparse
import math
import sys
from collections.abc import Collection
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from utils import names
from utils.errors import one_line, tell
from utils.files import expanded

SCHEDULES = ("cosine", "tanh", "step", "poly")


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, as a user would type them, where there is one and the text does not name it by itself."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if default is None or default is False or default == argparse.SUPPRESS or "default" in text:
            return text
        values = default if isinstance(default, list | tuple) else [default]
        return f"{text} (default: {' '.join(map(str, values))})" if action.option_strings else text


class Parser(argparse.ArgumentParser):
    """Errors are one line; help shows defaults."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=Help, allow_abbrev=False, **kwargs)

    def error(self, message: str):
        tell(f"error: {one_line(message)}; see --help")
        self.exit(2)

    def _get_values(self, action: argparse.Action, arg_strings: list[str]):
        """argparse's, which before Python 3.13 makes an empty list of `--flag=--`."""
        if action.option_strings and arg_strings == ["--"]:
            raise argparse.ArgumentError(action, "-- is no value; name one")
        return super()._get_values(action, arg_strings)

    def given(self, argv: list[str] | None) -> dict[str, str]:
        """The flags that a command line names, by destination."""
        words = {word.partition("=")[0] for word in (sys.argv[1:] if argv is None else argv)}
        return {action.dest: flag for action in self._actions for flag in action.option_strings if flag in words}

    def titled(self, titles: Collection[str]) -> set[str]:
        """The destinations of the flags in groups of these titles."""
        return {
            action.dest for group in self._action_groups if group.title in titles for action in group._group_actions
        }

    def refuse(self, argv: list[str] | None, dests: Collection[str], reason: str) -> None:
        """Ends with one line where a command line names a flag of `dests`: a flag that is accepted does something."""
        for dest, flag in self.given(argv).items():
            if dest in dests:
                self.error(f"{flag}: {reason}; leave it out")


Configuration = TypeVar("Configuration")


def pick(kind: type[Configuration], args: argparse.Namespace, prefix: str = "", **given) -> Configuration:
    """A configuration (a dataclass) out of the flags.

    Each field is given, or a configuration itself, or the flag of its name behind `prefix`; a script that has no such
    flag leaves the field its default.
    """
    flags = vars(args)
    for field in fields(kind):
        if field.name not in given and is_dataclass(field.type):
            given[field.name] = pick(field.type, args)
        elif field.name not in given and prefix + field.name in flags:
            given[field.name] = flags[prefix + field.name]
    return kind(**given)


MOST = 2**31 - 1


def number(kind: type, low: float, high: float = float("inf"), open_low: bool = False):
    """A converter for finite numbers in [low, high], or (low, high] with `open_low`."""
    high = min(high, MOST) if kind is int else high

    def convert(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' if kind is int else ''}number") from None
        if not (low < value if open_low else low <= value) or not value <= high or not math.isfinite(value):
            edge = "above" if open_low else "at least"
            most = f" and at most {high:g}" if high not in (math.inf, MOST) else ""
            raise argparse.ArgumentTypeError(f"{text:.40} must be a finite number {edge} {low:g}{most}")
        return value

    return convert


COUNT, SIZE, SEED, EPOCHS = number(int, 0), number(int, 1), number(int, 0, 2**31 - 1), number(int, 0, 9999)
RATE, SHARE, PART = number(float, 0), number(float, 0, 1), number(float, 0, 1, open_low=True)
SECONDS, MINUTES = number(float, 0, 86400, open_low=True), number(float, 0, 10080, open_low=True)
OnOff = argparse.BooleanOptionalAction


def path(text: str) -> Path:
    """`~` is the home folder here, too: a shell leaves that of --flag=~/x as it is."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty; name a file or folder")
    found = expanded(text)
    try:
        found.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass  # told where it is known what should be there
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", str(error))
        raise argparse.ArgumentTypeError(f"{text:.80}: {reason}; name another file or folder") from None
    return found


def table(text: str) -> Path:
    found = path(text)
    if found.suffix.lower() not in names.TABLES:
        raise argparse.ArgumentTypeError(f"{text:.80}: its name must end in {' or '.join(names.TABLES)}")
    return found


def optional_rate(text: str) -> float | None:
    return None if text == "none" else number(float, 0, open_low=True)(text)


class Latency(NamedTuple):
    """A time: milliseconds, or percent of the teacher's."""

    amount: float
    percent: bool

    def __str__(self) -> str:
        return f"{self.amount:g}{'%' * self.percent}"


def latency(text: str) -> Latency:
    return Latency(number(float, 0, open_low=True)(text.removesuffix("%")), text.endswith("%"))


def loss(text: str) -> str:
    """A loss by name, or a sum of terms."""
    try:
        if text not in names.LOSSES:
            names.loss_terms(text)
    except ValueError:
        known, terms = ", ".join(names.LOSSES), ", ".join(names.TERMS)
        raise argparse.ArgumentTypeError(
            f"{text:.80} is none of {known}, nor a sum like similarity+0.5*kl of {terms}"
        ) from None
    return text


def dataset(text: str) -> str:
    """A data set by name, or one that timm's readers stream."""
    if text.startswith(("hfds/", "hfids/")):
        raise argparse.ArgumentTypeError(
            f"{text:.80}: HuggingFace's package datasets cannot be imported beside FAR's own folder of that name; save "
            "it as class folders and take FOLDER, or as WebDataset tars and take wds/NAME"
        )
    if text not in names.DATASETS and not names.is_stream(text):
        streams = " or ".join(f"{kind}/NAME" for kind in names.STREAMS)
        raise argparse.ArgumentTypeError(f"{text:.80} is none of {', '.join(names.DATASETS)}, nor {streams}")
    return text


def add_file(group, flag: str, meaning: str, required: bool = False) -> None:
    group.add_argument(flag, type=path, metavar="FILE", help=meaning, required=required)


def add_device(group) -> None:
    group.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto is CUDA where there is one"
    )


def add_backend(group) -> None:
    group.add_argument(
        "--lstm-backend",
        choices=names.BACKENDS,
        default="auto",
        help="LSTM kernel; auto: on CUDA the fastest that gives torch's results, on a CPU the C++ one, else torch",
    )


def add_student(group) -> None:
    add_average(group)
    group.add_argument("--drop", type=SHARE, default=0.0, help="dropout before the classifier")
    group.add_argument("--drop-path", type=SHARE, default=0.1, help="stochastic depth of the student at its last block")


def add_unscale(group) -> None:
    group.add_argument("--unscale-lr", action="store_true", help="take rates as given, not times global batch / 512")


def add_machine(g) -> None:
    """Where and how a run computes."""
    add_device(g)
    g.add_argument("--distributed", action="store_true", help="join torchrun's processes (NCCL on CUDA, else gloo)")
    g.add_argument(
        "--dist-timeout",
        type=MINUTES,
        default=30.0,
        metavar="MINUTES",
        help="how long processes wait for one another: longer than a download, shorter than you would for a dead node",
    )
    g.add_argument(
        "--amp",
        choices=names.AMP,
        default="auto",
        help="mixed precision; auto: bf16 on a GPU that computes in it, else off. Gates and cell state stay float32",
    )
    add_backend(g)
    g.add_argument(
        "--compile",
        action="store_true",
        help="train with compiled blocks: on a GPU, where it takes minutes first; on a CPU it did not pay",
    )


def add_run_group(parser: Parser) -> None:
    g = parser.add_argument_group("run")
    g.add_argument("--output-dir", type=path, help="the run's folder; default runs/<mode>-<time>")
    g.add_argument(
        "--resume",
        nargs="?",
        const="must",
        choices=("must", "auto"),
        help="continue the run in --output-dir from its last.pth; auto: begin it where there is none yet",
    )
    g.add_argument("--dry-run", action="store_true", help="say what would train, on what and where to, and stop")
    g.add_argument("--seed", type=SEED, default=42, help="seed of every random draw")
    add_machine(g)
    g.add_argument("--tensorboard", action="store_true", help="write the logs for TensorBoard as well")
    g.add_argument("--eval-every", type=SIZE, default=1, metavar="EPOCHS", help="evaluate so often, and at the end")
    g.add_argument("--save-every", type=SIZE, default=1, metavar="EPOCHS", help="write last.pth so often, and at stops")
    g.add_argument(
        "--select",
        choices=("best", "last"),
        default="best",
        help="weights a stage hands on: best evaluation top-1, or the last epoch's",
    )


def add_model_name(group, meaning: str) -> None:
    known = f"{', '.join(names.MODELS)}, or a VisionTransformer by timm's name"
    group.add_argument("--base-model", metavar="NAME", help=f"{meaning}; {known}")
    group.add_argument("--scale", choices=tuple(names.SCALES), help="short form of --base-model")


def add_model_group(parser: Parser) -> None:
    g = parser.add_argument_group("model")
    add_model_name(g, "the teacher; default: what --base-weight says, else DeiT-Tiny")
    add_file(
        g, "--base-weight", "teacher weights, timm or DeiT layout, .pth or .safetensors; default: timm's pretrained"
    )
    g = parser.add_argument_group("replacement")
    g.add_argument("--rep-by", choices=names.REPLACEMENTS, default="multi-lstm", help="what replaces attention")
    g.add_argument("--replace", nargs="+", default=["all"], metavar="BLOCKS", help="blocks to replace: 0-11 or 0,2,5-7")
    g.add_argument(
        "--rep-init",
        choices=("chrono", "value", "random"),
        default="chrono",
        help="value: pre_proj starts as the teacher's value projection; chrono: long memory besides; random: neither",
    )
    add_student(parser.add_argument_group("student"))


def add_dataset(group) -> None:
    group.add_argument(
        "--dataset",
        type=dataset,
        default="IMNET",
        metavar="NAME",
        help=f"the data set: {', '.join(names.DATASETS)}; wds/NAME: WebDataset tars and their _info.json in "
        "--data-path, whatever the NAME; tfds/NAME: one of TensorFlow Datasets, made there before",
    )
    group.add_argument(
        "--images-only",
        dest="dataset",
        action="store_const",
        const="IMAGES",
        default=argparse.SUPPRESS,
        help="the same as --dataset IMAGES: a folder of pictures, without classes",
    )


def add_data_group(parser: Parser) -> None:
    g = parser.add_argument_group("data")
    add_dataset(g)
    g.add_argument("--data-path", type=path, help="the data set's folder; default data/<dataset>, or its package's")
    g.add_argument("--download", action="store_true", help="fetch the data set where torchvision can")
    g.add_argument("--input-size", type=number(int, 1, 8192), help="image side in pixels; default: the model's")
    g.add_argument(
        "--holdout",
        type=number(float, 0, 0.9),
        default=0.0,
        help="evaluate on this share of the training split, kept out of training: for tuning choices",
    )
    g.add_argument(
        "--num-workers",
        type=number(int, 0, 1024),
        default=8,
        help="loader processes; results do not depend on it, but for the order of wds/ and tfds/",
    )
    g.add_argument(
        *("--eval-crop-ratio", "--crop-pct"),
        type=number(float, 0.1, 1),
        help="centre crop over resized side; default: as the model was trained, DeiT 0.875, none up to 32 pixels",
    )
    for name, low in (("mean", -1e3), ("std", 0)):
        value = number(float, low, open_low=True)
        g.add_argument(
            f"--{name}", type=value, nargs=3, metavar=("R", "G", "B"), help="of values 0 to 1; default: the model's"
        )
    add_classes(g)


def add_classes(group) -> None:
    group.add_argument(
        "--nb-classes",
        type=SIZE,
        metavar="N",
        help="classes of the model; default: the data set's, which must not be more. Weights of another number get a "
        "fresh classifier in --mode teacher and downstream",
    )
    group.add_argument(
        "--inat-category",
        choices=names.INAT_CATEGORIES,
        default="name",
        help="what a class of INAT18 and INAT19 is, by the competition's categories.json",
    )


def add_average(group) -> None:
    group.add_argument(
        "--model-ema",
        type=number(float, 0, 1, open_low=True),
        nargs="?",
        const=0.9998,
        metavar="DECAY",
        help="evaluate, save and hand on the moving average of a stage's weights; default decay 0.9998, less at first",
    )


def add_augmentation_group(parser: Parser) -> None:
    g = parser.add_argument_group("augmentation")
    g.add_argument("--train-subset", type=PART, default=1.0, help="share of the training images used")
    g.add_argument("--hflip", type=SHARE, help="mirror left and right: probability; default 0.5, DIGITS 0")
    g.add_argument("--vflip", type=SHARE, default=0.0, help="upside down: probability")
    g.add_argument("--color-jitter", type=RATE, default=0.3, help="used where --aa is none")
    g.add_argument("--aa", default="rand-m9-mstd0.5-inc1", help="timm's auto-augment policy, or none")
    g.add_argument(
        "--train-interpolation", choices=("random", "bilinear", "bicubic"), default="bicubic", help="resizing"
    )
    g.add_argument("--reprob", type=SHARE, default=0.25, help="random erasing: probability")
    g.add_argument("--remode", choices=("const", "rand", "pixel"), default="pixel", help="random erasing: fill")
    g.add_argument("--recount", type=SIZE, default=1, help="random erasing: rectangles")
    g.add_argument(
        "--repeated-aug", action="store_true", help="repeated augmentation: 3 views of a third of the images"
    )
    g.add_argument("--mixup", type=RATE, default=0.0, help="mixup alpha, 0 is off")
    g.add_argument("--cutmix", type=RATE, default=0.0, help="CutMix alpha, 0 is off")
    g.add_argument("--mixup-prob", type=SHARE, default=1.0, help="probability that a batch is mixed, by either")
    g.add_argument("--smoothing", type=number(float, 0, 0.99), default=0.1, help="label smoothing")


def add_optim_group(parser: Parser, title: str, prefix: str, epochs: int, lr: float, warmup_lr: float) -> None:
    """One family of optimiser flags; `prefix` is empty or `block-ft-`."""
    g = parser.add_argument_group(title)

    def add(name: str, **kwargs) -> None:
        g.add_argument(f"--{prefix}{name}", **kwargs)

    add("batch-size", type=SIZE, default=256, help="images a process and step")
    add(
        "epochs",
        type=EPOCHS,
        default=epochs,
        help="passes over the training images, for each step of --step blocks; 0 leaves the stage out",
    )
    add("lr", type=RATE, default=lr, help="peak rate for a global batch of 512")
    add("warmup-epochs", type=RATE, default=5, help="epochs of linear warm-up")
    add("warmup-lr", type=RATE, default=warmup_lr, help="rate at the start of warm-up")
    add("min-lr", type=RATE, default=1e-6, help="rate at the end of the schedule")
    add("sched", choices=SCHEDULES, default="cosine", help="schedule, by timm")
    add("opt", default="adamw", help="optimiser, any of timm's")
    add("opt-eps", type=RATE, default=None, help="the optimiser's epsilon; default: its own")
    add("opt-betas", type=SHARE, nargs=2, default=None, metavar="B", help="Adam's two; default: its own")
    add("decay-rate", type=RATE, default=None, help="--sched step: factor of a drop; poly: the power; default 0.1")
    add("momentum", type=RATE, default=0.9, help="for sgd and rmsprop")
    add("weight-decay", type=RATE, default=0.05, help="biases and norms never decay")
    add("clip-grad", type=optional_rate, default=None, help="clip the gradient's norm at this value, or none")
    add("accum-steps", type=SIZE, default=1, help="batches added up for one step")
