"""Whole models in other runtimes: they compute the model, take turns, and a missing or failing one is named."""

import os
import signal
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

import benchmark
from deploy import rivals
from deploy.timing import ROUNDS, in_turns, measure
from models.deit import create_teacher


def relative_errors(folder: str) -> dict[rivals.Program, float]:
    """Of a small model's logits in every runtime that is here."""
    model, images = create_teacher("DeiT-Micro", 10, 32).eval().requires_grad_(False), torch.randn(3, 3, 32, 32)
    expected, errors = model(images), {}
    for program in rivals.programs(rivals.RUNTIMES):
        if program.model == rivals.BASE and program.runtime != "torch.compile" and not program.lacks():
            call = rivals.RUNTIMES[program.runtime].make(model, program.precision, folder)
            with torch.no_grad():
                got = call(images)
            errors[program] = ((got - expected).norm() / expected.norm()).item()
    return errors


def test_every_runtime_computes_the_model(tmp_path):
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # NNCF patches torch where it is imported
        errors = pool.submit(relative_errors, str(tmp_path)).result()
    limits = {"float32": 1e-5, "bfloat16": 0.05, "int8": 0.4, "static int8": 0.2}  # of random weights
    assert len(errors) >= 2 and all(error < limits[program.precision] for program, error in errors.items()), errors


def test_programs_take_turns_and_a_failing_one_is_named():
    good, bad = (rivals.Program(name, "timm eager", "float32") for name in (rivals.BASE, "no model"))
    processes = rivals.Processes([good, bad], 1, "")
    try:
        times = processes.compare([good, bad], 2, 32, 0.01)
        assert list(times) == [str(good)] and "no model" in processes.failed[bad]
        assert times[str(good)]["repeats"] >= ROUNDS
        (pid,) = processes.pools["timm eager", "float32"]._processes
        os.kill(pid, signal.SIGKILL)  # as for want of memory
        assert not processes.compare([good], 2, 32, 0.01) and processes.failed[good] == "its process ended"
        assert processes.compare([good], 1, 32, 0.01) and not processes.failed
    finally:
        processes.close()


def test_turns_alternate_and_what_fails_in_one_is_left_out():
    order = []
    turns = {"a": lambda s: order.append("a") or [1.0, 3.0], "b": lambda s: order.append("b") or [s] * (len(order) < 5)}
    assert in_turns(turns, 2.0) == {"a": {"median_ms": 2.0, "quartiles_ms": [1.0, 3.0], "repeats": 2 * ROUNDS}}
    assert order == ["a", "b"] * ROUNDS and in_turns({}, 1.0) == {}


def test_a_measurement_is_in_milliseconds_and_keeps_the_number_of_threads():
    before, seen = torch.get_num_threads(), set()
    times = measure(lambda: seen.add(torch.get_num_threads()) or torch.randn(300, 300) @ torch.randn(300, 300), 0.01)
    assert seen == {before} and 0.1 < min(times) < 1000


def test_larger_models_are_for_one_shape_and_quick_leaves_them_out():
    every, quick = (rivals.programs(rivals.RUNTIMES, larger) for larger in (True, False))
    larger = [program for program in every if program not in quick]
    assert {p.model.partition(" ")[0] for p in larger} == {"DeiT-Small", "FAR-Small", "DeiT-Base", "FAR-Base"}
    assert all(p.timed_at(1, 224) and not p.timed_at(8, 224) and not p.timed_at(1, 512) for p in larger)
    assert rivals.Program("FAR 0.25", rivals.OURS, "int8") in quick


def test_ratios_are_to_openvinos_attention_of_the_same_size_and_precision(capsys):
    ours, small = (rivals.Program(name, rivals.OURS, "int8") for name in ("FAR 0.25", "FAR-Small 0.25"))
    rival = [rivals.Program(base, rivals.OPENVINO, "int8") for base in (rivals.BASE, "DeiT-Small")]
    times = {str(p): {"median_ms": ms} for p, ms in zip((ours, small, *rival), (2.0, 5.0, 6.0, 20.0), strict=True)}
    benchmark.show_ratios([ours, small], {(1, 224): times, (8, 224): {}}, "int8")
    assert [line.split() for line in capsys.readouterr().out.splitlines()[-2:]] == [
        ["FAR", "0.25", "3.00"],
        ["FAR-Small", "0.25", "4.00"],
    ]
    benchmark.show_ratios([ours, small], {(1, 224): times}, "bfloat16")
    assert capsys.readouterr().out == ""
