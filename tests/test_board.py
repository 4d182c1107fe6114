"""--tensorboard: its file says what the logs say."""

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main
from tests.conftest import rows
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


def test_the_board_holds_the_logs_and_a_resumed_run_writes_it_anew(tmp_path):
    run = tmp_path / "run"
    assert main.main([*FLAGS, "--output-dir", str(run)]) == 0
    found, epochs, steps = scalars(run), rows(run), rows(run, "steps.jsonl")
    assert found["teacher/val/acc1"] == [(row["epoch"], pytest.approx(row["val"]["acc1"])) for row in epochs]
    trained = [(row["epoch"], pytest.approx(row["train"]["loss"])) for row in epochs if row["train"]]
    assert found["teacher/train/loss"] == trained and len(trained) == 2
    assert found["teacher/run/lr"] == [(row["epoch"], pytest.approx(row["lr"])) for row in epochs]
    assert found["steps of stage 1/loss"] == [(k, pytest.approx(row["loss"])) for k, row in enumerate(steps)]
    assert len(steps) == 6
    # A process that was killed left a damaged board and the steps of an epoch that runs again.
    (file,) = (run / "tensorboard").iterdir()
    file.write_bytes(file.read_bytes()[:200])
    again = {"stage_index": 0, "epoch": 2, "step": 0, "loss": 1.0}
    with (run / "steps.jsonl").open("a") as log:
        log.write(json.dumps(again) + "\n")
    resumed = RunFolder(run, Context(), True, True)
    resumed.append("log.jsonl", [{**epochs[-1], "epoch": 3}])
    resumed.append("steps.jsonl", [again])
    found = scalars(run)
    assert [step for step, _ in found["teacher/val/acc1"]] == [0, 1, 2, 3]
    assert found["steps of stage 1/loss"][6:] == [(6, 1.0)] and rows(run, "steps.jsonl") == [*steps, again]


def test_the_board_is_only_written_where_asked_for_and_a_missing_package_is_one_line(teacher, tmp_path, monkeypatch):
    assert not (teacher.parent / "tensorboard").exists()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FarError, match="^--tensorboard: needs the package tensorboard; pip install tensorboard"):
        main.main([*FLAGS, "--output-dir", str(tmp_path / "other")])
    assert not (tmp_path / "other").exists()
