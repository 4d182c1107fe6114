"""--dry-run: what a run would do, said before anything is written."""

import re

import pytest

import main
import prune
from engine.distill import Distillation
from engine.dry_run import weigh
from engine.stages import Stage, select_trainable
from models.deit import create_teacher
from tests.conftest import DIGITS, QUIET, TRAIN, digits
from utils.configs import Optim, Settings


@pytest.mark.parametrize("mode", ["train", "teacher", "downstream", "prune"])
def test_a_dry_run_says_what_the_run_then_does_and_leaves_nothing(mode, teacher, far, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = {
        "train": [*TRAIN, "--base-weight", str(teacher), "--epochs", "2", "--block-ft-epochs", "3"],
        "teacher": ["--mode", "teacher", *DIGITS, "--batch-size", "64", "--epochs", "2"],
        "downstream": ["--mode", "downstream", *DIGITS, "--far-weight", str(far / "best.pth"), "--batch-size", "64"],
        "prune": ["--model-path", str(far / "best.pth"), "--dataset", "DIGITS", *QUIET, "--batch-size", "64"],
    }[mode]
    script = prune if mode == "prune" else main
    assert script.main([*line, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert "DIGITS: " in said and "10 classes (0, 1, 2, ...)" in said and f"runs/{mode}-<time>" in said
    assert all(re.search(r"\S  +\d", line) for line in said.splitlines() if line.startswith("stage"))
    if mode == "train":
        assert main.main([*line, "--epochs", "1", "--block-ft-epochs", "1", "--output-dir", "run"]) == 0
        ran = capsys.readouterr().out
        for name, epochs in (("attn", 2), ("block", 3)):
            (count,) = re.findall(rf"stage {name}: ([0-9,]+) parameters", ran)
            assert f"stage {name}" in said and re.search(rf"{count} of [0-9,]+ parameters", said)
            assert f"{epochs} epochs of 2 updates" in said  # 144 images, 64 a batch
        assert "4 of 4 blocks" in said


def test_memory_is_that_of_weights_optimiser_and_what_the_backward_pass_needs():
    data = digits(train_subset=0.05)
    model = create_teacher("DeiT-Micro", 10, 32)
    stage = Stage("head", (), (), "head", "classification", "output", Optim(1, 8, 0.1))
    select_trainable(model, stage)
    task = Distillation(model, stage, Settings().criterion())
    fixed, image = weigh(task, data, Settings())
    parameters, head = sum(p.numel() for p in model.parameters()), 64 * 10 + 10
    assert fixed == 4 * parameters + 3 * 4 * head
    model.requires_grad_(True)
    fixed, whole = weigh(task, data, Settings())
    assert fixed == 16 * parameters
    # 65 tokens, width 64: at least inputs of 4 blocks' two norms and four maps, hidden units of MLPs twice.
    assert whole > 4 * 65 * 64 * 4 * (6 + 2 * 4) > 20 * image
