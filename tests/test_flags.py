"""A flag that is accepted does what its help says: a table of flag, command line, what is looked at, what it must be.

READY rows look at the trainer that main.py made and has not started, DONE rows at a finished run. Rows of one command
line share it.
"""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from pytest import approx
from timm.data.auto_augment import RandAugment
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision import transforms
from torchvision.transforms import InterpolationMode

import main
from datasets import loading
from datasets.registry import build_split
from engine.stages import select_trainable
from engine.train import Trainer
from models import kernels
from models.deit import create_teacher
from models.kernels import KERNELS
from models.replace import swap_attention
from tests.conftest import EVAL, assert_equal, rows, weights
from tests.test_kernels import watch
from utils.checkpoint import load
from utils.preprocessing import Preprocessing

# 84 of 1,408 training images, three batches of 24; 29 images held out.
BASE = "--dataset DIGITS --scale Micro --train-subset 0.06 --holdout 0.02 --num-workers 0 --select last --seed 3"
TEACHER = f"--mode teacher {BASE}"
TRAIN = (
    f"--mode train {BASE} --aa none --reprob 0 --color-jitter 0 --base-weight TEACHER "
    "--batch-size 24 --block-ft-batch-size 24 --epochs 1 --block-ft-epochs 1"
)


class Ready(Exception):
    """Carries a trainer out of main.py before it starts."""


def stop(trainer: Trainer):
    raise Ready(trainer)


@pytest.fixture(scope="module")
def run(teacher, far, tmp_path_factory):
    """Runs main.py on a command line, with the weights made here in the places of TEACHER and FAR; its folder."""
    places = {"TEACHER": str(teacher), "FAR": str(far / "best.pth")}

    def run(line: str):
        folder = tmp_path_factory.mktemp("flags") / "run"
        words = [places.get(word, word) for word in line.split()]
        assert main.main([*words, "--output-dir", str(folder)]) == 0
        return folder

    return run


@pytest.fixture(scope="module")
def ready(run):
    """The trainer of a command line, not yet started."""

    @functools.cache
    def get(line: str) -> Trainer:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Ready) as caught:
            patch.setattr(Trainer, "fit", stop)
            run(line)
        return caught.value.args[0]

    return get


class Finished:
    """What a run left in its folder."""

    def __init__(self, folder):
        self.log, self.steps = rows(folder), rows(folder, "steps.jsonl")
        optimizer = load(folder / "last.pth")["optimizer"]
        self.groups, self.state = optimizer["param_groups"], list(optimizer["state"].values())
        self.rates = [row["lr"] for row in self.log]


@pytest.fixture(scope="module")
def done(run):
    """The finished run of a command line."""
    return functools.cache(lambda line: Finished(run(line)))


def find(trainer, kind):
    return [step for step in trainer.data.train.transform.transforms if isinstance(step, kind)]


def erasing(trainer):
    (step,) = find(trainer, RandomErasing)
    return step.probability, step.min_count, step.max_count, step.per_pixel, step.rand_color


def flips(trainer):
    kinds = transforms.RandomHorizontalFlip, transforms.RandomVerticalFlip
    return [step.p for kind in kinds for step in find(trainer, kind)]


def precision(trainer):
    with trainer.autocast():
        return trainer.model(trainer.data.val[0][0][None]).dtype, trainer.scaler.is_enabled()


def drop_rates(trainer):
    return [getattr(part, "drop_prob", 0) for b in trainer.model.blocks for part in (b.drop_path1, b.drop_path2)]


def prepared(trainer):
    """How images are read, and how the checkpoint will say that they were."""
    return {trainer.data.preprocessing, trainer.config.preprocessing}


def smoothed(trainer):
    """The loss, and torch's with label smoothing 0.3."""
    logits, targets = torch.randn(7, 10), torch.randint(10, (7,))
    expected = F.cross_entropy(logits, targets, label_smoothing=0.3)
    return (trainer.settings.criterion()(logits, targets) - expected).item()


def mixing(trainer):
    mixup = trainer.mixup
    return mixup.mixup_alpha, mixup.cutmix_alpha, mixup.mix_prob, mixup.label_smoothing


def trained(trainer):
    """Which parts a stage trains, by stage."""
    parts = {}
    for stage in trainer.stages:
        select_trainable(trainer.model, stage)
        names = [name.split(".") for name, p in trainer.model.named_parameters() if p.requires_grad]
        parts[stage.name] = {name[2] if name[0] == "blocks" else name[0] for name in names}
    return parts


def stages(trainer):
    return [(stage.name, stage.swapped, stage.blocks) for stage in trainer.stages]


def losses(trainer):
    return [stage.loss for stage in trainer.stages]


def initial(trainer):
    """Whether pre_proj is the teacher's value projection; the forget gates' bias, where all of a head have the same."""
    value = trainer.model.blocks[1].attn.qkv.weight[128:].clone()
    swap_attention(trainer.model, (1,), trainer.config.rep_by, trainer.settings.rep_init)
    attn = trainer.model.blocks[1].attn
    biases = set(attn.lstm[0][0].bias_ih[32:64].tolist())
    return torch.equal(attn.pre_proj.weight, value), biases.pop() if len(biases) == 1 else None


def seeded(trainer):
    torch.manual_seed(5)
    fresh = create_teacher("DeiT-Micro", 10, 48).state_dict()
    same = all(torch.equal(value, fresh[name]) for name, value in trainer.model.state_dict().items())
    return same, trainer.settings.seed, trainer.data.config.seed


def cosine_rates():
    """Three updates of warm-up, then a cosine over nine; rates scaled by the batch; a row has its epoch's last."""
    warm, top, low = (rate * 24 / 512 for rate in (0.02, 0.05, 0.01))
    return [warm, *(low + (top - low) * (1 + math.cos(math.pi * update / 9)) / 2 for update in (5, 8))]


ALL = (
    f"{TEACHER} --seed 5 --drop 0.3 --drop-path 0.6 --smoothing 0.3 --aa none --color-jitter 0.7 --reprob 0.8 "
    "--remode const --recount 3 --train-interpolation bilinear --input-size 48 --num-workers 1 "
    "--repeated-aug"
)
MIXUP = f"{TEACHER} --mixup 0.8 --aa rand-m7-n3 --train-interpolation bilinear --amp bf16"
CUTMIX = f"{TEACHER} --cutmix 1.0 --aa none --color-jitter 0 --remode rand --amp fp16"
LOOKS = f"{TEACHER} --mean 0.1 0.2 0.3 --std 0.4 0.5 0.6 --eval-crop-ratio 0.5 --hflip 1 --vflip 0.25"
LOOKS += " --mixup 0.8 --mixup-prob 0.25"
SEQUENCE = f"{TRAIN} --replace 1 2-3 --step 2 --finetune-head --block-ft-mode FC+head --rep-init random"
SEQUENCE += " --train-loss similarity --block-ft-train-loss combine"
PARALLEL = f"{TRAIN} --train-mode parallel --step 2 --rep-init value --distill-input teacher"
PARALLEL += " --unscale-lr --lr 0.2 --block-ft-lr 0.3"
SMALL = f"{TEACHER.replace('--scale Micro', '')} --input-size 32"
FROM_FAR = f"{TRAIN} --attn-weight FAR --skip-train-attn"
BILINEAR = InterpolationMode.BILINEAR

READY = [
    ("--seed", ALL, seeded, (True, 5, 5)),
    ("--drop", ALL, lambda t: t.model.head_drop.p, 0.3),
    ("--drop-path", ALL, drop_rates, approx([0, 0, 0.2, 0.2, 0.4, 0.4, 0.6, 0.6])),
    ("--smoothing", ALL, smoothed, approx(0, abs=1e-5)),
    ("--aa", MIXUP, lambda t: [(p.ops[0].magnitude, p.num_layers) for p in find(t, RandAugment)], [(7, 3)]),
    ("--color-jitter", ALL, lambda t: find(t, transforms.ColorJitter)[0].brightness, approx((0.3, 1.7))),
    ("--reprob --remode --recount", ALL, erasing, (0.8, 1, 3, False, False)),
    ("--remode rand", CUTMIX, erasing, (0.25, 1, 1, False, True)),
    ("--train-interpolation", ALL, lambda t: find(t, RandomResizedCropAndInterpolation)[0].interpolation, BILINEAR),
    ("--input-size", ALL, lambda t: {t.data.train[0, 0][0].shape, t.data.val[0][0].shape}, {(3, 48, 48)}),
    ("--mean --std --eval-crop-ratio", LOOKS, prepared, {Preprocessing((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 0.5)}),
    ("--hflip --vflip", LOOKS, flips, [1.0, 0.25]),
    ("--mixup", MIXUP, mixing, (0.8, 0, 1, 0.1)),
    ("--cutmix", CUTMIX, mixing, (0, 1, 1, 0.1)),
    ("--mixup-prob", LOOKS, mixing, (0.8, 0, 0.25, 0.1)),
    ("--num-workers", ALL, lambda t: (t.data.train_loader(2).num_workers, t.data.val_loader(2).num_workers), (1, 1)),
    ("--repeated-aug", ALL, lambda t: len(set(t.data.train_loader(24).batch_sampler.sampler)), 84 // 3),
    ("--train-subset --holdout", ALL, lambda t: (len(t.data.train), len(t.data.val)), (84, 29)),
    ("--amp bf16", MIXUP, precision, (torch.bfloat16, False)),
    ("--amp fp16", CUTMIX, precision, (torch.float16, True)),
    ("--nb-classes", f"{TEACHER} --nb-classes 13", lambda t: {len(t.model.head.weight), t.config.num_classes}, {13}),
    ("--base-model", f"{SMALL} --base-model deit3_small_patch16_224", lambda t: t.model.embed_dim, 384),
    ("--scale", f"{SMALL} --scale Tiny", lambda t: t.model.embed_dim, 192),
    ("--train-mode", PARALLEL, stages, [("attn", (0, 1, 2, 3), (0, 1, 2, 3)), ("block", (0, 1, 2, 3), (0, 1, 2, 3))]),
    ("--block-ft-lr", PARALLEL, lambda t: [stage.optim.lr for stage in t.stages], [0.2, 0.3]),
    (
        "--replace --step --train-mode --finetune-head",
        SEQUENCE,
        stages,
        [
            *[("attn 1/2", (1, 2), (1, 2)), ("attn 2/2", (1, 2, 3), (3,))],
            *[("block 1/2", (1, 2, 3), (1, 2)), ("block 2/2", (1, 2, 3), (3,))],
            ("head", (1, 2, 3), (1, 2, 3)),
        ],
    ),
    ("--skip-train-attn --block-ft-mode full", FROM_FAR, trained, {"block": {"norm1", "attn", "norm2", "mlp"}}),
    ("--block-ft-mode FC", f"{FROM_FAR} --block-ft-mode FC", trained, {"block": {"mlp"}}),
    (
        "--block-ft-mode FC+head --finetune-head",
        f"{FROM_FAR} --block-ft-mode FC+head --finetune-head",
        trained,
        {"block": {"mlp", "head"}, "head": {"head"}},
    ),
    ("--rep-by", f"{TRAIN} --rep-by gru", lambda t: t.config.rep_by, "gru"),
    ("--rep-init value", PARALLEL, initial, (True, 1.0)),
    ("--rep-init random", SEQUENCE, initial, (False, 1.0)),
    ("--rep-init chrono", TRAIN, initial, (True, None)),
    ("--train-loss", SEQUENCE, losses, [*["similarity"] * 2, *["combine"] * 2, "classification"]),
    ("--distill-input", PARALLEL, lambda t: t.make_task(t.model, t.stages[0], None).distill_input, "teacher"),
]

COSINE = f"{TEACHER} --batch-size 24 --epochs 3 --lr 0.05 --warmup-epochs 1 --warmup-lr 0.02 --min-lr 0.01"
COSINE += " --weight-decay 0.3 --opt-eps 1e-3 --opt-betas 0.8 0.95"
STEP = f"{TEACHER} --batch-size 24 --epochs 2 --lr 0.02 --warmup-epochs 0 --sched step --decay-rate 0.5 --accum-steps 2"
STEP += " --opt sgd --momentum 0.7"
UPDATE = 24 * 2 / 512  # images, by which its rates are scaled

DONE = [
    ("--epochs", COSINE, lambda r: [row["epoch"] for row in r.log], [0, 1, 2, 3]),
    ("--batch-size", COSINE, lambda r: [row["step"] for row in r.steps], [0, 1, 2] * 3),
    ("--lr --warmup-lr --warmup-epochs --min-lr", COSINE, lambda r: [r.rates[0], *r.rates[2:]], approx(cosine_rates())),
    ("--weight-decay", COSINE, lambda r: {group["weight_decay"] for group in r.groups}, {0, 0.3}),
    ("--opt", COSINE, lambda r: {key for state in r.state for key in state}, {"step", "exp_avg", "exp_avg_sq"}),
    ("--opt-eps --opt-betas", COSINE, lambda r: [r.groups[0]["eps"], *r.groups[0]["betas"]], [1e-3, 0.8, 0.95]),
    ("--sched --decay-rate --accum-steps", STEP, lambda r: r.rates, approx([UPDATE / 50, UPDATE / 50, UPDATE / 100])),
    ("--opt", STEP, lambda r: {key for state in r.state for key in state}, {"momentum_buffer"}),
    ("--momentum", STEP, lambda r: {group["momentum"] for group in r.groups}, {0.7}),
]


def named(table):
    return [pytest.param(*row, id=name) for name, *row in table]


@pytest.mark.parametrize(("line", "look", "expected"), named(READY))
def test_what_a_flag_says_of_data_model_and_stages(line, look, expected, ready):
    assert look(ready(line)) == expected


@pytest.mark.parametrize(("line", "look", "expected"), named(DONE))
def test_what_a_flag_says_of_a_run(line, look, expected, done):
    assert look(done(line)) == expected


def test_attn_weight_is_what_the_block_stage_starts_from(ready, far):
    assert_equal(ready(FROM_FAR).model.state_dict(), weights(far, "best.pth"))


def test_the_named_data_set_is_read_from_its_path_and_fetched_where_asked(monkeypatch, ready):
    reads = []

    def digits(name, root, train, download=False, category="name"):
        reads.append((name, str(root), train, download))
        return build_split("DIGITS", root, train)

    monkeypatch.setattr(loading, "build_split", digits)
    ready(f"{TEACHER} --dataset CIFAR10 --data-path some/where --holdout 0 --download")
    assert reads == [("CIFAR10", "some/where", train, fetch) for fetch in (True, False) for train in (True, False)]


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_lstm_backend_names_the_kernel_that_runs(backend, monkeypatch, far):
    calls = set()
    for name in list(KERNELS):
        watch(monkeypatch, name, lambda x, name=name: calls.add(name))
    argv = ["--mode", "eval", *EVAL, "--holdout", "0.02", "--far-weight", str(far / "best.pth")]
    assert main.main([*argv, "--lstm-backend", backend]) == 0
    assert calls == {backend}


def test_a_device_or_kernel_that_is_not_there_is_refused_before_the_run_begins(mistake, failure, monkeypatch):
    monkeypatch.setattr(kernels.gpu, "interpreting", lambda: False)
    mistake(f"{TEACHER} --device cpu --lstm-backend triton", "--lstm-backend triton")
    if not torch.cuda.is_available():
        assert "--device cuda" in failure("--mode", "eval", "--device", "cuda")
