"""A flag that is accepted does what its help says: a table of flag, command line, what is looked at, what it must be.

READY rows look at the trainer that main.py made and has not started, DONE rows at a finished run. Rows of one command
line share it.
"""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from pytest import approx
from timm.data.auto_augment import RandAugment
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import nn
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as image_ops

import main
from datasets import loading
from datasets.registry import build_split
from deploy.fuse import fuse as fuse_model
from engine import modes
from engine.stages import select_trainable
from engine.train import Trainer
from models import kernels
from models.deit import create_teacher
from models.kernels import KERNELS
from models.replace import swap_attention
from tests.conftest import EVAL
from tests.test_kernels import watch
from utils.checkpoint import load
from utils.configs import Optim

# 84 of 1,408 training images, three batches of 24; 29 images held out.
BASE = "--dataset DIGITS --scale Micro --train-subset 0.06 --holdout 0.02 --num-workers 0 --select last --seed 3"
TEACHER = f"--mode teacher {BASE}"
TRAIN = (
    f"--mode train {BASE} --aa none --reprob 0 --color-jitter 0 --base-weight TEACHER "
    "--batch-size 24 --block-ft-batch-size 24 --epochs 1 --block-ft-epochs 1"
)


class Ready(Exception):
    """Carries a trainer out of main.py before it starts."""


class Waiting(Trainer):
    def fit(self):
        raise Ready(self)


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
    made = {}

    def get(line: str) -> Trainer:
        if line not in made:
            with pytest.MonkeyPatch.context() as patch, pytest.raises(Ready) as caught:
                patch.setattr(modes, "Trainer", Waiting)
                run(line)
            made[line] = caught.value.args[0]
        return made[line]

    return get


class Finished:
    """What a run left in its folder."""

    def __init__(self, folder):
        self.log, self.steps = (
            [json.loads(line) for line in (folder / name).read_text().splitlines()]
            for name in ("log.jsonl", "steps.jsonl")
        )
        self.best, optimizer = load(folder / "best.pth", "--t"), load(folder / "last.pth", "--t")["optimizer"]
        self.groups, self.state = optimizer["param_groups"], list(optimizer["state"].values())
        self.rates = [row["lr"] for row in self.log]
        self.updates = {state["step"].item() for state in self.state if "step" in state}


@pytest.fixture(scope="module")
def done(run):
    """The finished run of a command line."""
    made = {}
    return lambda line: made.get(line) or made.setdefault(line, Finished(run(line)))


def find(trainer, kind):
    return [step for step in trainer.data.train.transform.transforms if isinstance(step, kind)]


def erasing(trainer):
    (step,) = find(trainer, RandomErasing)
    return step.probability, step.min_count, step.max_count, step.per_pixel, step.rand_color


def jitter(trainer):
    return [[*step.brightness, *step.contrast, *step.saturation] for step in find(trainer, transforms.ColorJitter)]


def flips(trainer):
    kinds = transforms.RandomHorizontalFlip, transforms.RandomVerticalFlip
    return [step.p for kind in kinds for step in find(trainer, kind)]


def precision(trainer):
    with trainer.autocast():
        return trainer.model(trainer.data.val[0][0][None]).dtype, trainer.scaler.is_enabled()


def drop_rates(trainer):
    return [getattr(part, "drop_prob", 0) for b in trainer.model.blocks for part in (b.drop_path1, b.drop_path2)]


def views(trainer):
    """Images of an epoch, and how often each is seen."""
    order = list(trainer.data.train_loader(24).batch_sampler.sampler)
    return len(set(order)), {order.count(i) for i in order}


def crop(trainer):
    """What an evaluation image differs by from one at twice the size, cut in the middle, of values -1 to 1."""
    large = image_ops.resize(trainer.data.val.data[4][0], 96, InterpolationMode.BICUBIC)
    expected = (image_ops.to_tensor(image_ops.center_crop(large, 48)) - 0.5) / 0.5
    return (trainer.data.val[4][0] - expected).abs().max().item()


def normalised(trainer):
    """What an evaluation image differs by from a normalisation by hand; what trains and the checkpoint know of it."""
    image = image_ops.to_tensor(image_ops.resize(trainer.data.val.data[4][0], 32, InterpolationMode.BICUBIC))
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)))
    (normal,) = find(trainer, transforms.Normalize)
    error = (trainer.data.val[4][0] - (image - mean) / std).abs().max().item()
    stored = trainer.config.preprocessing
    return [error, *normal.mean.tolist(), *normal.std.tolist(), *stored.mean, *stored.std]


def smoothed(trainer):
    """The loss, and torch's with label smoothing 0.3."""
    logits, targets = torch.randn(7, 10), torch.randint(10, (7,))
    expected = F.cross_entropy(logits, targets, label_smoothing=0.3)
    return (trainer.settings.criterion()(logits, targets) - expected).item()


def mixed_share(trainer):
    """By how much mixed images keep their own: the least and the most over 100 batches; labels must agree."""
    images, targets = torch.rand(6, 3, 32, 32), torch.randint(10, (6,))
    soft, shares = F.one_hot(targets, 10) * 0.9 + 0.01, []  # smoothed by 0.1
    for _ in range(100):
        mixed, labels = trainer.mixup(images.clone(), targets)
        difference = images - images.flip(0)
        share = ((mixed - images.flip(0)) * difference).sum() / difference.square().sum()
        torch.testing.assert_close(labels, share * soft + (1 - share) * soft.flip(0), rtol=0, atol=0.02)
        if not trainer.settings.cutmix:
            torch.testing.assert_close(mixed, share * images + (1 - share) * images.flip(0))
        else:
            assert ((mixed == images) | (mixed == images.flip(0))).all()
        shares.append(share.item())
    return min(shares), max(shares)


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


def kind(trainer):
    """What replaces attention in block 1, and how wide each LSTM is."""
    swap_attention(trainer.model, (1,), trainer.config.rep_by, trainer.settings.rep_init)
    weights = trainer.model.blocks[1].attn.named_parameters()
    return trainer.config.rep_by, {w.shape[1] for name, w in weights if "weight_hh" in name}


def initial(trainer):
    """Whether pre_proj is the teacher's value projection; the forget and write biases of the first LSTM's units."""
    value = trainer.model.blocks[1].attn.qkv.weight[128:].clone()
    swap_attention(trainer.model, (1,), trainer.config.rep_by, trainer.settings.rep_init)
    attn = trainer.model.blocks[1].attn.state_dict()
    write, forget = attn["lstm.0.0.bias_ih"][:32], attn["lstm.0.0.bias_ih"][32:64]
    spread = len(set(forget.tolist())) > 16 and forget.min() >= 0 and forget.max() <= math.log(64)
    return (
        torch.equal(attn["pre_proj.weight"], value),
        "chrono" if spread else forget.unique().tolist(),
        (torch.equal(write, -forget) if spread else write.unique().tolist()),
    )


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
    "--remode const --recount 3 --train-interpolation bilinear --input-size 48 --eval-crop-ratio 0.5 --num-workers 1 "
    "--repeated-aug"
)
MIXUP = f"{TEACHER} --mixup 0.8 --aa rand-m7-n3 --train-interpolation bilinear --amp bf16"
CUTMIX = f"{TEACHER} --cutmix 1.0 --aa none --color-jitter 0 --remode rand --amp fp16"
LOOKS = f"{TEACHER} --mean 0.1 0.2 0.3 --std 0.4 0.5 0.6 --hflip 1 --vflip 0.25 --mixup 0.8 --mixup-prob 0"
SEQUENCE = f"{TRAIN} --replace 1 2-3 --step 2 --finetune-head --block-ft-mode FC+head --rep-init random"
PARALLEL = f"{TRAIN} --train-mode parallel --step 2 --block-ft-mode FC --rep-init value"
FROM_FAR = f"{TRAIN} --attn-weight FAR --skip-train-attn"
VALUES = {"epochs": 2, "batch_size": 3, "lr": 0.4, "warmup_epochs": 5, "warmup_lr": 0.6, "min_lr": 0.7, "sched": "step"}
VALUES |= {"opt": "lamb", "weight_decay": 0.8, "momentum": 0.9, "clip_grad": 10, "accum_steps": 11, "opt_eps": 0.12}
VALUES |= {"opt_betas": [0.13, 0.14], "decay_rate": 0.15}
BLOCK_FT = " ".join(f"--block-ft-{name.replace('_', '-')}" for name in VALUES)
FAMILY = f"{TRAIN} --skip-train-attn --unscale-lr --block-ft-opt-betas 0.13 0.14 " + " ".join(
    f"{flag} {value}" for flag, value in zip(BLOCK_FT.split(), VALUES.values(), strict=True) if flag[-5:] != "betas"
)
BILINEAR = InterpolationMode.BILINEAR

READY = [
    ("--seed", ALL, seeded, (True, 5, 5)),
    ("--drop", ALL, lambda t: t.model.head_drop.p, 0.3),
    ("--drop-path", ALL, drop_rates, approx([0, 0, 0.2, 0.2, 0.4, 0.4, 0.6, 0.6])),
    ("--smoothing", ALL, smoothed, approx(0, abs=1e-5)),
    ("--aa", ALL, lambda t: find(t, RandAugment), []),
    ("--aa", MIXUP, lambda t: [(p.ops[0].magnitude, p.num_layers) for p in find(t, RandAugment)], [(7, 3)]),
    ("--color-jitter", ALL, jitter, [approx([0.3, 1.7] * 3)]),
    ("--color-jitter", CUTMIX, jitter, []),
    ("--color-jitter", MIXUP, jitter, []),
    ("--reprob --remode --recount", ALL, erasing, (0.8, 1, 3, False, False)),
    ("--reprob --remode --recount", MIXUP, erasing, (0.25, 1, 1, True, False)),
    ("--remode", CUTMIX, erasing, (0.25, 1, 1, False, True)),
    ("--train-interpolation", ALL, lambda t: find(t, RandomResizedCropAndInterpolation)[0].interpolation, BILINEAR),
    ("--train-interpolation", MIXUP, lambda t: find(t, transforms.Resize)[0].interpolation, BILINEAR),
    ("--input-size", ALL, lambda t: {t.data.train[0, 0][0].shape, t.data.val[0][0].shape}, {(3, 48, 48)}),
    ("--input-size", ALL, lambda t: t.model.pos_embed.shape[1], 12 * 12 + 1),
    ("--eval-crop-ratio", ALL, crop, approx(0, abs=1e-5)),
    ("--mean --std", LOOKS, normalised, approx([0, *[0.1, 0.2, 0.3, 0.4, 0.5, 0.6] * 2], abs=1e-5)),
    ("--hflip --vflip", LOOKS, flips, [1.0, 0.25]),
    ("--hflip --vflip", ALL, flips, []),
    ("--mixup", MIXUP, lambda t: mixed_share(t)[0] < 0.4 and mixed_share(t)[1] > 0.6, True),
    ("--cutmix", CUTMIX, lambda t: mixed_share(t)[0] < 0.4 and mixed_share(t)[1] > 0.6, True),
    ("--mixup-prob", LOOKS, mixed_share, approx((1, 1))),
    ("--num-workers", ALL, lambda t: (t.data.train_loader(2).num_workers, t.data.val_loader(2).num_workers), (1, 1)),
    ("--repeated-aug", ALL, views, (84 // 3, {3})),
    ("--train-subset --holdout", ALL, lambda t: (len(t.data.train), len(t.data.val)), (84, 29)),
    ("--amp", ALL, precision, (torch.float32, False)),
    ("--amp", MIXUP, precision, (torch.bfloat16, False)),
    ("--amp", CUTMIX, precision, (torch.float16, True)),
    ("--nb-classes", f"{TEACHER} --nb-classes 13", lambda t: {len(t.model.head.weight), t.config.num_classes}, {13}),
    ("--train-mode", PARALLEL, stages, [("attn", (0, 1, 2, 3), (0, 1, 2, 3)), ("block", (0, 1, 2, 3), (0, 1, 2, 3))]),
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
    ("--skip-train-attn --block-ft-mode", f"{FROM_FAR} --block-ft-mode FC", trained, {"block": {"mlp"}}),
    (
        "--block-ft-mode --finetune-head",
        f"{FROM_FAR} --block-ft-mode FC+head --finetune-head",
        trained,
        {"block": {"mlp", "head"}, "head": {"head"}},
    ),
    ("--block-ft-mode", FROM_FAR, trained, {"block": {"norm1", "attn", "norm2", "mlp"}}),
    ("--rep-by", f"{TRAIN} --rep-by lstm", kind, ("lstm", {64})),
    ("--rep-by", f"{TRAIN} --rep-by gru", kind, ("gru", {32})),
    ("--rep-by", f"{TRAIN} --rep-by mixer", kind, ("mixer", set())),
    ("--rep-init", PARALLEL, initial, (True, [1.0], [0.0])),
    ("--rep-init", TRAIN, initial, (True, "chrono", True)),
    ("--rep-init", SEQUENCE, initial, (False, [1.0], [0.0])),
    (BLOCK_FT, FAMILY, lambda t: [stage.optim for stage in t.stages], [Optim(**VALUES, family="block-ft-")]),
]

# Optimisation, each on a run of a teacher.
COSINE = f"{TEACHER} --batch-size 24 --epochs 3 --lr 0.05 --warmup-epochs 1 --warmup-lr 0.02 --min-lr 0.01"
COSINE += " --weight-decay 0.3 --opt-eps 1e-3 --opt-betas 0.8 0.95"
STEP = f"{TEACHER} --batch-size 24 --epochs 2 --lr 0.02 --warmup-epochs 0 --sched step --accum-steps 2 --unscale-lr"
STEP += " --decay-rate 0.5"
SGD = f"{TEACHER} --batch-size 24 --epochs 1 --lr 0.05 --warmup-epochs 0 --min-lr 0.05 --opt sgd --momentum 0.7"
SGD += " --weight-decay 0 --accum-steps 3 --clip-grad 0.01"
LOSSES = f"{SEQUENCE} --train-loss similarity --block-ft-train-loss combine"
BOTH = {"similarity", "classification"}


def gradient_norm(run):
    """After one update the momentum buffers are the gradient."""
    return torch.cat([state["momentum_buffer"].flatten() for state in run.state]).norm().item()


DONE = [
    ("--epochs", COSINE, lambda r: [row["epoch"] for row in r.log], [0, 1, 2, 3]),
    ("--batch-size", COSINE, lambda r: [row["step"] for row in r.steps], [0, 1, 2] * 3),
    ("--lr --warmup-lr --warmup-epochs --min-lr", COSINE, lambda r: [r.rates[0], *r.rates[2:]], approx(cosine_rates())),
    ("--weight-decay", COSINE, lambda r: {group["weight_decay"] for group in r.groups}, {0, 0.3}),
    ("--opt", COSINE, lambda r: {key for state in r.state for key in state}, {"step", "exp_avg", "exp_avg_sq"}),
    ("--opt-eps --opt-betas", COSINE, lambda r: [r.groups[0]["eps"], *r.groups[0]["betas"]], [1e-3, 0.8, 0.95]),
    ("--sched --decay-rate --unscale-lr", STEP, lambda r: r.rates, approx([0.02, 0.02, 0.01])),  # half, each third
    ("--accum-steps", STEP, lambda r: r.updates, {4}),  # two epochs of two updates: batches 1 and 2, then 3
    ("--opt", SGD, lambda r: {key for state in r.state for key in state}, {"momentum_buffer"}),
    ("--lr --accum-steps", SGD, lambda r: r.groups[0]["lr"], approx(0.05 * 24 * 3 / 512)),  # an update's batches as one
    ("--momentum", SGD, lambda r: {group["momentum"] for group in r.groups}, {0.7}),
    ("--clip-grad", SGD, gradient_norm, approx(0.01, rel=1e-3)),
    (
        "--train-loss --block-ft-train-loss",
        LOSSES,
        lambda r: {row["stage"].split()[0]: set(row["train"]) - {"loss"} for row in r.log if row["train"]},
        {"attn": {"similarity"}, "block": BOTH, "head": {"classification"}},
    ),
    ("--replace", LOSSES, lambda r: {n.split(".")[1] for n in r.best["model"] if ".lstm." in n}, {"1", "2", "3"}),
]

ELSEWHERE = {  # what a table cannot hold: below, or in the file of its subject
    "test_flags": "--device --lstm-backend --fuse --dataset --data-path --download --base-model --scale --attn-weight "
    "--distill-input",
    "test_training": "--model-ema --output-dir --resume --select --eval-every --save-every --base-weight",
    "test_main": "--distributed --far-weight --ds-mode",
    "test_plan": "--dry-run",
    "test_compiling": "--compile",
    "test_board": "--tensorboard",
    "test_launch": "--dist-timeout",
    "test_datasets": "--inat-category",
    "test_unlabelled": "--images-only",
    "test_prune": "--ds-pruned",
    "test_ranking": "--rank --min-agreement",
}


def named(rows):
    return [pytest.param(*row[1:], id=f"{row[0][:60]} {k}") for k, row in enumerate(rows)]


@pytest.mark.parametrize(("line", "look", "expected"), named(READY))
def test_what_a_flag_says_of_data_model_and_stages(line, look, expected, ready):
    assert look(ready(line)) == expected


@pytest.mark.parametrize(("line", "look", "expected"), named(DONE))
def test_what_a_flag_says_of_a_run(line, look, expected, done):
    assert look(done(line)) == expected


def test_every_flag_of_main_but_those_of_predict_is_held():
    parser = main.build_parser()
    aside = parser.titled({"prediction"}) | {"help", "mode"}
    flags = {action.option_strings[0] for action in parser._actions if action.dest not in aside}
    held = " ".join([*(row[0] for row in (*READY, *DONE)), *ELSEWHERE.values()])
    assert flags == set(held.split())


def test_attn_weight_is_what_the_block_stage_starts_from(ready, far):
    start, weights = ready(FROM_FAR).model.state_dict(), load(far / "best.pth", "--t")["model"]
    assert all(torch.equal(start[name], weights[name]) for name in weights)


@pytest.mark.parametrize("source", ["teacher", "student"])
def test_a_student_block_reads_what_distill_input_says(source, ready, teacher):
    """What block 2 reads, of a student that differs from its teacher in block 0."""
    trainer = ready(f"{TRAIN} --train-loss similarity --distill-input {source}")
    weights, student, reference = load(teacher, "--t")["model"], trainer.model, create_teacher("DeiT-Micro", 10, 32)
    for model in (student, reference):
        model.load_state_dict(weights)
    nn.init.ones_(student.blocks[0].mlp.fc2.bias)
    task = trainer.make_task(student, trainer.stages[0], nn.CrossEntropyLoss())
    images, reads = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32), {}
    for name, model, call in (
        ("teacher", reference, reference),
        ("student", student, student),
        ("trained", student, lambda images: task(images, torch.tensor([0, 1]))),
    ):
        model.eval()
        handle = model.blocks[2].register_forward_pre_hook(lambda block, args, name=name: reads.update({name: args[0]}))
        call(images)
        handle.remove()
    assert torch.allclose(reads["trained"], reads[source], atol=1e-5)
    assert not torch.allclose(reads["teacher"], reads["student"], atol=1e-2)


def test_the_named_data_set_is_read_from_its_path_and_fetched_where_asked(monkeypatch, ready):
    reads = []

    def digits(name, root, train, download=False, category="name"):
        reads.append((name, str(root), train, download))
        return build_split("DIGITS", root, train)

    monkeypatch.setattr(loading, "build_split", digits)
    ready(f"{TEACHER} --dataset CIFAR10 --data-path some/where --holdout 0 --download")
    assert reads == [("CIFAR10", "some/where", train, fetch) for fetch in (True, False) for train in (True, False)]
    reads.clear()
    ready(f"{TEACHER} --dataset CIFAR10 --holdout 0")
    assert reads == [("CIFAR10", "data/CIFAR10", train, False) for train in (True, False)]


@pytest.mark.parametrize(
    ("flags", "width"),
    [("--base-model DeiT-Micro", 64), ("--scale Tiny", 192), ("", 192), ("--base-model deit3_small_patch16_224", 384)],
)
def test_base_model_and_scale_name_the_teacher(flags, width, ready):
    line = TEACHER.replace("--scale Micro", flags)
    assert ready(f"{line} --input-size 32").model.embed_dim == width


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_lstm_backend_names_the_kernel_that_runs(backend, monkeypatch, far):
    calls = set()
    for name in list(KERNELS):
        watch(monkeypatch, name, lambda x, name=name: calls.add(name))
    assert main.main(["--mode", "eval", *EVAL, "--far-weight", str(far / "best.pth"), "--lstm-backend", backend]) == 0
    assert calls == {backend}


def test_eval_fuses_and_keeps_the_accuracy(far, monkeypatch, tmp_path):
    fused, results = [], []
    monkeypatch.setattr(modes, "fuse", lambda model, dtype: fused.append(dtype) or fuse_model(model, dtype))
    precisions = ["float32", "bfloat16"] if kernels.cpu.has_bfloat16() else ["float32"]
    for k, flags in enumerate([[], *(["--fuse", precision] for precision in precisions)]):
        folder = tmp_path / str(k)
        args = ["--mode", "eval", *EVAL, "--far-weight", str(far / "best.pth"), *flags, "--output-dir", str(folder)]
        assert main.main(args) == 0
        results.append(json.loads((folder / "result.json").read_text()))
    for result in results:
        assert result["parameters"] == results[0]["parameters"]
        assert abs(result["loss"] - results[0]["loss"]) < 1e-3
        assert abs(result["acc1"] - results[0]["acc1"]) < 2  # barely trained: ties tip over
    assert fused == [getattr(torch, precision) for precision in precisions]


def test_a_device_or_kernel_that_is_not_there_is_refused_before_the_run_begins(failure, monkeypatch, tmp_path):
    monkeypatch.setattr(kernels.gpu, "interpreting", lambda: False)
    line = failure(*TEACHER.split(), "--device", "cpu", "--lstm-backend", "triton", "--output-dir", tmp_path / "run")
    assert "--lstm-backend triton" in line and not (tmp_path / "run").exists()
    if not torch.cuda.is_available():
        assert "--device cuda" in failure("--mode", "eval", "--device", "cuda")
