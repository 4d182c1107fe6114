"""--tensorboard: its file says what the logs say."""

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main
from utils import board
from utils.distributed import Context
from utils.errors import FarError
from utils.run_folder import RunFolder

FLAGS = """--mode teacher --dataset DIGITS --scale Micro --num-workers 0 --holdout 0.02 --train-subset 0.06 --epochs 2
--batch-size 24 --tensorboard""".split()


def scalars(run):
    """{tag: [(step, value), ...]} by TensorBoard's own reader."""
    (file,) = (run / "tensorboard").iterdir()
    read = EventAccumulator(str(file)).Reload()
    return {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_board_holds_the_logs_and_a_resumed_run_writes_it_anew(tmp_path):
    run = tmp_path / "run"
    flags = [*FLAGS, "--output-dir", str(run)]
    assert main.main(flags) == 0
    found, epochs, steps = scalars(run), lines(run / "log.jsonl"), lines(run / "steps.jsonl")
    assert found["teacher/val/acc1"] == [(row["epoch"], pytest.approx(row["val"]["acc1"])) for row in epochs]
    trained = [(row["epoch"], pytest.approx(row["train"]["loss"])) for row in epochs if row["train"]]
    assert found["teacher/train/loss"] == trained and len(trained) == 2
    assert found["teacher/run/lr"] == [(row["epoch"], pytest.approx(row["lr"])) for row in epochs]
    assert found["steps of stage 1/loss"] == [(k, pytest.approx(row["loss"])) for k, row in enumerate(steps)]
    assert len(steps) == 6
    # A process that was killed between the log and the board left an older board.
    (file,) = (run / "tensorboard").iterdir()
    file.write_bytes(file.read_bytes()[:200])
    RunFolder(run, Context(), True, True).append("log.jsonl", [{**epochs[-1], "epoch": 3}])
    again = scalars(run)
    assert [step for step, _ in again["teacher/val/acc1"]] == [0, 1, 2, 3]
    assert again["steps of stage 1/loss"] == found["steps of stage 1/loss"]


def test_steps_that_run_again_after_a_kill_are_on_the_board_once(tmp_path):
    steps = [{"stage_index": 0, "epoch": 0, "step": k, "loss": 1.0 + k} for k in range(3)]
    epoch = {"stage": "s", "stage_index": 0, "epoch": 1, "train": {}, "val": {}, "lr": 1.0, "images_per_s": 1.0}
    epoch |= {"data_seconds": 0.0, "peak_memory_mb": 1}
    RunFolder(tmp_path, Context(), False, True).append("steps.jsonl", steps)  # and killed before last.pth
    resumed = RunFolder(tmp_path, Context(), True, True)
    resumed.append("log.jsonl", [epoch])
    resumed.append("steps.jsonl", steps)
    resumed.append("steps.jsonl", [{**steps[0], "epoch": 1}])
    assert scalars(tmp_path)["steps of stage 1/loss"] == [(0, 1.0), (1, 2.0), (2, 3.0), (3, 1.0)]
    assert lines(tmp_path / "steps.jsonl") == [*steps, {**steps[0], "epoch": 1}]


def test_the_board_is_only_written_where_asked_for_and_a_missing_package_is_one_line(tmp_path, monkeypatch):
    assert main.main([*FLAGS[:-1], "--epochs", "1", "--output-dir", str(tmp_path / "run")]) == 0
    assert not (tmp_path / "run/tensorboard").exists()
    monkeypatch.setattr(board, "find_spec", lambda name: None)
    with pytest.raises(FarError, match="^--tensorboard: needs the package tensorboard; pip install tensorboard"):
        main.main([*FLAGS, "--output-dir", str(tmp_path / "other")])
    assert not (tmp_path / "other").exists()
