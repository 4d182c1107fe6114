"""Whole models in other runtimes: they compute the model, take turns, and a missing or failing one is told."""

import time

import pytest
import torch

from deploy import rivals

PROGRAMS = [p for p in rivals.programs(rivals.RUNTIMES) if p.model == rivals.BASE and "compile" not in p.runtime]


@pytest.mark.parametrize("program", PROGRAMS, ids=str)
def test_every_runtime_computes_the_model(program, tmp_path):
    if reason := program.lacks():
        pytest.skip(reason)
    model, images = rivals.VARIANTS[program.model].build(32), torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        expected = model(images)
        got = rivals.RUNTIMES[program.runtime].make(model, program.precision, rivals.Setting(1, str(tmp_path)))(images)
    got = torch.as_tensor(got if isinstance(got, torch.Tensor) else got[0])
    error = (got - expected).norm() / expected.norm()
    assert error < {"float32": 1e-5, "bfloat16": 0.05, "int8": 0.2}[program.precision], error


def test_programs_take_turns_and_a_failing_one_is_told():
    good = [rivals.Program(name, "timm eager", "float32") for name in (rivals.BASE, "FAR 0.25")]
    bad = rivals.Program("no model", "timm eager", "float32")
    running = rivals.Rivals([good[0], bad, good[1]], rivals.Setting(1, ""))
    try:
        found = running.compare(running.programs, 2, 32, 0.02)
        assert list(found) == [str(program) for program in good] and "no model" in running.failed[bad]
        assert found[str(good[0])]["repeats"] >= 2 * rivals.ROUNDS
        running.workers["timm eager", "float32"].process.kill()  # as for want of memory
        assert list(running.compare(good, 2, 32, 0.02)) == [str(good[1])]
        assert "exit code is -9" in running.failed[good[0]]
        assert len(running.compare(good, 1, 32, 0.02)) == 2 and not running.failed
    finally:
        running.close()


def test_where_no_program_can_run_nothing_is_compared():
    assert rivals.Rivals([], rivals.Setting(1, "")).compare([], 1, 32, 0.02) == {}


def test_the_first_call_warms_up_unless_calls_are_as_long_as_the_time():
    calls = []
    assert len(rivals.measure(lambda: calls.append(1), 0)) == len(calls) == 1
    calls.clear()
    assert len(rivals.measure(lambda: calls.append(1), 0.01)) == len(calls) - 1 > 2
    assert len(rivals.measure(lambda: time.sleep(0.02), 0.01)) == 2


def test_a_runtime_that_is_not_installed_is_named(monkeypatch):
    program = rivals.Program(rivals.BASE, rivals.OPENVINO, "float32")
    monkeypatch.setattr(rivals.importlib.util, "find_spec", lambda name: None)
    assert program.lacks() == "openvino is not installed"


def test_targets_are_ratios_of_the_medians():
    slow = {"median_ms": 6.0}
    found = {(1, 224): {f"{rivals.BASE} / OpenVINO float32": slow, "FAR 0.25 / FAR engine float32": {"median_ms": 4.0}}}
    (row,) = rivals.reached(found)
    assert row["reached"] == 1.5 and row["at_least"] == 1.4 and "FAR 0.25" in row["what"]
    names = {str(p) for p in rivals.programs(rivals.RUNTIMES)}
    for _, _, _, precision, _, (model, runtime), ours in rivals.TARGETS:
        assert {f"{model} / {runtime} {precision}", f"{ours} / {rivals.OURS} {precision}"} <= names
