"""--lstm-backend auto where it measures: what is off is left out, the fastest right one is taken and kept to."""

import copy
import json
import time
from functools import partial

import pytest
import torch

import main
from engine import choosing
from engine.choosing import FILE, settle
from engine.trial import Probe, Trial, fault, pick, trial
from models import kernels
from models.bigru import GRU
from models.kernels.stock import stock
from models.replace import FarConfig, build, replacements
from tests.conftest import TRAIN
from tests.test_kernels import start, watch
from utils.distributed import Context
from utils.errors import FarError
from utils.run_folder import RunFolder

ALONE, CPU = Context(), torch.device("cpu")
TASK = kernels.Task(kernels.LSTM, CPU, torch.float32, 5, 2, 7, 3, 4, True)


def scaled(kind, x, cells):
    return stock(kind, x, cells) * 1.001


def forgets_a_bias(kind, x, cells):
    """Right forward, and one gradient is missing."""
    first, *others = cells
    return stock(kind, x, [first._replace(bias_hh=first.bias_hh.detach() + 0 * first.bias_hh), *others])


def not_a_number(kind, x, cells):
    return stock(kind, x, cells).masked_fill(x.sum() == x.sum(), float("nan"))


def raising(kind, x, cells):
    raise ValueError("no tensor cores\non this card")


def sleepy(kind, x, cells):
    time.sleep(0.1)
    return stock(kind, x, cells)


FAKES = {
    "scaled": scaled,
    "forgets": forgets_a_bias,
    "nan": not_a_number,
    "raising": raising,
    "slow": partial(stock),
    "quick": partial(stock),
}
TIMES = {"torch": 5.0, "slow": 9.0, "quick": 1.0, "forgets": 6.0}


def clock(call, device):
    """The times of TIMES; kernels that are off must not be timed."""
    return TIMES[call.args[0]]


@pytest.fixture
def fakes(monkeypatch):
    for name, run in FAKES.items():
        monkeypatch.setitem(kernels.KERNELS, name, kernels.Kernel(run, lambda task: ""))
    monkeypatch.setitem(choosing.CANDIDATES, "cpu", ("torch", *FAKES))


def tiny(**kwargs):
    return build(FarConfig("DeiT-Micro", 10, 32, replaced=(0, 2), **kwargs))


def taken(model, batch=6, learns=True):
    (name,) = {attn.backend.name(attn.task(batch, 65)._replace(learns=learns)) for attn in replacements(model).values()}
    return name


def test_what_is_off_or_fails_is_left_out_with_a_line_and_the_fastest_is_taken(fakes, capsys):
    model = tiny()
    settle(model, "auto", 6, ALONE, clock=clock)
    assert taken(model, learns=True) == taken(model, learns=False) == "quick"
    lines = capsys.readouterr().out.splitlines()
    training = [line for line in lines if "training" in line]
    assert len(training) == 5 and len(lines) == 5 + 4  # without a way back its gradients are not missed
    assert all(line.startswith("LSTM kernel, 2 heads of 32, batch 6, 65 tokens") for line in lines)
    for line, (name, said) in zip(
        training,
        {
            "scaled": "is off torch's by 1.0e-03",
            "forgets": "by 1.0",
            "nan": "by nan",
            "raising": "no tensor cores",
        }.items(),
        strict=False,
    ):
        assert f": {name} is left out: " in line and said in line
    assert training[-1].endswith(": quick of quick 1 ms, torch 5 ms, slow 9 ms")


def test_the_kernel_taken_is_the_one_that_runs(fakes, monkeypatch):
    model, ran = tiny(), []
    settle(model, "auto", 6, ALONE, clock=clock)
    for name in ("quick", "torch", "cpu"):
        watch(monkeypatch, name, lambda x, name=name: ran.append(name))
    model.train()(torch.randn(5, 3, 32, 32)).sum().backward()
    copy.deepcopy(model).eval()(torch.randn(2, 3, 32, 32))  # as an average of weights is
    assert ran == ["quick"] * 4


def test_a_kernel_that_takes_longer_is_not_taken(fakes, monkeypatch):
    monkeypatch.setitem(kernels.KERNELS, "slow", kernels.Kernel(sleepy, lambda task: ""))
    monkeypatch.setitem(choosing.CANDIDATES, "cpu", ("slow", "torch"))
    model = tiny()
    settle(model, "auto", 2, ALONE)
    assert taken(model, 2) == "torch"


def test_a_named_kernel_is_not_measured_nor_auto_where_there_is_one_way(fakes, monkeypatch):
    settle(model := tiny(), "torch", 6, ALONE, clock=None)
    assert {attn.backend for attn in replacements(model).values()} == {"torch"}
    monkeypatch.delitem(choosing.CANDIDATES, "cpu")
    settle(model, "auto", 6, ALONE, clock=None)
    assert {attn.backend for attn in replacements(model).values()} == {"auto"}


def test_a_kernel_that_refuses_is_no_candidate_and_a_mixer_needs_none(fakes, monkeypatch, capsys):
    monkeypatch.setitem(
        kernels.KERNELS, "quick", kernels.Kernel(stock, lambda task: "computes LSTMs" * (task.kind == GRU))
    )
    settle(model := tiny(rep_by="gru"), "auto", 6, ALONE, clock=clock)
    assert taken(model) == "torch" and "quick" not in capsys.readouterr().out
    settle(model := tiny(rep_by="mixer"), "auto", 6, ALONE, clock=None)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 10)


@pytest.mark.parametrize(
    ("times", "kept", "most", "name"),
    [
        ((3.0, 1.0, 2.0), (10, 90, 10), 100, "b"),
        ((3.0, 1.0, 2.0), (10, 90, 10), 50, "c"),  # the fastest of those that fit
        ((3.0, 1.0, 2.0), (10, 90, 20), 5, "a"),  # none fits: the least
        ((1.02, 1.0, 2.0), (10, 90, 10), 100, "a"),  # as fast, and keeps less
        ((1.0, 1.0, 1.0), (0, 0, 0), 100, "a"),
    ],
)
def test_memory_decides_between_the_fast(times, kept, most, name):
    trials = {key: Trial(ms, size) for key, ms, size in zip("abc", times, kept, strict=True)}
    assert pick(trials, most) == name


def test_a_layer_keeps_for_the_way_back_what_torch_says():
    probe = Probe.of(TASK)
    hidden = TASK.batch * TASK.tokens * 2 * TASK.heads * TASK.units * 4  # bytes
    assert probe.kept("reference") > 6 * hidden  # gates, states and their activations at least
    with torch.no_grad():
        assert probe.kept("reference") == 0


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("name", ["reference", "dense", "triton", "triton-lean"])
def test_every_candidate_is_right_by_its_own_trial(name, learns):
    task = TASK._replace(learns=learns)
    if reason := kernels.KERNELS[name].refusal(task):
        pytest.skip(reason)
    with torch.set_grad_enabled(learns):
        probe = Probe.of(task)
        expected = probe.run("torch")
        assert len(expected) == 1 + learns * (1 + 4 * 4)
        assert trial(name, probe, expected, lambda call, device: 1.0).fault == ""


def test_precision_says_how_far_off_is_off():
    right = [torch.randn(50)]
    for dtype, most in ((torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 2e-2)):
        task = TASK._replace(dtype=dtype)
        for factor, wrong in ((0.5, False), (2, True)):
            assert bool(fault([right[0].double() * (1 + factor * most)], [right[0].double()], task)) == wrong


def test_trials_draw_from_no_generator_of_the_run(fakes):
    before = torch.get_rng_state()
    settle(tiny_model := tiny(), "auto", 6, ALONE, clock=clock)
    state = torch.get_rng_state()
    tiny()
    assert replacements(tiny_model) and not torch.equal(before, state)  # tiny() draws
    torch.set_rng_state(before)
    tiny()
    assert torch.equal(torch.get_rng_state(), state)


def test_a_smaller_batch_has_the_next_larger_ones_kernel():
    choice = kernels.Choice({kernels.shape_of(TASK): {8: "a", 64: "b"}})
    named = {batch: choice.name(TASK._replace(batch=batch)) for batch in (1, 8, 9, 64, 65)}
    assert named == {1: "a", 8: "a", 9: "b", 64: "b", 65: "b"}
    assert choice.name(TASK._replace(tokens=5)) == choice.name(TASK._replace(learns=False)) == "auto"
    assert choice.name(TASK._replace(device=torch.device("cuda", 1))) == "a"  # rank 0's choice is everybody's


def test_a_run_goes_on_with_what_it_took(fakes, tmp_path, capsys):
    run = RunFolder(tmp_path, ALONE, False)
    settle(tiny(), "auto", 6, ALONE, run, clock=clock)
    capsys.readouterr()
    settle(model := tiny(), "auto", 6, ALONE, run, clock=lambda *_: pytest.fail("measured again"))
    assert taken(model) == "quick" and capsys.readouterr().out == ""
    settle(model, "auto", 12, ALONE, run, clock=lambda call, device: 10 - TIMES[call.args[0]])  # another batch
    assert taken(model, 12) == taken(model, 7) == "slow" and taken(model, 6) == "quick"
    content = json.loads((tmp_path / FILE).read_text())
    for row in content["choice"]["rows"]:
        row["device"] = "another card"
    (tmp_path / FILE).write_text(json.dumps(content))
    settle(model, "auto", 6, ALONE, run, clock=lambda call, device: 10 - TIMES[call.args[0]])
    assert taken(model, 6) == "slow"


@pytest.mark.parametrize(
    "damage", ["{}", '{"choice": {"rows": [{}], "distrusted": []}}', '{"choice": {"rows": 1}}', "["]
)
def test_a_damaged_memory_is_one_line(fakes, tmp_path, damage):
    (tmp_path / FILE).write_text(damage)
    with pytest.raises(FarError, match="kernels.json: damaged"):
        settle(tiny(), "auto", 6, ALONE, RunFolder(tmp_path, ALONE, True), clock=clock)


def test_a_kernel_that_ended_the_process_is_left_out_of_the_next_start(fakes, monkeypatch, tmp_path, capsys):
    run = RunFolder(tmp_path, ALONE, False)

    def deadly(kind, x, cells):
        raise SystemExit

    monkeypatch.setitem(kernels.KERNELS, "quick", kernels.Kernel(deadly, lambda task: ""))
    with pytest.raises(SystemExit):
        settle(tiny(), "auto", 6, ALONE, run, clock=clock)
    settle(model := tiny(), "auto", 6, ALONE, run, clock=clock)
    assert taken(model) == "torch" and "quick is left out: it ended this run before" in capsys.readouterr().out


def test_a_gpu_on_which_nothing_runs_any_more_ends_the_run_with_one_line(fakes, monkeypatch, tmp_path):
    def lost(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("engine.trial.synchronize", lost)
    monkeypatch.setitem(choosing.CANDIDATES, "cpu", ("torch", "raising"))
    run = RunFolder(tmp_path, ALONE, False)
    with pytest.raises(
        FarError, match="--lstm-backend auto: kernel raising broke the GPU's state .no tensor cores.; start"
    ):
        settle(tiny(), "auto", 6, ALONE, run, clock=clock)
    assert json.loads((tmp_path / FILE).read_text())["choice"]["distrusted"] == ["raising"]


def test_a_layer_compiles_with_what_was_chosen(fakes):
    model = tiny()
    settle(model, "auto", 6, ALONE, clock=clock)
    attn, x = model.blocks[0].attn, torch.randn(6, 65, 64)

    def short(kind, x, cells):  # torch's would be traced step by step
        return x.flatten(2).repeat(1, 1, 2) * cells[0].bias_hh.sum()

    kernels.KERNELS["quick"] = kernels.Kernel(short, lambda task: "")
    compiled = torch.compile(attn, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), attn(x))
    torch.testing.assert_close(compiled(x[:4]), attn(x[:4]))


TWO = """
import sys
import torch
from torch import distributed as dist
from engine import choosing
from models import kernels
from models.kernels.stock import stock
from models.replace import FarConfig, build, replacements
from utils.distributed import Context
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
kernels.KERNELS["other"] = kernels.Kernel(lambda *given: stock(*given), lambda task: "")
choosing.CANDIDATES["cpu"] = ("torch", "other")
measured = []
def clock(call, device):
    measured.append(call.args[0])
    return {"torch": (2.0, 1.0), "other": (1.0, 2.0)}[call.args[0]][rank]
for replaced in ((0,), (0, 1)):
    model = build(FarConfig("DeiT-Micro", 10, 32, replaced=replaced))
    choosing.settle(model, "auto", 4, Context(rank, 2, torch.device("cpu"), dist.group.WORLD), clock=clock)
attn = replacements(model)[1]
batch = 4 - rank  # the last batch of an evaluation
print(attn.backend.name(attn.task(batch, 65)), len(measured))
kernels.KERNELS["torch"] = kernels.Kernel(None, lambda task: "")
choosing.settle(model, "auto", 5, Context(rank, 2, torch.device("cpu"), dist.group.WORLD), clock=clock)
"""


def test_rank_0_decides_for_all_processes(tmp_path):
    both = [start(TWO, str(rank), str(tmp_path / "store"), OMP_NUM_THREADS="1") for rank in (0, 1)]
    said = [process.communicate(timeout=120) for process in both]
    assert "other 8" in said[0][0] and said[1][0].strip() == "other 0", said


def test_a_training_measures_remembers_and_goes_on_with_the_same(fakes, teacher, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(choosing.settle, "__defaults__", (None, True, clock))
    run, ran = tmp_path / "run", []
    for name in ("quick", "slow", "torch", "cpu"):
        watch(monkeypatch, name, lambda x, name=name: ran.append((name, len(x))))
    argv = [*TRAIN, "--base-weight", str(teacher), "--epochs", "1", "--block-ft-epochs", "0", "--output-dir", str(run)]
    assert main.main(argv) == 0
    rows = json.loads((run / FILE).read_text())["choice"]["rows"]
    assert [(row["kernel"], row["batch"], row["learns"]) for row in rows] == [("quick", 64, False), ("quick", 64, True)]
    assert ("quick", 15) in ran or ("quick", 64) in ran
    capsys.readouterr(), ran.clear()
    (run / FILE).write_text((run / FILE).read_text().replace('"quick"', '"slow"'))
    assert main.main([*argv, "--resume"]) == 0
    assert {name for name, _ in ran} == {"slow"} and "LSTM kernel" not in capsys.readouterr().out
