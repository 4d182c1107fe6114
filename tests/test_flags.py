"""A flag that is accepted does what its help says: a table of flags, each with a check of what it promises.

A check reads either a finished run (`DONE`) or the trainer that main.py made and has not started (`READY`). Rows with
the same command line share it, so the file trains little.
"""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
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
from engine.train import Trainer
from models import kernels
from models.deit import create_teacher
from models.kernels import KERNELS
from tests.conftest import ROOT
from tests.test_kernels import watch
from utils.checkpoint import load

# 84 of 1,408 training images, three batches of 24; 29 images held out.
BASE = "--dataset DIGITS --scale Micro --train-subset 0.06 --holdout 0.02 --num-workers 0 --select last --seed 3"
TEACHER = f"--mode teacher {BASE}"
TRAIN = f"--mode train {BASE} --aa none --reprob 0 --color-jitter 0 --base-weight TEACHER"
SMALL = "--batch-size 24 --block-ft-batch-size 24 --epochs 1 --block-ft-epochs 1"


class Run:
    """What a finished run left in its folder."""

    def __init__(self, path: Path):
        self.path = path
        self.log, self.steps = (self.lines(path / name) for name in ("log.jsonl", "steps.jsonl"))
        self.last, self.best = (load(path / name, "--test") for name in ("last.pth", "best.pth"))
        self.weights = self.best["model"]

    @staticmethod
    def lines(path):
        return [json.loads(line) for line in path.read_text().splitlines()]

    @property
    def groups(self):
        return self.last["optimizer"]["param_groups"]

    @property
    def state(self):
        return list(self.last["optimizer"]["state"].values())


class Ready(Exception):
    """Carries a trainer out of main.py before it starts."""


class Waiting(Trainer):
    def fit(self):
        raise Ready(self)


@pytest.fixture(scope="module")
def words(teacher, far):
    """A command line's words, with the weights made here in the places of TEACHER and FAR."""
    places = {"TEACHER": str(teacher), "FAR": str(far / "best.pth")}
    return lambda line: [places.get(word, word) for word in line.split()]


@pytest.fixture(scope="module")
def done(words, tmp_path_factory):
    """The finished run of a command line."""
    made = {}

    def get(line: str) -> Run:
        if line not in made:
            folder = tmp_path_factory.mktemp("done") / "run"
            assert main.main([*words(line), "--output-dir", str(folder)]) == 0
            made[line] = Run(folder)
        return made[line]

    return get


@pytest.fixture(scope="module")
def ready(words, tmp_path_factory):
    """The trainer of a command line, not yet started."""
    made = {}

    def get(line: str) -> Trainer:
        if line not in made:
            with pytest.MonkeyPatch.context() as patch, pytest.raises(Ready) as caught:
                patch.setattr(modes, "Trainer", Waiting)
                main.main([*words(line), "--output-dir", str(tmp_path_factory.mktemp("ready") / "run")])
            made[line] = caught.value.args[0]
        return made[line]

    return get


# Optimisation: each check holds for both families, read from a run whose last stage is the family's.


def epochs(run):
    assert [row["epoch"] for row in run.log] == [0, 1, 2, 3]


def batch_size(run):
    assert [(row["epoch"], row["step"]) for row in run.steps] == [(e, s) for e in range(3) for s in range(3)]


def rates(run):
    """Three updates of warm-up, then a cosine, between rates scaled by the batch; a row has its epoch's last."""
    warm, top, low = (rate * 24 / 512 for rate in (0.02, 0.05, 0.01))

    def rate(update):
        if update < 3:
            return warm + (top - warm) * update / 3
        return low + (top - low) * (1 + math.cos(math.pi * update / 9)) / 2

    assert [row["lr"] for row in run.log] == pytest.approx([warm, rate(2), rate(5), rate(8)])


def weight_decay(run):
    assert {group["weight_decay"] for group in run.groups} == {0, 0.3}


def adamw(run):
    assert {key for state in run.state for key in state} == {"step", "exp_avg", "exp_avg_sq"}
    assert {state["step"].item() for state in run.state} == {9}


def stepwise(run):
    assert [row["lr"] for row in run.log] == pytest.approx([0.02, 0.02, 0.002])  # a tenth each third, at least an epoch


def accumulated(run):
    assert {state["step"].item() for state in run.state} == {4}  # two epochs of two updates: batches 1 and 2, then 3


def sgd(run):
    assert {key for state in run.state for key in state} == {"momentum_buffer"}
    assert run.groups[0]["lr"] == pytest.approx(0.05 * 24 * 3 / 512)  # the batches of one update count as one


def decay_rate(run):
    assert [row["lr"] for row in run.log] == pytest.approx([0.02, 0.02, 0.01])  # half each third


def adams_own(run):
    assert {(group["eps"], tuple(group["betas"])) for group in run.groups} == {(1e-3, (0.8, 0.95))}


def momentum(run):
    assert {group["momentum"] for group in run.groups} == {0.7}


def clipped(run):
    """After one update the momentum buffers are the gradient."""
    norm = torch.cat([state["momentum_buffer"].flatten() for state in run.state]).norm().item()
    assert norm == pytest.approx(0.01, rel=1e-3)


def family(mode: str, prefix: str):
    """The rows of one family of optimisation flags."""
    cosine = "--P-epochs 3 --P-lr 0.05 --P-warmup-epochs 1 --P-warmup-lr 0.02 --P-min-lr 0.01 --P-weight-decay 0.3"
    step = "--P-epochs 2 --P-lr 0.02 --P-warmup-epochs 0 --P-sched step --P-accum-steps 2 --unscale-lr"
    once = (
        "--P-epochs 1 --P-lr 0.05 --P-warmup-epochs 0 --P-min-lr 0.05 --P-opt sgd --P-momentum 0.7 "
        "--P-weight-decay 0 --P-accum-steps 3 --P-clip-grad 0.01"
    )
    table = [
        ("--P-epochs", cosine, epochs),
        ("--P-batch-size", cosine, batch_size),
        ("--P-lr --P-warmup-lr --P-warmup-epochs --P-min-lr", cosine, rates),
        ("--P-weight-decay", cosine, weight_decay),
        ("--P-opt", cosine, adamw),
        ("--P-sched --unscale-lr", step, stepwise),
        ("--P-accum-steps", step, accumulated),
        ("--P-decay-rate", f"{step} --P-decay-rate 0.5", decay_rate),
        ("--P-opt-eps --P-opt-betas", f"{step} --P-opt-eps 1e-3 --P-opt-betas 0.8 0.95", adams_own),
        ("--P-opt", once, sgd),
        ("--P-momentum", once, momentum),
        ("--P-clip-grad", once, clipped),
    ]
    for flags, line, check in table:
        yield flags.replace("P-", prefix), f"{mode} {line} --P-batch-size 24".replace("P-", prefix), check


# Distillation: which stages there are, what each trains and on what.


def changed(run, before) -> set[str]:
    return {name for name, value in run.weights.items() if name not in before or not torch.equal(value, before[name])}


def stepped(run):
    names = list(dict.fromkeys(row["stage"] for row in run.log))
    assert names == ["attn 1/2", "attn 2/2", "block 1/2", "block 2/2", "head"]


def replaced(run):
    assert run.best["config"]["replaced"] == (1, 2, 3)
    recurrent = {int(name.split(".")[1]) for name in run.weights if ".lstm." in name}
    assert recurrent == {1, 2, 3} and "blocks.0.attn.qkv.weight" in run.weights


def losses(run):
    parts = {row["stage"].split()[0]: set(row["train"]) - {"loss"} for row in run.log if row["train"]}
    both = {"similarity", "classification"}
    assert parts == {"attn": {"similarity"}, "block": both, "head": {"classification"}}


def parallel(trainer):
    assert [(s.name, s.blocks) for s in trainer.stages] == [("attn", (0, 1, 2, 3)), ("block", (0, 1, 2, 3))]


def without_attn(run):
    assert [row["stage"] for row in run.log] == ["block", "block"]


def only(*parts: str):
    """A check that a run from FAR's weights changes these parts of it and nothing else."""

    def trained(run, far):
        assert changed(run, far) == {name for name in far if any(part in f".{name}" for part in parts)}

    return trained


def initial(run, teacher):
    """pre_proj of block 1 and the teacher's value projection; the forget and input biases of its first LSTM."""
    value = teacher["blocks.1.attn.qkv.weight"][128:]
    bias = run.weights["blocks.1.attn.lstm.0.0.bias_ih"]
    return run.weights["blocks.1.attn.pre_proj.weight"], value, bias[32:64], bias[:32]


def from_value(run, teacher):
    pre, value, forget, write = initial(run, teacher)
    assert torch.equal(pre, value) and (forget == 1).all() and (write == 0).all()


def from_chrono(run, teacher):
    pre, value, forget, write = initial(run, teacher)
    assert torch.equal(pre, value) and torch.equal(write, -forget)
    assert forget.min() >= 0 and forget.max() <= math.log(64) and len(set(forget.tolist())) > 16


def from_nothing(run, teacher):
    pre, value, forget, _ = initial(run, teacher)
    assert not torch.equal(pre, value) and (forget == 1).all()


def one_wide_lstm(run):
    shapes = {tuple(v.shape) for name, v in run.weights.items() if name.endswith("weight_hh")}
    assert run.best["config"]["rep_by"] == "lstm" and shapes == {(4 * 64, 64)}


def token_mixer(run):
    assert run.best["config"]["rep_by"] == "mixer" and not any(".lstm." in name for name in run.weights)


def reads_the_teacher(trainer, teacher):
    check_input(trainer, teacher, "teacher")


def reads_its_own_state(trainer, teacher):
    check_input(trainer, teacher, "student")


def check_input(trainer, teacher, source):
    """What block 2 of a student reads that differs from its teacher in block 0."""
    student, reference = trainer.model, create_teacher("DeiT-Micro", 10, 32).eval()
    reference.load_state_dict(teacher)
    student.load_state_dict(teacher)
    nn.init.ones_(student.eval().blocks[0].mlp.fc2.bias)
    read = {}
    for name, model in (("teacher", reference), ("student", student), ("trained", student)):

        def keep(block, args, name=name):
            read[name] = args[0]

        handle = model.blocks[2].register_forward_pre_hook(keep)
        images = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
        task = trainer.make_task(trainer.stages[0], nn.CrossEntropyLoss()).eval()
        task(images, torch.tensor([0, 1])) if name == "trained" else model(images)
        handle.remove()
    assert torch.allclose(read["trained"], read[source], atol=1e-5)
    assert not torch.allclose(read["teacher"], read["student"], atol=1e-2)


LR_0 = f"{TRAIN} {SMALL} --block-ft-epochs 0 --lr 0 --warmup-lr 0 --min-lr 0"
PLAN = f"{TRAIN} {SMALL} --replace 1 2-3 --step 2 --train-loss similarity --block-ft-train-loss combine --finetune-head"
FROM_FAR = f"{TRAIN} {SMALL} --block-ft-lr 1e-2 --attn-weight FAR --skip-train-attn"

DONE = [
    *family(f"{TEACHER} --base-weight TEACHER", ""),
    *family(f"{TRAIN} --skip-train-attn", "block-ft-"),
    ("--step --train-mode --finetune-head", PLAN, stepped),
    ("--replace", PLAN, replaced),
    ("--train-loss --block-ft-train-loss", PLAN, losses),
    ("--skip-train-attn", f"{FROM_FAR} --block-ft-mode FC", without_attn),
    ("--rep-by", f"{LR_0} --rep-by lstm", one_wide_lstm),
    ("--rep-by", f"{LR_0} --rep-by mixer", token_mixer),
]
DONE_FROM = [  # with the weights that the run started from
    ("--block-ft-mode --attn-weight", f"{FROM_FAR} --block-ft-mode FC", only(".mlp."), "far"),
    ("--block-ft-mode", f"{FROM_FAR} --block-ft-mode FC+head", only(".mlp.", ".head."), "far"),
    ("--finetune-head", f"{FROM_FAR} --block-ft-mode FC --finetune-head", only(".mlp.", ".head."), "far"),
    ("--rep-init", f"{LR_0} --rep-init value", from_value, "teacher"),
    ("--rep-init", LR_0, from_chrono, "teacher"),
    ("--rep-init", f"{LR_0} --rep-init random", from_nothing, "teacher"),
]


# Data and model: read from the trainer as main.py made it.


def steps_of(trainer):
    return trainer.data.train.transform.transforms


def find(trainer, kind):
    return [step for step in steps_of(trainer) if isinstance(step, kind)]


def seed(trainer):
    torch.manual_seed(5)
    fresh = create_teacher("DeiT-Micro", 10, 48).state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in trainer.model.state_dict().items())
    assert trainer.settings.seed == trainer.data.config.seed == 5


def drop(trainer):
    assert trainer.model.head_drop.p == 0.3


def drop_path(trainer):
    for i, block in enumerate(trainer.model.blocks):
        for part in (block.drop_path1, block.drop_path2):
            assert getattr(part, "drop_prob", 0) == pytest.approx(0.2 * i)


def smoothing(trainer):
    logits, targets = torch.randn(7, 10), torch.randint(10, (7,))
    expected = F.cross_entropy(logits, targets, label_smoothing=0.3)
    torch.testing.assert_close(trainer.settings.criterion()(logits, targets), expected)


def no_auto_augment(trainer):
    assert not find(trainer, RandAugment)


def auto_augment(trainer):
    (policy,) = find(trainer, RandAugment)
    assert {op.magnitude for op in policy.ops} == {7} and policy.num_layers == 3


def color_jitter(trainer):
    (jitter,) = find(trainer, transforms.ColorJitter)
    assert [*jitter.brightness, *jitter.contrast, *jitter.saturation] == pytest.approx([0.3, 1.7] * 3)


def no_color_jitter(trainer):
    assert not find(trainer, transforms.ColorJitter)


def erasing(trainer):
    (step,) = find(trainer, RandomErasing)
    assert (step.probability, step.min_count, step.max_count) == (0.8, 1, 3)
    assert (step.per_pixel, step.rand_color) == (False, False)


def erasing_by_pixels(trainer):
    (step,) = find(trainer, RandomErasing)
    assert (step.probability, step.max_count, step.per_pixel) == (0.25, 1, True)


def erasing_by_one_colour(trainer):
    (step,) = find(trainer, RandomErasing)
    assert (step.per_pixel, step.rand_color) == (False, True)


def interpolation(trainer):
    (crop,) = find(trainer, RandomResizedCropAndInterpolation)
    assert crop.interpolation == InterpolationMode.BILINEAR


def interpolation_of_small_images(trainer):
    (resize,) = find(trainer, transforms.Resize)
    assert resize.interpolation == InterpolationMode.BILINEAR


def input_size(trainer):
    assert trainer.data.train[0, 0][0].shape == trainer.data.val[0][0].shape == (3, 48, 48)
    assert trainer.model.pos_embed.shape[1] == 12 * 12 + 1


def nb_classes(trainer, teacher):
    """A fresh classifier of so many classes on the weights of a model of ten."""
    state = trainer.model.state_dict()
    assert len(state["head.weight"]) == len(state["head.bias"]) == trainer.data.num_classes == 13
    assert {name for name in state if not torch.equal(state[name], teacher[name])} == {"head.weight", "head.bias"}
    assert trainer.config.num_classes == 13
    assert trainer.config.classes == (*map(str, range(10)), "class 10", "class 11", "class 12")


def eval_crop_ratio(trainer):
    whole = image_ops.resize(trainer.data.val.data[4][0], 96, InterpolationMode.BICUBIC)
    expected = (image_ops.to_tensor(image_ops.center_crop(whole, 48)) - 0.5) / 0.5
    torch.testing.assert_close(trainer.data.val[4][0], expected)


def normalised(trainer):
    whole = image_ops.to_tensor(image_ops.resize(trainer.data.val.data[4][0], 32, InterpolationMode.BICUBIC))
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)))
    torch.testing.assert_close(trainer.data.val[4][0], (whole - mean) / std)
    torch.testing.assert_close(trainer.data.train[4, 0][0].mean(), ((whole * 0 - mean) / std).mean(), atol=2, rtol=0)
    reading = trainer.config.preprocessing
    assert (reading.mean, reading.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    (normal,) = find(trainer, transforms.Normalize)
    assert normal.mean.tolist() == pytest.approx([0.1, 0.2, 0.3])


def mirrored(trainer):
    """Always left and right, always upside down: the crop's padding alone differs."""
    across, down = find(trainer, transforms.RandomHorizontalFlip), find(trainer, transforms.RandomVerticalFlip)
    assert [step.p for step in (*across, *down)] == [1.0, 0.25]


def not_mirrored(trainer):
    assert not find(trainer, transforms.RandomHorizontalFlip) and not find(trainer, transforms.RandomVerticalFlip)


def mixup_prob(trainer):
    images, targets = torch.randn(6, 3, 32, 32), torch.randint(10, (6,))
    mixed, labels = trainer.mixup(images.clone(), targets)
    assert torch.equal(mixed, images)
    torch.testing.assert_close(labels, soft(targets, 1.0))


def num_workers(trainer):
    assert trainer.data.train_loader(2).num_workers == trainer.data.val_loader(2).num_workers == 1


def repeated_aug(trainer):
    order = list(trainer.data.train_loader(24).batch_sampler.sampler)
    assert len(set(order)) == 84 // 3 and {order.count(i) for i in order} == {3}


def shares(trainer):
    assert (len(trainer.data.train), len(trainer.data.val)) == (84, 29)


def soft(targets, share):
    """The label of an image that is `share` itself and for the rest its partner, smoothed by 0.1."""
    smooth = F.one_hot(targets, 10) * 0.9 + 0.01
    return share * smooth + (1 - share) * smooth.flip(0)


class Watch(nn.Module):
    """A task that keeps what it is given."""

    def __init__(self, model, seen):
        super().__init__()
        self.model, self.seen = model, seen

    def forward(self, images, targets, looked_at):
        self.seen.append((images.clone(), targets.clone()))
        loss = 0 * sum(p.sum() for p in self.model.parameters())
        return loss, {}


def mixup(trainer):
    seen = []
    trainer.make_task = lambda stage, criterion: Watch(trainer.model, seen)
    Trainer.fit(trainer)
    raw = list(trainer.data.at(trainer.data.train_loader(24), 0))
    assert len(seen) == len(raw) == 3 and trainer.mixup.mixup_alpha == 0.8
    for (images, targets), (mixed, labels) in zip(raw, seen, strict=True):
        difference = images - images.flip(0)
        share = ((mixed - images.flip(0)) * difference).sum() / difference.square().sum()
        torch.testing.assert_close(mixed, share * images + (1 - share) * images.flip(0), rtol=0, atol=1e-4)
        torch.testing.assert_close(labels, soft(targets, share), rtol=0, atol=1e-4)


def cutmix(trainer):
    images, targets = torch.randn(6, 3, 32, 32), torch.randint(10, (6,))
    mixed, labels = trainer.mixup(images.clone(), targets)
    own = mixed == images
    assert (own | (mixed == images.flip(0))).all() and (own == own[:1, :1]).all()
    torch.testing.assert_close(labels, soft(targets, own[0, 0].float().mean()))
    logits = torch.randn(6, 10)
    expected = -(labels * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(trainer.settings.criterion()(logits, labels), expected)


def precision(dtype, scaled):
    def check(trainer):
        with trainer.autocast():
            assert trainer.model(trainer.data.val[0][0][None]).dtype == dtype
        assert trainer.scaler.is_enabled() == scaled

    return check


def families(trainer):
    """Each family of flags reaches its own stage."""
    assert [(s.name, s.optim.epochs, s.optim.opt, s.optim.lr) for s in trainer.stages] == [
        ("attn", 1, "sgd", 1e-3),
        ("block", 2, "lamb", 2e-3),
        ("head", 2, "lamb", 2e-3),
    ]


ALL = (
    f"{TEACHER} --seed 5 --drop 0.3 --drop-path 0.6 --smoothing 0.3 --aa none --color-jitter 0.7 --reprob 0.8 "
    "--remode const --recount 3 --train-interpolation bilinear --input-size 48 --eval-crop-ratio 0.5 --num-workers 1 "
    "--repeated-aug"
)
MIXUP = f"{TEACHER} --mixup 0.8 --aa rand-m7-n3 --train-interpolation bilinear --epochs 1 --batch-size 24 --amp bf16"
CUTMIX = f"{TEACHER} --cutmix 1.0 --aa none --color-jitter 0 --remode rand --amp fp16"

LOOKS = f"{TEACHER} --mean 0.1 0.2 0.3 --std 0.4 0.5 0.6 --hflip 1 --vflip 0.25 --mixup 0.8 --mixup-prob 0"

PARALLEL = f"{TRAIN} {SMALL} --train-mode parallel --step 2"
FAMILIES = (
    f"{TRAIN} {SMALL} --opt sgd --lr 1e-3 --block-ft-epochs 2 --block-ft-opt lamb --block-ft-lr 2e-3 "
    "--unscale-lr --finetune-head"
)

READY = [
    ("--seed", ALL, seed),
    ("--drop", ALL, drop),
    ("--drop-path", ALL, drop_path),
    ("--smoothing", ALL, smoothing),
    ("--aa", ALL, no_auto_augment),
    ("--aa", MIXUP, auto_augment),
    ("--color-jitter", ALL, color_jitter),
    ("--color-jitter", CUTMIX, no_color_jitter),
    ("--color-jitter", MIXUP, no_color_jitter),
    ("--reprob --remode --recount", ALL, erasing),
    ("--reprob --remode --recount", MIXUP, erasing_by_pixels),
    ("--remode", CUTMIX, erasing_by_one_colour),
    ("--train-interpolation", ALL, interpolation),
    ("--train-interpolation", MIXUP, interpolation_of_small_images),
    ("--input-size", ALL, input_size),
    ("--eval-crop-ratio", ALL, eval_crop_ratio),
    ("--mean --std", LOOKS, normalised),
    ("--hflip --vflip", LOOKS, mirrored),
    ("--hflip --vflip", ALL, not_mirrored),
    ("--mixup-prob", LOOKS, mixup_prob),
    ("--num-workers", ALL, num_workers),
    ("--repeated-aug", ALL, repeated_aug),
    ("--train-subset --holdout", ALL, shares),
    ("--amp", ALL, precision(torch.float32, False)),
    ("--amp", MIXUP, precision(torch.bfloat16, False)),
    ("--amp", CUTMIX, precision(torch.float16, True)),
    ("--mixup", MIXUP, mixup),
    ("--cutmix", CUTMIX, cutmix),
    ("--train-mode", PARALLEL, parallel),
    ("--opt --lr --block-ft-opt --block-ft-lr", FAMILIES, families),
]
SIMILARITY = f"{TRAIN} {SMALL} --train-loss similarity"
READY_FROM = [
    ("--nb-classes", f"{TEACHER} --nb-classes 13 --base-weight TEACHER", nb_classes, "teacher"),
    ("--distill-input", f"{SIMILARITY} --distill-input teacher", reads_the_teacher, "teacher"),
    ("--distill-input", SIMILARITY, reads_its_own_state, "teacher"),
]

ELSEWHERE = {  # what a table cannot hold, and the test that does
    "--dry-run": "test_plan.py::test_a_dry_run_says_what_the_run_then_does_and_leaves_nothing",
    "--model-ema": "test_training.py::test_averaged_weights_are_evaluated_saved_and_resumed",
    "--output-dir": "test_training.py::test_run_folder_holds_what_the_readme_says",
    "--resume": "test_training.py::test_a_run_killed_mid_epoch_ends_bit_equal_after_resume",
    "--select": "test_training.py::test_select_hands_on_the_best_or_the_last_epoch",
    "--eval-every": "test_training.py::test_evaluations_and_saves_come_as_often_as_asked_and_a_resumed_run_is_the_same",
    "--save-every": "test_training.py::test_evaluations_and_saves_come_as_often_as_asked_and_a_resumed_run_is_the_same",
    "--compile": "test_compiling.py::test_a_compiled_run_computes_what_an_ordinary_one_does",
    "--tensorboard": "test_board.py::test_the_board_holds_the_logs_and_a_resumed_run_writes_it_anew",
    "--dist-timeout": "test_launch.py::test_a_process_that_does_not_come_is_missed_after_the_time_given",
    "--distributed": "test_main.py::test_two_processes_with_half_the_batch_give_the_weights_of_one",
    "--device": "test_flags.py::test_cpu_can_be_asked_for_and_cuda_is_refused_without_one",
    "--lstm-backend": "test_flags.py::test_lstm_backend_names_the_kernel_that_runs",
    "--dataset": "test_flags.py::test_the_named_data_set_is_read_from_its_path_and_fetched_where_asked",
    "--data-path": "test_flags.py::test_the_named_data_set_is_read_from_its_path_and_fetched_where_asked",
    "--inat-category": "test_datasets.py::test_inaturalists_species_may_be_taken_by_what_they_belong_to",
    "--images-only": "test_unlabelled.py::test_a_folder_of_pictures_is_enough",
    "--download": "test_flags.py::test_the_named_data_set_is_read_from_its_path_and_fetched_where_asked",
    "--base-model": "test_flags.py::test_base_model_and_scale_name_the_teacher",
    "--scale": "test_flags.py::test_base_model_and_scale_name_the_teacher",
    "--base-weight": "test_training.py::test_stage_attn_leaves_everything_but_the_mixing_parts_alone",
    "--far-weight": "test_main.py::test_downstream_gets_a_fresh_classifier_and_eval_reads_the_result",
    "--ds-mode": "test_main.py::test_downstream_gets_a_fresh_classifier_and_eval_reads_the_result",
    "--ds-pruned": "test_prune.py::test_prune_shrinks_reports_and_its_checkpoint_rebuilds_alone",
}


def named(rows):
    return [pytest.param(*row[1:], id=f"{row[0]} {row[2].__name__}") for row in rows]


@pytest.mark.parametrize(("line", "check"), named(READY))
def test_what_a_flag_says_of_data_and_model(line, check, ready):
    check(ready(line))


@pytest.mark.parametrize(("line", "check", "start"), named(READY_FROM))
def test_what_a_flag_says_of_the_losses(line, check, start, ready, request):
    check(ready(line), load(request.getfixturevalue(start), "--test")["model"])


@pytest.mark.parametrize(("line", "check"), named(DONE))
def test_what_a_flag_says_of_a_run(line, check, done):
    check(done(line))


@pytest.mark.parametrize(("line", "check", "start"), named(DONE_FROM))
def test_what_a_flag_says_of_weights(line, check, start, done, words):
    check(done(line), load(words(start.upper())[0], "--test")["model"])


def test_every_flag_of_a_training_mode_is_held():
    parser = main.build_parser()
    training = [job for mode, job in main.MODES.items() if mode not in ("eval", "predict")]
    read = set().union(*(parser.titled(job.groups) - job.ignores | job.reads for job in training))
    flags = {action.option_strings[0] for action in parser._actions if action.dest in read}
    held = {flag for row in (*READY, *READY_FROM, *DONE, *DONE_FROM) for flag in row[0].split()}
    assert flags == held | ELSEWHERE.keys()
    for test in ELSEWHERE.values():
        file, name = test.split("::")
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(), test


def test_the_named_data_set_is_read_from_its_path_and_fetched_where_asked(monkeypatch, ready):
    asked = []

    def digits(name, root, train, download=False, category="name"):
        asked.append((name, str(root), train, download))
        return build_split("DIGITS", root, train)

    monkeypatch.setattr(loading, "build_split", digits)
    ready(f"{TEACHER} --dataset CIFAR10 --data-path some/where --holdout 0 --download")
    assert asked == [("CIFAR10", "some/where", train, fetch) for fetch in (True, False) for train in (True, False)]
    asked.clear()
    ready(f"{TEACHER} --dataset CIFAR10 --holdout 0")
    assert asked == [("CIFAR10", "data/CIFAR10", train, False) for train in (True, False)]


@pytest.mark.parametrize(
    ("flags", "width"),
    [
        ("--scale Micro", 64),
        ("--base-model DeiT-Micro", 64),
        ("--scale Tiny", 192),
        ("", 192),
        ("--base-model deit3_small_patch16_224", 384),
    ],
)
def test_base_model_and_scale_name_the_teacher(flags, width, ready):
    line = TEACHER.replace("--scale Micro", flags)
    assert ready(f"{line} --input-size 32").model.embed_dim == width


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_lstm_backend_names_the_kernel_that_runs(backend, monkeypatch, far, capsys):
    calls = []
    for name in list(KERNELS):
        watch(monkeypatch, name, lambda x, name=name: calls.append(name))
    args = ["--mode", "eval", "--dataset", "DIGITS", "--num-workers", "0", "--far-weight", str(far / "best.pth")]
    assert main.main([*args, "--lstm-backend", backend]) == 0
    assert set(calls) == {backend}


def test_eval_fuses_and_keeps_the_accuracy(far, monkeypatch, tmp_path):
    fused = []
    monkeypatch.setattr(modes, "fuse", lambda model, recurrent: fused.append(recurrent) or fuse_model(model, recurrent))
    args = ["--mode", "eval", "--dataset", "DIGITS", "--num-workers", "0", "--far-weight", str(far / "best.pth")]
    results = {}
    for fuse in ((), ("--fuse", "float32"), *([("--fuse", "bfloat16")] if kernels.cpu.has_bfloat16() else [])):
        folder = tmp_path / "-".join(("run", *fuse))
        assert main.main([*args, *fuse, "--output-dir", str(folder)]) == 0
        results[fuse] = json.loads((folder / "result.json").read_text())
    plain = results.pop(())
    for result in results.values():
        assert (
            result["parameters"] == plain["parameters"] and abs(result["acc1"] - plain["acc1"]) < 2
        )  # barely trained: ties tip over
        assert abs(result["loss"] - plain["loss"]) < 1e-3
    assert fused == [torch.float32, torch.bfloat16][: len(results)]


def test_triton_is_refused_before_the_run_begins(failure, monkeypatch, tmp_path):
    monkeypatch.setattr(kernels.gpu, "interpreting", lambda: False)
    line = failure(*TEACHER.split(), "--device", "cpu", "--lstm-backend", "triton", "--output-dir", tmp_path / "run")
    assert "--lstm-backend triton" in line and not (tmp_path / "run").exists()


def test_cpu_can_be_asked_for_and_cuda_is_refused_without_one(failure):
    if not torch.cuda.is_available():
        assert "--device cuda" in failure("--mode", "eval", "--device", "cuda")
