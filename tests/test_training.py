"""The loop keeps its promises: resumable to the bit, exact over processes, stopping cleanly."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import main
from engine.evaluate import evaluate
from engine.train import Settings
from models.replace import load_model
from tests.conftest import ROOT, TEACH, TRAIN, launch
from utils.checkpoint import load
from utils.distributed import Context


def weights(run, name="last.pth"):
    return load(run / name, "--test")["model"]


def assert_equal(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


def rows(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def long(teacher):
    """A run in two stages, with everything random switched on."""
    return [*TRAIN, "--base-weight", str(teacher), "--epochs", "2", "--block-ft-epochs", "2",
            "--batch-size", "16", "--block-ft-batch-size", "16", "--train-mode", "sequential", "--step", "2",
            "--mixup", "0.8", "--cutmix", "1.0", "--drop-path", "0.2", "--drop", "0.1", "--reprob", "0.5"]  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(long, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    done = launch(str(ROOT / "main.py"), *long, "--output-dir", "run", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def interrupt(command, folder, number, after):
    """Starts a run, sends it a signal once log.jsonl has `after` lines and a moment has passed, returns (code, output)."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "main.py"), *command, "--output-dir", "run"], cwd=folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    log, deadline = folder / "run/log.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and not (log.exists() and len(log.read_text().splitlines()) >= after):
        time.sleep(0.01)
    time.sleep(0.15)  # into the epoch
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    return process.returncode, output


@pytest.mark.parametrize("after", [2, 5])
def test_a_run_killed_mid_epoch_ends_bit_equal_after_resume(long, uninterrupted, tmp_path, after):
    code, _ = interrupt(long, tmp_path, signal.SIGKILL, after)
    assert code == -signal.SIGKILL
    done = launch(str(ROOT / "main.py"), *long, "--output-dir", "run", "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_equal(weights(tmp_path / "run"), weights(uninterrupted))
    assert_equal(weights(tmp_path / "run", "best.pth"), weights(uninterrupted, "best.pth"))
    a, b = ([(r["stage"], r["epoch"], r["train"], r["val"]) for r in rows(run)] for run in (tmp_path / "run", uninterrupted))
    assert a == b


def test_sigterm_finishes_the_step_saves_and_exits_cleanly_then_resume_is_bit_equal(long, uninterrupted, tmp_path):
    code, output = interrupt(long, tmp_path, signal.SIGTERM, 3)
    assert code == 0 and "--resume goes on" in output
    done = launch(str(ROOT / "main.py"), *long, "--output-dir", "run", "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_equal(weights(tmp_path / "run"), weights(uninterrupted))
    assert [r["train"] for r in rows(tmp_path / "run")] == [r["train"] for r in rows(uninterrupted)]


def test_run_folder_holds_what_the_readme_says(far):
    names = {p.name for p in far.iterdir()}
    assert {"args.json", "log.jsonl", "curves.png", "last.pth", "best.pth", "result.json"} <= names
    record = json.loads((far / "args.json").read_text())
    assert record["args"]["epochs"] == 1 and record["versions"]["torch"] == torch.__version__
    assert [(r["stage"], r["epoch"]) for r in rows(far)] == [("attn", 0), ("attn", 1), ("block", 0), ("block", 1)]


def test_stage_attn_leaves_everything_but_the_mixing_parts_alone(far, teacher, tmp_path):
    args = [*TRAIN, "--base-weight", str(teacher), "--epochs", "1", "--block-ft-epochs", "0"]
    assert main.main([*args, "--select", "last", "--output-dir", str(tmp_path / "run")]) == 0
    before, after = load(teacher, "--test")["model"], weights(tmp_path / "run")
    for name in before.keys() & after.keys():
        assert torch.equal(before[name], after[name]), name
    assert torch.equal(after["blocks.0.attn.post_proj.weight"], before["blocks.0.attn.proj.weight"])


def test_evaluation_agrees_with_one_pass_by_hand(far):
    from datasets.loading import Data, DataConfig

    model, _ = load_model(far / "best.pth", "--test")
    data = Data(DataConfig("DIGITS", None, 32, num_workers=0), Context())
    got = evaluate(model, data.val_loader(64), Context(), Settings().autocast(torch.device("cpu")))
    x, y = map(torch.cat, zip(*data.val_loader(360), strict=True))
    with torch.no_grad():
        logits = model.eval()(x)
    order = logits.argsort(1, descending=True)[:, :5]
    assert got["images"] == 360
    assert got["acc1"] == pytest.approx(100 * (order[:, 0] == y).float().mean().item())
    assert got["acc5"] == pytest.approx(100 * (order == y[:, None]).any(1).float().mean().item())
    assert got["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, y).item(), rel=1e-5)


def test_gradient_accumulation_equals_the_larger_batch(teacher, tmp_path):
    common = [*TRAIN, "--base-weight", str(teacher), "--epochs", "1", "--block-ft-epochs", "0", "--drop-path", "0",
              "--unscale-lr", "--opt", "sgd", "--warmup-epochs", "0", "--lr", "0.1", "--select", "last"]  # fmt: skip
    # 144 images: three batches of 48, or six of 24 taken two by two.
    assert main.main([*common, "--batch-size", "48", "--output-dir", str(tmp_path / "a")]) == 0
    assert main.main([*common, "--batch-size", "24", "--accum-steps", "2", "--output-dir", str(tmp_path / "b")]) == 0
    assert main.main([*common, "--batch-size", "24", "--output-dir", str(tmp_path / "c")]) == 0
    a, b, c = (weights(tmp_path / run) for run in "abc")
    name = "blocks.0.attn.pre_proj.weight"
    assert (a[name] - b[name]).abs().max() < 1e-6 < 1e-4 < (a[name] - c[name]).abs().max()


def test_select_hands_on_the_best_or_the_last_epoch(teacher, tmp_path):
    common = [*TEACH, "--base-weight", str(teacher), "--epochs", "3", "--lr", "0.05", "--unscale-lr",
              "--warmup-epochs", "0"]  # fmt: skip
    for select in ("best", "last"):
        assert main.main([*common, "--select", select, "--output-dir", str(tmp_path / select)]) == 0
        accuracies = [r["val"]["acc1"] for r in rows(tmp_path / select)]
        expected = max(accuracies) if select == "best" else accuracies[-1]
        assert json.loads((tmp_path / select / "result.json").read_text())["acc1"] == pytest.approx(expected)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_amp_trains_with_finite_losses(amp, teacher, tmp_path):
    args = [*TRAIN, "--base-weight", str(teacher), "--epochs", "1", "--block-ft-epochs", "0", "--amp", amp]
    assert main.main([*args, "--output-dir", str(tmp_path / "run")]) == 0
    assert all(torch.isfinite(v).all() for v in weights(tmp_path / "run").values())


@pytest.mark.parametrize("rep_by", ["lstm", "mixer"])
@pytest.mark.parametrize("source", ["teacher", "student"])
def test_every_replacement_trains_from_either_input(rep_by, source, teacher, tmp_path):
    args = [*TRAIN, "--base-weight", str(teacher), "--epochs", "1", "--block-ft-epochs", "1", "--rep-by", rep_by,
            "--distill-input", source, "--finetune-head", "--train-loss", "similarity", "--block-ft-train-loss", "combine"]  # fmt: skip
    assert main.main([*args, "--output-dir", str(tmp_path / "run")]) == 0
    assert [r["stage"] for r in rows(tmp_path / "run")] == ["attn"] * 2 + ["block"] * 2 + ["head"] * 2


def test_a_loss_that_is_not_finite_names_stage_step_and_checkpoint(failure, teacher, tmp_path):
    line = failure(*TRAIN, "--base-weight", teacher, "--epochs", "3", "--lr", "1e30", "--unscale-lr",
                   "--warmup-epochs", "0", "--opt", "sgd", "--output-dir", tmp_path / "run")  # fmt: skip
    assert "step" in line and "stage attn" in line and str(tmp_path / "run/last.pth") in line
    assert all(torch.isfinite(v).all() for v in weights(tmp_path / "run").values())
