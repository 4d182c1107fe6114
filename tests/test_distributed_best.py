"""Two processes: gradients accumulate as in one, and every process hands on the best epoch's weights."""

import json

import pytest
import torch

import main
from datasets.loading import Data
from engine.evaluate import evaluate
from models.deit import create_teacher
from models.replace import load_model
from tests.conftest import QUIET, run_ranks, write_images
from utils.checkpoint import load
from utils.configs import DataConfig, Settings
from utils.distributed import Context


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One run by one process and by two, in folders `one` and `two`: three batches an epoch, added up two by two.

    The model begins with the class that most evaluation images have; training, where most have the other, turns it
    away.
    """
    folder = tmp_path_factory.mktemp("best")
    for split, counts in (("train", (4, 38)), ("val", (7, 2))):
        for c, count in enumerate(counts):
            write_images(folder / f"data/{split}/class{c}", count, size=32, seed=c)
    model = create_teacher("DeiT-Micro", 2, 32)
    with torch.no_grad():
        model.head.bias.copy_(torch.tensor([0.5, -0.5]))
        model.head.weight.mul_(0.1)
    torch.save(model.state_dict(), folder / "start.pth")
    common = [
        *"--mode teacher --dataset FOLDER --data-path".split(),
        str(folder / "data"),
        "--scale",
        "Micro",
        *QUIET,
        "--base-weight",
        str(folder / "start.pth"),
        *"--epochs 2 --drop-path 0 --accum-steps 2 --select best --opt sgd --lr 0.03 --warmup-epochs 0".split(),
        *"--unscale-lr".split(),
    ]
    two = run_ranks("main.py", *common, "--batch-size", "7", "--output-dir", "two", cwd=folder)
    assert two.returncode == 0, two.stderr
    assert main.main([*common, "--batch-size", "14", "--output-dir", str(folder / "one")]) == 0
    return folder


def rows(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_accumulation_in_two_processes_is_that_of_one_with_twice_the_batch(runs):
    one, two = rows(runs / "one"), rows(runs / "two")
    assert len(one) == len(two) == 3 and one[1]["val"]["loss"] != one[0]["val"]["loss"]
    for ours, theirs in zip(one, two, strict=True):
        for part in ("train", "val"):
            assert ours[part] == pytest.approx(theirs[part], rel=1e-4)


def test_the_best_epoch_is_what_two_processes_hand_on_and_report(runs):
    accuracies = [row["val"]["acc1"] for row in rows(runs / "two")]
    assert accuracies[-1] == pytest.approx(100 * 2 / 9) and max(accuracies) == pytest.approx(100 * 7 / 9)
    result = json.loads((runs / "two/result.json").read_text())
    model, _ = load_model(runs / "two/best.pth", "--test")
    data = Data(DataConfig("FOLDER", runs / "data", 32, num_workers=0), Context())
    alone = evaluate(model, data.val_loader(4), Context(), Settings().autocast(torch.device("cpu")))
    assert result["acc1"] == pytest.approx(alone["acc1"]) == pytest.approx(max(accuracies))
    assert result["loss"] == pytest.approx(alone["loss"], rel=1e-5) and result["images"] == alone["images"]
    handed_on = load(runs / "two/last.pth", "--test")["model"]
    assert all(torch.equal(handed_on[name], p) for name, p in model.state_dict().items())
