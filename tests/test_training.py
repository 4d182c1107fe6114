"""The loop keeps its promises: resumable to the bit, exact in what it adds up, stopping cleanly."""

import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import main
from datasets.loading import Data
from engine import train
from engine.distill import Distillation
from engine.evaluate import evaluate
from engine.fidelity import fidelity
from engine.stages import Stage
from engine.train import Trainer, make_optimizer
from models.deit import create_teacher
from models.replace import FarConfig, build, load_model
from tests.conftest import FLOAT32, TEACH, TRAIN, Started, assert_equal, lines_in, report, rows, wait_for, weights
from utils.checkpoint import load
from utils.configs import DataConfig, Optim, Settings
from utils.distributed import Context, prepare
from utils.run_folder import RunFolder

FEW = "--train-subset 0.04 --holdout 0.02 --batch-size 16 --block-ft-batch-size 16 --epochs 1 --block-ft-epochs 1"


def distil(teacher: Path, run: Path, flags: str) -> Path:
    """A finished run of main.py --mode train, of three steps a stage unless the flags say otherwise; its folder."""
    line = [*TRAIN, *FEW.split(), *flags.split(), "--base-weight", str(teacher)]
    assert main.main([*line, "--output-dir", str(run)]) == 0
    return run


def epochs(run):
    return [(r["stage"], r["epoch"], r["train"], r["val"]) for r in rows(run)]


SIGNALS = {signal.SIGKILL: -9, signal.SIGTERM: 0, signal.SIGINT: 130, signal.SIGHUP: 129}  # and the exit code of each


def test_a_run_stopped_again_and_again_ends_bit_equal_to_one_that_was_not(teacher, tmp_path):
    """Four stages with everything random switched on, one signal in the epoch of each."""
    flags = "--epochs 1 --block-ft-epochs 1 --batch-size 4 --block-ft-batch-size 4 --train-subset 0.06 --input-size 16"
    flags += " --train-mode sequential --step 2 --mixup 0.8 --cutmix 1.0 --drop-path 0.2 --drop 0.1 --reprob 0.5"
    line = ["main.py", *TRAIN, *flags.split(), "--base-weight", str(teacher), "--resume", "auto", "--output-dir"]
    undisturbed = Started(*line, "whole", cwd=tmp_path)
    for stage, (number, code) in enumerate(SIGNALS.items()):
        job = Started(*line, "run", cwd=tmp_path)
        wait_for(lambda stage=stage: lines_in(tmp_path / "run/log.jsonl") > 2 * stage, job)
        time.sleep(0.05)  # into the epoch
        job.send_signal(number)
        done = job.finish()
        assert done.returncode == code and "Traceback" not in done.stderr, done
        assert done.stdout.count("--resume goes on") == (number != signal.SIGKILL)
    for job in (undisturbed, Started(*line, "run", cwd=tmp_path)):
        assert (done := job.finish()).returncode == 0, done.stderr
    for name in ("last.pth", "best.pth"):
        assert_equal(weights(tmp_path / "run", name), weights(tmp_path / "whole", name))
    assert epochs(tmp_path / "run") == epochs(tmp_path / "whole")


def test_run_folder_holds_what_the_readme_says(far):
    names = {p.name for p in far.iterdir()}
    assert {"args.json", "log.jsonl", "curves.png", "last.pth", "best.pth", "result.json"} <= names
    record = report(far, "args.json")
    assert record["args"]["epochs"] == 1 and record["versions"]["torch"] == torch.__version__
    assert [(r["stage"], r["epoch"]) for r in rows(far)] == [("attn", 0), ("attn", 1), ("block", 0), ("block", 1)]
    for row in rows(far):  # how long steps waited for images, and the memory held
        assert 0 <= row["data_seconds"] <= max(row["seconds"], 0) and row["peak_memory_mb"] > 50
    assert any(row["data_seconds"] > 0 for row in rows(far))


def test_evaluation_agrees_with_one_pass_by_hand(far):
    model, _ = load_model(far / "best.pth", "--test")
    data = Data(DataConfig("DIGITS", None, 32, num_workers=0), Context())
    got = evaluate(model, data.val_loader(64), Context(), FLOAT32)
    x, y = map(torch.cat, zip(*data.val_loader(360), strict=True))
    with torch.no_grad():
        logits = model.eval()(x)
    order = logits.argsort(1, descending=True)[:, :5]
    assert got["images"] == 360
    assert got["acc1"] == pytest.approx(100 * (order[:, 0] == y).float().mean().item())
    assert got["acc5"] == pytest.approx(100 * (order == y[:, None]).any(1).float().mean().item())
    assert got["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, y).item(), rel=1e-5)


@pytest.mark.parametrize(("rep_by", "source"), [("lstm", "teacher"), ("mixer", "student"), ("gru", "student")])
def test_every_replacement_trains_from_either_input(rep_by, source, teacher, tmp_path):
    flags = "--finetune-head --train-loss similarity --block-ft-train-loss combine"
    run = distil(teacher, tmp_path / "run", f"{flags} --rep-by {rep_by} --distill-input {source}")
    assert [r["stage"] for r in rows(run)] == ["attn"] * 2 + ["block"] * 2 + ["head"] * 2


def test_a_loss_that_is_not_finite_names_stage_step_and_checkpoint(failure, teacher, tmp_path):
    flags = "--epochs 3 --lr 1e30 --unscale-lr --warmup-epochs 0 --opt sgd".split()
    line = failure(*TRAIN, "--base-weight", teacher, *flags, "--output-dir", tmp_path / "run")
    assert "step" in line and "stage attn" in line and str(tmp_path / "run/last.pth") in line
    assert all(torch.isfinite(v).all() for v in weights(tmp_path / "run").values())


@pytest.mark.parametrize(("block_batch", "evaluations"), [("16", 2), ("8", 3)])
def test_no_weights_are_evaluated_twice(block_batch, evaluations, teacher, tmp_path, monkeypatch):
    counted = []

    def counting(function):
        return lambda *args, **kwargs: counted.append(function) or function(*args, **kwargs)

    for function in (evaluate, fidelity):
        monkeypatch.setattr(f"engine.train.{function.__name__}", counting(function))
    run = distil(teacher, tmp_path / "run", f"--select last --block-ft-batch-size {block_batch}")
    _, attn, before_block, block = (row["val"] for row in rows(run))
    assert counted == [evaluate] * evaluations + [fidelity] and before_block == pytest.approx(attn)
    result = report(run)
    assert block == {name: result[name] for name in block}


def test_a_finished_run_resumed_says_its_result_again_and_writes_nothing_else(far, teacher, tmp_path):
    run = shutil.copytree(far, tmp_path / "run")
    (run / "result.json").unlink()
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    line = [*TRAIN, *"--epochs 1 --block-ft-epochs 1 --resume".split(), "--base-weight", str(teacher)]
    assert main.main([*line, "--output-dir", str(run)]) == 0
    assert report(run) == report(far)
    assert {p.name: p.read_bytes() for p in run.iterdir() if p.name != "result.json"} == before


def test_evaluations_and_saves_come_as_often_as_asked_and_a_resumed_run_is_the_same(tmp_path, monkeypatch):
    flags = "--epochs 5 --eval-every 2 --save-every 3 --train-subset 0.03 --batch-size 16 --input-size 16"
    line = [*TEACH, *flags.split(), "--output-dir"]
    assert main.main([*line, str(tmp_path / "whole")]) == 0
    assert [row["epoch"] for row in rows(tmp_path / "whole") if row["val"]] == [0, 2, 4, 5]
    report = Trainer.report

    def broken(self, stage, *given):
        report(self, stage, *given)
        if self.position.epoch == 4:  # whose weights are not saved: those of 3 are the last
            raise RuntimeError("power is gone")

    monkeypatch.setattr(Trainer, "report", broken)
    with pytest.raises(RuntimeError, match="power"):
        main.main([*line, str(tmp_path / "cut")])
    assert load(tmp_path / "cut/last.pth", "--test")["position"]["epoch"] == 3
    with (tmp_path / "cut/log.jsonl").open("a") as log:
        log.write('{"stage": "teach')  # a line that was cut too
    monkeypatch.setattr(Trainer, "report", report)
    assert main.main([*line, str(tmp_path / "cut"), "--resume"]) == 0
    for name in ("last.pth", "best.pth"):
        assert_equal(weights(tmp_path / "cut", name), weights(tmp_path / "whole", name))
    assert epochs(tmp_path / "cut") == epochs(tmp_path / "whole")


# The loop by itself: a small teacher of 16 pixels on 24 digits, three batches of 8; a test may replace its task.

# Its rate is 0.1 in the first epoch and 0.01 in the second.
SGD = Optim(2, 8, 0.1, warmup_epochs=0, sched="step", opt="sgd", momentum=0, weight_decay=0)
ALONE, LAST = Context(), Settings(select="last")


def digits() -> Data:
    return Data(DataConfig("DIGITS", None, 16, train_subset=24 / 1423, holdout=0.01, num_workers=0), ALONE)


def make_trainer(folder, optim=SGD, make_task=Distillation, rank=0, resume=False, settings=LAST, drop=0.0):
    """A trainer of one stage. One folder and one data set serve whichever rank trains."""
    torch.manual_seed(0)
    model = create_teacher("DeiT-Micro", 10, 16, drop)
    folder.mkdir(exist_ok=True)
    run = RunFolder(folder, ALONE, resume)
    if last := run.load_last():
        model.load_state_dict(last["model"])
    stages = [Stage("teacher", (), (), "full", "classification", "output", optim)]
    config = FarConfig("DeiT-Micro", 10, 16)
    return Trainer(model, config, stages, make_task, digits(), run, Context(rank), settings, last)


def fit(folder, **kwargs):
    trainer = make_trainer(folder, **kwargs)
    trainer.fit()
    return trainer.model.state_dict()


@pytest.mark.parametrize("opt", ["adamw", "sgd"])
def test_weight_decay_shrinks_matrices_and_leaves_biases_norms_and_positions(opt):
    model = build(FarConfig("DeiT-Micro", 10, 32, replaced=(1,)))
    for p in model.parameters():
        torch.nn.init.normal_(p)
        p.grad = torch.zeros_like(p)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer, _ = make_optimizer(model, Optim(1, 1, 0.03, 0, opt=opt, weight_decay=0.2, momentum=0), 1)
    optimizer.step()
    for name, p in model.named_parameters():
        kept = p.ndim == 1 or name in ("cls_token", "pos_embed")  # as DeiT and timm have it
        expected = before[name] * (1 if kept else 1 - 0.03 * 0.2)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=0, msg=name)


def test_ranks_draw_different_dropout_and_one_rank_always_the_same(tmp_path):
    common = {"optim": replace(SGD, epochs=1), "drop": 0.5}
    one, other, again = (fit(tmp_path / name, rank=rank, **common) for name, rank in (("a", 0), ("b", 1), ("c", 1)))
    assert_equal(other, again)
    assert not torch.equal(one["head.weight"], other["head.weight"])


class Slope(torch.nn.Module):
    """A loss whose gradient is `slope` by construction, in the classifier's weights alone."""

    def __init__(self, model, slope):
        super().__init__()
        self.model, self.slope = model, slope

    def forward(self, images, targets):
        loss = (self.model.head.weight * self.slope).sum() + 0 * sum(p.sum() for p in self.model.parameters())
        return loss, {"classification": loss.detach()}


@pytest.mark.parametrize("amp", ["off", "fp16"])
@pytest.mark.parametrize(("length", "clipped"), [(0.5, 0.5), (30, 0.7)])
def test_clipping_bounds_the_gradient_itself_not_the_scaled_one(length, clipped, amp, tmp_path):
    direction = torch.randn(10, 64)
    direction /= direction.norm()
    optim = replace(SGD, epochs=1, accum_steps=3, clip_grad=0.7)
    trainer = make_trainer(
        tmp_path, optim, lambda model, *_: Slope(model, length * direction), settings=replace(LAST, amp=amp)
    )
    before = trainer.model.head.weight.detach().clone()
    trainer.fit()
    moved = before - trainer.model.head.weight
    torch.testing.assert_close(moved, 0.1 * clipped * direction, rtol=1e-4, atol=1e-6)


def test_the_smaller_last_group_of_an_epoch_counts_each_of_its_batches_in_full(tmp_path):
    trainer = make_trainer(tmp_path / "run", replace(SGD, accum_steps=2))
    torch.manual_seed(0)
    expected, data = create_teacher("DeiT-Micro", 10, 16), digits()
    for epoch, rate in ((0, 0.1), (1, 0.01)):
        batches = list(data.seek(data.train_loader(8), epoch))
        assert len(batches) == 3
        for group in (batches[:2], batches[2:]):
            x, y = map(torch.cat, zip(*group, strict=True))
            loss = torch.nn.functional.cross_entropy(expected(x), y, label_smoothing=0.1)
            for p, g in zip(expected.parameters(), torch.autograd.grad(loss, list(expected.parameters())), strict=True):
                p.data -= rate * g
    trainer.fit()
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(trainer.model.state_dict()[name], value, rtol=1e-4, atol=1e-6, msg=name)


class Loud(torch.nn.Module):
    """A loss large enough to overflow fp16 gradients at the scaler's first scale; it may fail at a call."""

    def __init__(self, criterion, fail_at):
        super().__init__()
        self.criterion, self.left = criterion, fail_at

    def forward(self, logits, targets):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return 25 * self.criterion(logits, targets)


def loud(fail_at=0):
    return lambda model, stage, criterion: Distillation(model, stage, Loud(criterion, fail_at))


@pytest.mark.parametrize("settings", [replace(LAST, amp="fp16"), replace(LAST, model_ema=0.6)], ids=["fp16", "ema"])
def test_loss_scale_and_averaged_weights_are_resumed_to_the_bit(settings, tmp_path):
    common = {"optim": Optim(2, 4, 1e-3, warmup_epochs=0, clip_grad=1.0), "settings": settings}
    whole = fit(tmp_path / "whole", make_task=loud(), **common)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "run", make_task=loud(8), **common)
    stopped = load(tmp_path / "run/last.pth", "--test")
    assert stopped["position"]["epoch"] == 1 and stopped["optimizer"]["state"]
    assert settings.amp != "fp16" or stopped["scaler"]["scale"] < 65536  # it has overflowed, backed off, trained since
    assert_equal(fit(tmp_path / "run", make_task=loud(), resume=True, **common), whole)


def test_averaged_weights_are_those_of_the_formula_and_handed_on(tmp_path, monkeypatch):
    steps, update = [], train.ModelEmaV3.update

    def watched(average, model, step):
        steps.append({name: value.clone() for name, value in model.state_dict().items()})
        update(average, model, step)

    monkeypatch.setattr(train.ModelEmaV3, "update", watched)
    whole = fit(tmp_path, optim=Optim(2, 4, 1e-3, warmup_epochs=0), settings=replace(LAST, model_ema=0.6))
    expected = steps[0]
    for number, weights_then in enumerate(steps[1:], 1):
        decay = min(0.6, 1 - (1 + number) ** (-2 / 3))
        expected = {name: decay * value + (1 - decay) * weights_then[name] for name, value in expected.items()}
    for name, value in weights(tmp_path, "best.pth").items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)
    assert_equal(whole, weights(tmp_path, "best.pth"))  # handed on, and so evaluated at the end


@pytest.mark.parametrize(("amp", "dtype"), [("off", "float32"), ("bf16", "bfloat16"), ("fp16", "float16")])
def test_the_loop_trains_and_evaluates_in_the_precision_asked_for(amp, dtype, tmp_path):
    trainer, seen = make_trainer(tmp_path, replace(SGD, epochs=1), settings=replace(LAST, amp=amp)), set()
    trainer.model.head.register_forward_hook(lambda module, args, out: seen.add((module.training, out.dtype)))
    trainer.fit()
    assert seen == {(training, getattr(torch, dtype)) for training in (True, False)}


@pytest.mark.parametrize(("select", "chosen"), [("best", 2), ("last", 5)])
def test_the_epoch_handed_on_is_the_last_or_of_the_best_accuracies_that_of_the_lowest_loss(
    select, chosen, tmp_path, monkeypatch
):
    # Before training, then five epochs.
    accuracies, losses = iter([10.0, 40.0, 40.0, 30.0, 40.0, 40.0]), iter([9.0, 3.0, 2.0, 1.0, 2.0, 2.5])
    after = []

    def scripted(model, *_):
        after.append({name: p.clone() for name, p in model.state_dict().items()})
        return {"loss": next(losses), "acc1": next(accuracies), "acc5": 100.0, "balanced_acc1": 0.0, "images": 1}

    monkeypatch.setattr(train, "evaluate", scripted)
    handed_on = fit(tmp_path, optim=replace(SGD, epochs=5), settings=Settings(select=select))
    assert_equal(weights(tmp_path, "best.pth"), after[chosen])
    assert_equal(handed_on, after[chosen])
    assert not torch.equal(after[2]["head.weight"], after[1]["head.weight"])


def test_a_gpu_computes_in_bfloat16_where_it_can_and_in_tf32_products_a_cpu_in_full(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 1)
    used = []
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    assert Settings().precision(cpu) == "off" and Settings(amp="bf16").precision(cpu) == "bf16"
    for has, expected in ((True, "bf16"), (False, "off")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has: has)
        assert Settings().precision(cuda) == expected
    assert prepare(cpu) == cpu and not used and torch.get_float32_matmul_precision() == "highest"
    assert Settings(amp="off").products(cpu) == "float32 matrix products in full"
    assert prepare(cuda) == cuda and used == [cuda] and torch.get_float32_matmul_precision() == "high"
    assert Settings(amp="bf16").products(cuda) == "autocast to bf16, other float32 matrix products in TF32"
