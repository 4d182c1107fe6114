"""A flag that is accepted does something: each changes the run it belongs to."""

import json

import pytest
import torch

import main
from engine import jobs
from models import kernels
from models.fuse import fuse as fuse_model
from models.kernels import KERNELS
from utils.checkpoint import load

BASE = ["--dataset", "DIGITS", "--scale", "Micro", "--train-subset", "0.05", "--num-workers", "0", "--select", "last", "--seed", "3",
        "--holdout", "0.02"]  # fmt: skip
TEACHER = ["--mode", "teacher", *BASE, "--batch-size", "24", "--epochs", "2"]
QUIET = ["--aa", "none", "--reprob", "0", "--color-jitter", "0"]

FLAGS = [  # (what the baseline has besides, the flag and its other value)
    ("", "--seed 4"), ("", "--drop 0.5"), ("", "--drop-path 0.9"), ("", "--batch-size 36"), ("", "--epochs 3"), ("", "--lr 1e-2"),
    ("--warmup-epochs 1", "--warmup-epochs 2"), ("--warmup-epochs 1", "--warmup-lr 1e-3"), ("--warmup-epochs 0", "--min-lr 4e-4"),
    ("--warmup-epochs 0", "--sched step"), ("", "--opt sgd"), ("--opt sgd", "--momentum 0"), ("", "--weight-decay 0.5"),
    ("--opt sgd", "--clip-grad 0.01"), ("", "--accum-steps 2"), ("", "--unscale-lr"), ("", "--amp bf16"), ("", "--smoothing 0.3"),
    ("", "--mixup 0.8"), ("", "--cutmix 1.0"), ("", "--repeated-aug"), ("", "--aa none"), ("--aa none", "--color-jitter 0.9"),
    ("", "--reprob 0.9"), ("--reprob 1", "--remode const"), ("--reprob 1", "--recount 3"), ("", "--train-interpolation bilinear"),
    ("", "--train-subset 0.06"), ("", "--holdout 0.5"),
]  # fmt: skip
TRAIN_FLAGS = [
    "--block-ft-batch-size 36", "--block-ft-epochs 2", "--block-ft-lr 1e-2", "--block-ft-warmup-epochs 0", "--block-ft-warmup-lr 1e-3",
    "--block-ft-opt sgd", "--block-ft-weight-decay 0.9", "--block-ft-accum-steps 2", "--block-ft-mode FC", "--block-ft-mode FC+head",
    "--block-ft-train-loss combine", "--block-ft-train-loss similarity", "--train-loss classification", "--distill-input teacher",
    "--rep-init value", "--rep-init random", "--rep-by lstm", "--rep-by mixer", "--replace 1 2-3", "--skip-train-attn", "--finetune-head",
    "--step 2", "--train-mode parallel --step 2",
]  # fmt: skip
SAME = {"--train-mode parallel --step 2"}  # four blocks at once is what step 12 does too


def run(folder, *argv: str):
    assert main.main([*argv, "--output-dir", str(folder)]) == 0
    return load(folder / "last.pth", "--test")["model"]


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))


@pytest.fixture(scope="module")
def baseline(tmp_path_factory):
    done = {}

    def get(argv: tuple[str, ...]):
        if argv not in done:
            done[argv] = run(tmp_path_factory.mktemp("base"), *argv)
        return done[argv]

    return get


@pytest.mark.parametrize(("besides", "flag"), FLAGS)
def test_each_flag_of_a_stage_changes_its_weights(besides, flag, baseline, tmp_path):
    base = (*TEACHER, *besides.split())
    if flag == "--holdout 0.5":
        run(tmp_path, *base, *flag.split())
        assert json.loads((tmp_path / "result.json").read_text())["images"] == 718
        return
    assert not equal(baseline(base), run(tmp_path, *base, *flag.split()))


@pytest.mark.parametrize("flag", TRAIN_FLAGS)
def test_each_distillation_flag_changes_the_weights(flag, baseline, teacher, tmp_path):
    base = ("--mode", "train", *BASE, *QUIET, "--batch-size", "24", "--block-ft-batch-size", "24", "--epochs", "1", "--block-ft-epochs", "1",
            "--base-weight", str(teacher))  # fmt: skip
    assert equal(baseline(base), run(tmp_path, *base, *flag.split())) == (flag in SAME)


@pytest.mark.parametrize("flag", ["--block-ft-sched step", "--block-ft-min-lr 1e-3", "--block-ft-momentum 0", "--block-ft-clip-grad 0.01"])
def test_each_schedule_flag_of_the_block_stage_changes_the_weights(flag, baseline, teacher, tmp_path):
    base = ("--mode", "train", *BASE, *QUIET, "--block-ft-batch-size", "24", "--block-ft-epochs", "2", "--block-ft-opt", "sgd",
            "--block-ft-warmup-epochs", "0", "--skip-train-attn", "--base-weight", str(teacher))  # fmt: skip
    assert not equal(baseline(base), run(tmp_path, *base, *flag.split()))


def test_input_size_and_crop_ratio_change_what_the_model_sees(tmp_path):
    base = [*TEACHER, "--epochs", "1", "--input-size", "48"]
    sizes = {r: run(tmp_path / r, *base, "--eval-crop-ratio", r)["pos_embed"].shape[1] for r in ("0.875", "0.5")}
    assert set(sizes.values()) == {12 * 12 + 1}
    losses = {json.loads((tmp_path / r / "result.json").read_text())["loss"] for r in sizes}
    assert len(losses) == 2


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_lstm_backend_names_the_kernel_that_runs(backend, monkeypatch, far, capsys):
    calls = []
    for name, kernel in list(KERNELS.items()):
        monkeypatch.setitem(KERNELS, name, lambda x, cells, name=name, kernel=kernel: calls.append(name) or kernel(x, cells))
    args = ["--mode", "eval", "--dataset", "DIGITS", "--num-workers", "0", "--far-weight", str(far / "best.pth")]
    assert main.main([*args, "--lstm-backend", backend]) == 0
    assert set(calls) == {backend}


def test_eval_fuses_and_keeps_the_accuracy(far, monkeypatch, tmp_path):
    fused = []
    monkeypatch.setattr(jobs, "fuse", lambda model, recurrent: fused.append(recurrent) or fuse_model(model, recurrent))
    args = ["--mode", "eval", "--dataset", "DIGITS", "--num-workers", "0", "--far-weight", str(far / "best.pth")]
    results = {}
    for fuse in ((), ("--fuse", "float32"), *([("--fuse", "bfloat16")] if kernels.cpu.has_bfloat16() else [])):
        folder = tmp_path / "-".join(("run", *fuse))
        assert main.main([*args, *fuse, "--output-dir", str(folder)]) == 0
        results[fuse] = json.loads((folder / "result.json").read_text())
    plain = results.pop(())
    for result in results.values():
        assert result["parameters"] == plain["parameters"] and abs(result["acc1"] - plain["acc1"]) < 2  # barely trained: ties tip over
        assert abs(result["loss"] - plain["loss"]) < 1e-3
    assert fused == [torch.float32, torch.bfloat16][: len(results)]


def test_triton_is_refused_before_the_run_begins(failure, monkeypatch, tmp_path):
    monkeypatch.setattr(kernels.gpu, "interpreting", lambda: False)
    line = failure("--mode", "teacher", *BASE, "--device", "cpu", "--lstm-backend", "triton", "--output-dir", tmp_path / "run")
    assert "--lstm-backend triton" in line and not (tmp_path / "run").exists()


def test_cpu_can_be_asked_for_and_cuda_is_refused_without_one(failure):
    if not torch.cuda.is_available():
        assert "--device cuda" in failure("--mode", "eval", "--device", "cuda")
