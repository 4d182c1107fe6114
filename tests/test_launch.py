"""Several processes, signals, restarts: one run has one owner and ends with the undisturbed run's weights."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch

import main
from datasets.loading import Data
from engine.evaluate import evaluate
from models.deit import create_teacher
from models.replace import load_model
from tests.conftest import (
    FLOAT32,
    QUIET,
    Started,
    assert_equal,
    free_port,
    launch,
    lines_in,
    report,
    rows,
    run_ranks,
    spawn,
    start_ranks,
    torchrun,
    wait_for,
    weights,
    write_images,
)
from utils import checkpoint, distributed, signals
from utils.checkpoint import load
from utils.configs import DataConfig, RunConfig
from utils.distributed import Context
from utils.errors import FarError
from utils.run_folder import open_run


@pytest.fixture(scope="module")
def short(teacher):
    """A run of two stages with fresh modules in each, eight steps an epoch for two processes."""
    return [
        *"--mode train --dataset DIGITS --scale Micro --input-size 16 --train-subset 0.095 --holdout 0.02".split(),
        *"--batch-size 8 --block-ft-batch-size 8 --epochs 1 --block-ft-epochs 1 --step 2".split(),
        *"--num-workers 0 --drop-path 0 --accum-steps 2 --select last --base-weight".split(),
        str(teacher),
    ]


@pytest.fixture(scope="module")
def undisturbed(short, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    done = run_ranks("main.py", *short, "--output-dir", "run", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_two_processes_with_half_the_batch_give_the_weights_of_one(short, undisturbed, tmp_path):
    """Augmentation follows from the sample, not the process, so even the random crops agree."""
    twice = ["--batch-size", "16", "--block-ft-batch-size", "16"]
    assert main.main([*short, *twice, "--output-dir", str(tmp_path)]) == 0
    one, two = weights(tmp_path), weights(undisturbed)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=2e-5)
    assert len(rows(tmp_path)) == 8
    for ours, theirs in zip(rows(tmp_path), rows(undisturbed), strict=True):
        for part in ("train", "val"):
            assert ours[part] == pytest.approx(theirs[part], rel=1e-4)
    ours, theirs = map(report, (tmp_path, undisturbed))
    assert ours["images"] == theirs["images"] == 29 and ours["acc1"] == pytest.approx(theirs["acc1"])


def test_the_best_epoch_is_what_two_processes_hand_on_and_report(tmp_path):
    """The model begins with the class of most evaluation images; training, on the other, turns it away."""
    for split, counts in (("train", (4, 38)), ("val", (7, 2))):
        for c, count in enumerate(counts):
            write_images(tmp_path / f"data/{split}/class{c}", count, size=32, seed=c)
    model = create_teacher("DeiT-Micro", 2, 32)
    with torch.no_grad():
        model.head.bias.copy_(torch.tensor([0.5, -0.5]))
        model.head.weight.mul_(0.1)
    torch.save(model.state_dict(), tmp_path / "start.pth")
    flags = "--mode teacher --dataset FOLDER --data-path data --scale Micro --base-weight start.pth --output-dir run"
    flags += " --epochs 2 --batch-size 7 --opt sgd --lr 0.03 --unscale-lr --warmup-epochs 0 --drop-path 0 --select best"
    done = run_ranks("main.py", *flags.split(), *QUIET, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    accuracies = [row["val"]["acc1"] for row in rows(tmp_path / "run")]
    assert accuracies[-1] == pytest.approx(100 * 2 / 9) and max(accuracies) == pytest.approx(100 * 7 / 9)
    result = report(tmp_path / "run")
    model, _ = load_model(tmp_path / "run/best.pth", "--test")
    data = Data(DataConfig("FOLDER", tmp_path / "data", 32, num_workers=0), Context())
    alone = evaluate(model, data.val_loader(4), Context(), FLOAT32)
    assert result["acc1"] == pytest.approx(alone["acc1"]) == pytest.approx(max(accuracies))
    assert result["loss"] == pytest.approx(alone["loss"], rel=1e-5) and result["images"] == alone["images"]
    assert_equal(weights(tmp_path / "run"), model.state_dict())


def test_a_signal_to_one_process_stops_all_within_the_step_and_resume_ends_bit_equal(short, undisturbed, tmp_path):
    jobs = start_ranks("main.py", *short, "--output-dir", "run", cwd=tmp_path)
    wait_for(lambda: lines_in(tmp_path / "run/log.jsonl") >= 3, jobs[0])
    time.sleep(0.1)
    jobs[1].send_signal(signal.SIGTERM)
    done = [job.finish(timeout=60) for job in jobs]
    assert [job.returncode for job in done] == [0, 0], done
    assert [job.stdout.count("--resume goes on") for job in done] == [1, 0]
    place = load(tmp_path / "run/last.pth", "--test")["position"]
    assert place["step"] % 2 == 0  # whole groups of --accum-steps
    done = run_ranks("main.py", *short, "--output-dir", "run", "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_equal(weights(tmp_path / "run"), weights(undisturbed))


def test_a_signal_to_a_whole_group_of_processes_leaves_loaders_until_the_training_is_saved(tmp_path):
    """As torchrun and job managers send it: torch's loader processes would end by it, and the training with them."""
    program = """
import os, sys, main
from datasets import loading
from utils.script import run_script
os.setpgrp()
loading.cores = lambda: 2
sys.exit(run_script(main.main, sys.argv[1:]))
"""
    flags = "--mode teacher --dataset DIGITS --scale Micro --epochs 9 --batch-size 8 --num-workers 2 --output-dir run"
    run = Started("-c", program, *flags.split(), cwd=tmp_path)
    wait_for(lambda: lines_in(tmp_path / "run/log.jsonl") >= 1, run)
    time.sleep(1)
    os.killpg(run.process.pid, signal.SIGTERM)
    done = run.finish(timeout=60)
    assert done.returncode == 0 and "--resume goes on" in done.stdout, done
    assert load(tmp_path / "run/last.pth", "--test")["position"]["step"] > 0


def test_a_loader_that_hangs_ends_with_its_training(tmp_path):
    """torch's loader processes ask between batches alone whether their parent lives; signals do not end them."""
    program = """
import os, time
from pathlib import Path
from datasets.loading import Loader
class Hanging:
    def __len__(self):
        return 8
    def __getitem__(self, index):
        Path("pid").write_text(str(os.getpid()))
        time.sleep(1000)
list(Loader(Hanging(), num_workers=1))
"""
    run = spawn("-c", program, cwd=tmp_path)
    wait_for(lambda: lines_in(tmp_path / "pid") == 1, run)
    run.kill()
    run.communicate(timeout=20)  # the worker holds its output open


def test_an_interrupt_to_a_whole_group_with_loaders_is_one_line(tmp_path):
    """As a terminal sends it: torch tells of each of its loader processes that a signal ends, by a traceback."""
    program = """
import os, sys, time
from pathlib import Path
from datasets.loading import Loader
from utils.script import run_script
class Slow:
    def __len__(self):
        return 1000
    def __getitem__(self, index):
        Path("pid").write_text(str(os.getpid()))
        time.sleep(0.1)
        return index
os.setpgrp()
sys.exit(run_script(lambda argv: list(Loader(Slow(), num_workers=2))))
"""
    run = spawn("-c", program, cwd=tmp_path)
    wait_for(lambda: lines_in(tmp_path / "pid") == 1, run)
    for _ in range(3):
        time.sleep(0.2)
        os.killpg(run.pid, signal.SIGINT)
    assert run.communicate(timeout=60)[0] == "stopped by SIGINT\n" and run.returncode == 130


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
    for name in ("last.pth", "best.pth"):
        assert_equal(weights(folders[0] / "run", name), weights(undisturbed, name))
    assert outputs[0].count("lost contact") == 1 and "Traceback" not in outputs[0], outputs  # the survivor's one line


def test_an_error_of_one_rank_is_its_one_line_and_the_other_has_lost_contact(short, tmp_path):
    program = """
import os, sys, main
from datasets import loading
from utils.errors import FarError
from utils.script import run_script
seek = loading.Data.seek
def broken(self, loader, *place):
    if os.environ["RANK"] == "1":
        raise FarError("picture.jpg: not a readable image; mend or remove the file")
    return seek(self, loader, *place)
loading.Data.seek = broken
sys.exit(run_script(main.main, sys.argv[1:]))
"""
    jobs = start_ranks("-c", program, "--distributed", *short, "--output-dir", "run", cwd=tmp_path)
    survivor, broken = (job.finish() for job in jobs)
    assert broken.stderr.splitlines() == ["error: picture.jpg: not a readable image; mend or remove the file"]
    (line,) = [line for line in survivor.stderr.splitlines() if "error:" in line]
    assert "lost contact" in line and (survivor.returncode, broken.returncode) == (1, 2)
    assert "Traceback" not in survivor.stderr


def test_what_all_ranks_meet_is_told_once_an_attempt_and_last(tmp_path):
    command = torchrun(*"--lr inf --output-dir run".split(), before=("--max-restarts=1",))
    lines = launch(*command, cwd=tmp_path).stderr.splitlines()
    said = [k for k, line in enumerate(lines) if "error: " in line and "--lr" in line]
    assert len(said) == 2 and said[-1] == len(lines) - 2, lines  # below it a line of = signs alone
    assert said[-1] > lines.index("Root Cause (first observed failure):") and not (tmp_path / "run").exists()


def test_a_process_that_does_not_come_is_missed_after_the_time_given(short, tmp_path):
    alone = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    done = Started("main.py", "--distributed", "--dist-timeout", "0.02", *short, cwd=tmp_path, **alone).finish()
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "did not find one another within 0:00:01.2" in line and "Traceback" not in done.stderr, done.stderr


def test_another_number_of_processes_is_refused(short, undisturbed, failure):
    assert "number of processes 2, not 1" in failure(*short, "--output-dir", undisturbed, "--resume")


# How a process ends.

SCRIPT = "import sys, time\nfrom utils.script import run_script\nsys.exit(run_script(lambda argv: {}))"


def test_a_second_signal_ends_at_once(tmp_path):
    program = (
        "import time\nfrom utils import signals\nwith signals.deferred():\n print('ready', flush=True)\n time.sleep(60)"
    )
    run = spawn("-c", program, cwd=tmp_path)
    assert run.stdout.readline() == "ready\n"
    for _ in range(3):
        run.send_signal(signal.SIGINT)  # one request, however often it is sent within a second
    time.sleep(1.3)
    assert run.poll() is None
    run.send_signal(signal.SIGINT)
    assert run.wait(timeout=10) == -signal.SIGINT


def test_a_request_that_comes_again_while_a_stopped_training_ends_is_the_same(tmp_path):
    program = """
import os, signal, sys
from utils import signals
from utils.script import run_script
def main(argv):
    try:
        with signals.deferred() as request:
            os.kill(os.getpid(), signal.SIGTERM)
            raise signals.Stopped(request.number, "saved", saved=True)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
code = run_script(main)
os.kill(os.getpid(), signal.SIGTERM)  # while Python ends
sys.exit(code)
"""
    done = launch("-c", program, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "saved\n"), done.stderr


def test_a_signal_behind_the_last_step_finds_the_training_saved(tmp_path, monkeypatch):
    save = checkpoint.save

    def saved(path: Path, content: dict) -> None:
        save(path, content)
        if path.name == "last.pth" and content["position"]["stage"] == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    flags = "--mode teacher --dataset DIGITS --scale Micro --input-size 16 --train-subset 0.1 --epochs 1 --batch-size 9"
    argv = [*flags.split(), "--num-workers", "0", "--output-dir", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", saved)
        said = "after its last epoch: .*--resume goes on"
        with pytest.raises(signals.Stopped, match=said) as stopped, signals.ending_at_once():
            main.main(argv)
    assert stopped.value.code == 0
    assert main.main([*argv, "--resume"]) == 0 and report(tmp_path)["images"] == 360


def test_outside_a_training_a_signal_ends_with_one_line(tmp_path):
    run = spawn("-c", SCRIPT.format("print('ready', flush=True) or time.sleep(60)"), cwd=tmp_path)
    assert run.stdout.readline() == "ready\n"
    run.send_signal(signal.SIGINT)
    assert run.communicate(timeout=30)[0] == "stopped by SIGINT\n" and run.returncode == 130


def test_what_nobody_foresaw_keeps_its_traceback_after_one_line(tmp_path):
    done = launch("-c", SCRIPT.format("1 / 0"), cwd=tmp_path)
    first, *rest = done.stderr.splitlines()
    assert done.returncode == 1 and "a fault of FAR" in first and "ZeroDivisionError" in rest[-1]


@pytest.mark.parametrize(("error", "code"), [("FarError('--flag: wrong')", 2), ("RuntimeError()", 1)])
def test_a_process_of_several_ends_without_freeing_what_an_error_holds(tmp_path, error, code):
    """As freeing torch's process group may wait for ever; __del__ stands for it."""
    program = f"""
import sys, time
import torch.distributed as dist
from utils.errors import FarError
from utils.script import run_script
class Group:
    def __del__(self):
        time.sleep(1000)
def main(argv):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group = Group()
    print("trains")
    raise {error}
sys.exit(run_script(main))
"""
    done = Started("-c", program, cwd=tmp_path).finish(timeout=60)
    assert done.returncode == code and done.stdout == "trains\n" and "error:" in done.stderr


def test_no_memory_left_is_one_line():
    with pytest.raises(FarError, match="--batch-size"), distributed.joined(False, "cpu"):
        torch.empty(2**60)  # bytes that no machine has
    with pytest.raises(FarError, match="--batch-size"), distributed.joined(False, "cpu"):
        raise torch.OutOfMemoryError("CUDA out of memory")


# Who owns a folder.


def opened(output_dir=None, resume=None):
    return open_run(RunConfig("train", output_dir, resume, {"resume": resume}), Context())


def test_runs_started_in_the_same_second_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda form: "20260101-000000")
    with opened() as a, opened() as b, opened() as c:
        assert len({a.path, b.path, c.path}) == 3


def test_a_folder_has_one_owner_at_a_time(tmp_path):
    with opened(tmp_path), pytest.raises(FarError, match="another run is writing there"):
        opened(tmp_path, "must").__enter__()
    with opened(tmp_path, "auto") as run:  # free again
        assert run.resumed


def test_a_resumed_run_removes_what_a_kill_left_half_written_and_no_file_of_others(tmp_path):
    with opened(tmp_path):
        pass
    for name in ("notes.jsonl", ".hidden.tmp", ".last.pth.12.tmp"):
        (tmp_path / name).touch()
    with opened(tmp_path, "must"):
        assert {p.name for p in tmp_path.iterdir()} == {".lock", "args.json", "notes.jsonl", ".hidden.tmp"}
