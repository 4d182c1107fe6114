"""Several processes, signals, restarts: one run has one owner and ends with the undisturbed run's weights."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

import main
from tests.conftest import ROOT, Started, free_port, launch, lines_in, run_ranks, spawn, torchrun, wait_for
from utils import distributed
from utils.checkpoint import load
from utils.configs import Record, RunConfig
from utils.errors import FarError
from utils.run_folder import open_run

MAIN = str(ROOT / "main.py")


def weights(run: Path, name: str = "last.pth"):
    return load(run / name, "--test")["model"]


def assert_same(a: Path, b: Path, name: str = "last.pth"):
    ours, theirs = weights(a, name), weights(b, name)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.fixture(scope="module")
def short(teacher):
    """A run of two stages with fresh modules in each, eight steps an epoch for two processes."""
    return [
        *"--mode train --dataset DIGITS --scale Micro --num-workers 0 --train-subset 0.185 --holdout 0.02".split(),
        *"--batch-size 16 --block-ft-batch-size 16 --base-weight".split(),
        str(teacher),
        *"--epochs 2 --block-ft-epochs 1 --step 2 --drop-path 0.2 --accum-steps 2".split(),
    ]


@pytest.fixture(scope="module")
def undisturbed(short, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    done = run_ranks("main.py", *short, "--output-dir", "run", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def process_of_rank(rank: int, folder: Path) -> int:
    """The worker that torchrun started in a folder."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            environment = (entry / "environ").read_bytes().split(b"\0")
            if f"RANK={rank}".encode() in environment and (entry / "cwd").resolve() == folder.resolve():
                return int(entry.name)
        except OSError:
            continue
    raise AssertionError(f"no rank {rank}")


def test_a_signal_to_the_job_saves_within_the_step_and_resume_ends_bit_equal(short, undisturbed, tmp_path):
    job = spawn(*torchrun(*short, "--output-dir", "run"), cwd=tmp_path)
    wait_for(lambda: lines_in(tmp_path / "run/log.jsonl") >= 3, job)
    time.sleep(0.1)
    job.send_signal(signal.SIGTERM)
    output = job.communicate(timeout=60)[0]
    assert output.count("--resume goes on") == 1, output
    place = load(tmp_path / "run/last.pth", "--test")["position"]
    assert place["step"] % 2 == 0 or place["step"] == 4  # whole groups of --accum-steps
    done = run_ranks("main.py", *short, "--output-dir", "run", "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "run", undisturbed)


def test_a_second_signal_ends_at_once(tmp_path):
    program = """
import signal, time
from utils import signals
with signals.deferred() as request:
    print("ready", flush=True)
    while True:
        time.sleep(0.01)
"""
    run = spawn("-c", program, cwd=tmp_path)
    assert run.stdout.readline() == "ready\n"
    for _ in range(3):
        run.send_signal(signal.SIGINT)  # one request, however often it is sent within a second
    time.sleep(1.3)
    assert run.poll() is None
    run.send_signal(signal.SIGINT)
    assert run.wait(timeout=10) == -signal.SIGINT


def test_outside_a_training_a_signal_ends_with_one_line(tmp_path, far):
    program = f"""
import sys, time, main
from engine import modes
def slow(*args):
    print("ready", flush=True)
    time.sleep(60)
modes.evaluate = slow
from utils.script import run_script
argv = "--mode eval --dataset DIGITS --num-workers 0 --far-weight".split()
sys.exit(run_script(main.main, [*argv, {str(far / "best.pth")!r}]))
"""
    run = Started("-c", program, cwd=tmp_path)
    wait_for(lambda: run.said() == "ready\n", run)
    run.send_signal(signal.SIGINT)
    done = run.finish(timeout=30)
    assert (done.stdout, done.stderr, done.returncode) == ("ready\nstopped by SIGINT\n", "", 130)


def test_two_nodes_recover_from_a_killed_rank_and_end_with_the_undisturbed_runs_weights(
    teacher, short, undisturbed, tmp_path
):
    """Two agents that share no disk, as docs/cluster.md starts them; node 2 has no teacher, and can write no run."""
    folders, port = [tmp_path / "first", tmp_path / "second"], free_port()
    for folder in folders:
        folder.mkdir()
    (folders[0] / "teacher.pth").write_bytes(teacher.read_bytes())
    (folders[1] / "run").touch()
    flags = [*short, "--base-weight", "teacher.pth", "--output-dir", "run", "--resume", "auto"]
    before = ("--nnodes=2", "--master-addr=127.0.0.1", f"--master-port={port}", "--max-restarts=3")
    nodes = [
        spawn(*torchrun(*flags, processes=1, before=(*before, f"--node-rank={i}")), cwd=folder)
        for i, folder in enumerate(folders)
    ]
    wait_for(lambda: lines_in(folders[0] / "run/log.jsonl") >= 2, nodes[0])
    os.kill(process_of_rank(1, folders[1]), signal.SIGKILL)
    outputs = [node.communicate(timeout=240)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert_same(folders[0] / "run", undisturbed)
    assert_same(folders[0] / "run", undisturbed, "best.pth")
    assert outputs[0].count("lost contact") == 1 and "Traceback" not in outputs[0], outputs  # the survivor's one line


def test_an_error_of_one_rank_is_its_one_line(short, tmp_path):
    program = """
import os, sys, main
from datasets import loading
from utils.errors import FarError
from utils.script import run_script
whole = loading.Data.at
def broken(self, loader, *place):
    if os.environ["RANK"] == "1":
        raise FarError("picture.jpg: not a readable image; mend or remove the file")
    return whole(self, loader, *place)
loading.Data.at = broken
sys.exit(run_script(main.main))
"""
    (tmp_path / "broken.py").write_text(program)
    command = torchrun(*short, "--output-dir", "run")
    command[command.index(MAIN)] = "broken.py"
    done = launch(*command, cwd=tmp_path)
    ours = [line for line in done.stderr.splitlines() if "error:" in line]
    assert done.returncode != 0 and len(ours) == 2, done.stderr
    assert any("picture.jpg" in line for line in ours) and any("lost contact" in line for line in ours)
    assert "main.py" not in done.stderr.split("torch/distributed")[0]  # no traceback of ours


def test_what_all_ranks_meet_is_told_once_an_attempt_and_last(tmp_path):
    flags, restarts = ["--data-path", "nowhere"], 1
    command = torchrun(*"--mode teacher --dataset FOLDER --scale Micro --device cpu --output-dir run".split(), *flags)
    command.insert(command.index(MAIN), f"--max-restarts={restarts}")
    done = launch(*command, cwd=tmp_path)
    lines = done.stderr.splitlines()
    said = [k for k, line in enumerate(lines) if "error: " in line and (flags[0] in line)]
    assert len(said) == 1 + restarts and said[-1] == len(lines) - 2, done.stderr  # below it a line of = signs alone
    assert said[-1] > lines.index("Root Cause (first observed failure):") and not (tmp_path / "run").exists()


def test_a_process_that_does_not_come_is_missed_after_the_time_given(short, tmp_path):
    alone = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    done = Started("main.py", "--distributed", "--dist-timeout", "0.02", *short, cwd=tmp_path, **alone).finish()
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "did not find one another within 0:00:01.2" in line and "Traceback" not in done.stderr, done.stderr


def test_what_nobody_foresaw_keeps_its_traceback_after_one_line(tmp_path):
    program = "from utils.script import run_script\nimport sys\nsys.exit(run_script(lambda argv: 1 / 0))"
    done = launch("-c", program, cwd=tmp_path)
    first, *rest = done.stderr.splitlines()
    assert (
        done.returncode == 1 and "a fault of FAR" in first and "args.json" in first and "ZeroDivisionError" in rest[-1]
    )


def asked(mode="train", output_dir=None, resume=None):
    flags = {"output_dir": output_dir, "resume": resume, "epochs": 1}
    return RunConfig(mode, output_dir, resume, Record(flags, {}))


def test_runs_started_in_the_same_second_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda form: "20260101-000000")
    context = distributed.Context()
    with open_run(asked(), context) as a, open_run(asked(), context) as b, open_run(asked(), context) as c:
        assert len({a.path, b.path, c.path}) == 3


def test_a_folder_has_one_owner_at_a_time(tmp_path):
    folder, context = tmp_path / "run", distributed.Context()
    with open_run(asked("train", folder), context), pytest.raises(FarError, match="another run is writing there"):
        open_run(asked("train", folder, "must"), context).__enter__()
    with open_run(asked("train", folder, "auto"), context) as run:  # free again
        assert run.resumed


def test_a_finished_run_is_not_overwritten_where_its_last_checkpoint_was_removed(tmp_path):
    for name in ("args.json", "best.pth", "log.jsonl"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(FarError, match="already holds a run"), open_run(asked("eval", tmp_path), distributed.Context()):
        pass
    assert (tmp_path / "log.jsonl").exists()


def test_no_memory_left_is_one_line():
    with pytest.raises(FarError, match="--batch-size"), distributed.joined(False, "cpu"):
        torch.empty(2**60)  # bytes that no machine has
    with pytest.raises(FarError, match="--batch-size"), distributed.joined(False, "cpu"):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_resume_auto_begins_where_there_is_nothing_and_continues_where_there_is_a_run(short, tmp_path, capsys):
    results = []
    for finished in (False, True):
        assert main.main([*short, "--epochs", "1", "--output-dir", str(tmp_path / "run"), "--resume", "auto"]) == 0
        assert ("before training" in capsys.readouterr().out) != finished
        results.append(json.loads((tmp_path / "run/result.json").read_text()))
    assert results[0] == results[1]


def test_another_number_of_processes_is_refused(short, undisturbed, failure):
    assert "number of processes 2, not 1" in failure(*short, "--output-dir", undisturbed, "--resume")


def test_files_of_others_in_a_run_folder_stay(tmp_path):
    for name in ("notes.jsonl", ".hidden.tmp", ".last.pth.12.tmp"):
        (tmp_path / name).write_text("mine")
    context = distributed.Context()
    with open_run(asked("train", tmp_path), context):
        pass
    assert {p.name for p in tmp_path.iterdir()} >= {"notes.jsonl", ".hidden.tmp", ".last.pth.12.tmp"}
    with open_run(asked("train", tmp_path, "must"), context):
        assert not (tmp_path / ".last.pth.12.tmp").exists() and (tmp_path / ".hidden.tmp").exists()
