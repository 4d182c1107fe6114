"""benchmark.py --device cuda from end to end, on a CPU and with made times; the page that it writes."""

import itertools
import json
import re

import pytest
import torch

import benchmark
from deploy import gpu_speed
from deploy.gpu_speed import ATTENTION, Asked, Case, Machine, machine, report, run
from engine import choosing
from models import kernels

CPU = torch.device("cpu")


def broken(kind, x, cells):
    raise RuntimeError("no kernel | image\nfor this card")


@pytest.fixture
def asked(monkeypatch, tmp_path):
    monkeypatch.setitem(kernels.KERNELS, "broken", kernels.Kernel(broken, lambda task: ""))
    monkeypatch.setitem(choosing.CANDIDATES, "cpu", ("torch", "broken"))
    monkeypatch.setattr(gpu_speed, "milliseconds", lambda call, device: 2.0)
    return Asked(tmp_path / "gpu", 0.0, (1, 2), ("DeiT-Micro",))


def fake(clock) -> Machine:
    """Calls once, and takes what the clock says."""

    def times(call, seconds):
        call()
        return [next(clock), 1e9, 0.0]  # the median counts

    return Machine(CPU, times, lambda call: 3_000_000, {"card": "Card, 80 GiB", "driver": "1.2", "torch": "9"})


def tables(page: str) -> list[list[list[str]]]:
    found: list[list[list[str]]] = [[]]
    for line in page.splitlines():
        if line.startswith("|"):
            found[-1].append([part.strip() for part in line.strip("|").split("|")])
        elif found[-1]:
            found.append([])
    return [table for table in found if table]


def test_everything_is_measured_and_the_page_is_markdown(asked, capsys):
    before = torch.get_float32_matmul_precision()
    assert run(asked, fake(map(float, itertools.count(1)))) == 0
    assert torch.get_float32_matmul_precision() == before
    page = (asked.output_dir / "report.md").read_text()
    assert page in capsys.readouterr().out and page.startswith("## Card, 80 GiB\n\ndriver 1.2, torch 9.")
    *measured, auto = tables(page)
    assert len(measured) == 8 and all(len({len(row) for row in table}) == 1 for table in [*measured, auto])
    for table in measured:
        header, _, *rows = table
        assert header == ["model", "computed by", "batch 1", "batch 2"]
        assert [row[1] for row in rows] == [ATTENTION, "FAR, torch", "FAR, broken"]
        assert all(row[0] == "DeiT-Micro" and "images/s, 3 MB" in row[2] for row in rows[:2])
        assert rows[2][2:] == ["no kernel / image"] * 2
        assert [("**" in row[2], "**" in row[3]) for row in rows] == [(True, True), (False, False), (False, False)]
    # the order of measures: layer before model, batch by batch, inference before training, TF32 before bfloat16
    assert measured[0][2][2:] == ["**1 ms**, 1,000 images/s, 3 MB", "**5 ms**, 400 images/s, 3 MB"]
    assert measured[0][3][2].startswith("17 ms, 59 images/s")
    assert [row[:4] for row in auto[2:]] == [
        ["DeiT-Micro", str(batch), way, "torch"] for batch in (1, 2) for way in ("evaluation", "training")
    ]
    assert auto[2][4:] == ["torch 2", "broken: no kernel / image"]
    cases = json.loads((asked.output_dir / "gpu.json").read_text())["cases"]
    assert len(cases) == 2 * 2 * 2 * 2 * 3 and sum("failed" in case for case in cases) == 16


def test_headings_say_what_was_measured():
    case = Case("model", "training step", "bfloat16", "DeiT-Tiny", "dense", 64)
    page = report({case: {"ms": 8.0, "bytes": 5e8}}, [], {"card": "C"}, Asked(batches=(64, 256), models=("DeiT-Tiny",)))
    section = page[page.index("**Whole model, training step, bfloat16**") :].split("**What")[0]
    assert "| DeiT-Tiny | FAR, dense | **8 ms**, 8,000 images/s, 500 MB | not measured |" in section
    assert page.count("not measured") == 15


@pytest.mark.parametrize("training", [False, True])
def test_a_call_is_what_its_case_says(training):
    model, ran = gpu_speed.far("DeiT-Micro"), []
    model.register_forward_hook(lambda module, given, y: ran.append((y.dtype, torch.is_inference_mode_enabled())))
    x = gpu_speed.inputs(model, "model", 2, CPU)
    for precision in gpu_speed.PRECISIONS:
        phase = gpu_speed.PHASES[training]
        gpu_speed.caller(model, x, Case("model", phase, precision, "DeiT-Micro", "torch", 2))()
        grads = {p.grad is None for p in model.parameters()}
        assert grads == {True} and model.training == training  # a step's gradients do not pile up
    assert ran == [(torch.float32, not training), (torch.bfloat16, not training)]
    assert len([b for b in gpu_speed.far("DeiT-Micro", False).blocks if hasattr(b.attn, "post_proj")]) == 0


def test_every_way_computes_by_its_own_kernel(asked, monkeypatch):
    ran = []
    for name in ("torch", "dense"):
        kernel = kernels.KERNELS[name]
        monkeypatch.setitem(
            kernels.KERNELS, name, kernel._replace(run=lambda *a, n=name, k=kernel: ran.append(n) or k.run(*a))
        )
        gpu_speed.measure_model("DeiT-Micro", name, asked, fake(itertools.repeat(1.0)), {})
        assert set(ran) == {name}
        ran.clear()


def test_a_device_that_gives_up_leaves_what_was_measured(asked, monkeypatch):
    def lost(device):
        raise RuntimeError("CUDA error: an illegal memory access\nwas encountered")

    monkeypatch.setattr(gpu_speed, "synchronize", lost)
    assert run(asked, fake(itertools.repeat(4.0))) == 1
    page = (asked.output_dir / "report.md").read_text()
    assert page.endswith("**Stopped before its end**: CUDA error: an illegal memory access\n")
    assert "FAR, torch | 4 ms" in page or "FAR, torch | **4 ms**" in page


def test_a_machine_measures_a_cpu_too():
    here = machine(CPU)
    calls = []
    times = here.times(lambda: calls.append(1), 0.0)
    assert len(times) == 3 == len(calls) - 2 and all(ms >= 0 for ms in times)
    assert here.peak(lambda: torch.zeros(1000)) == 4000
    assert here.about["torch"] == torch.__version__ and re.fullmatch("no GPU, cpu", here.about["card"])


def test_benchmark_hands_over_with_its_own_defaults(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(gpu_speed, "run", lambda asked, on: seen.append(asked) or 0)
    monkeypatch.setattr(gpu_speed, "machine", lambda device: None)
    monkeypatch.setattr(benchmark, "pick_device", torch.device)
    assert benchmark.benchmark(["--device", "cuda"]) == 0
    assert benchmark.benchmark(["--device", "cuda", "--batches", "3", "--output-dir", str(tmp_path)]) == 0
    assert seen == [Asked(), Asked(output_dir=tmp_path, batches=[3])]
    assert seen[0].batches == (1, 64, 256) and seen[0].models == ("DeiT-Tiny", "DeiT-Small", "DeiT-Base")


def test_flags_for_a_cpu_are_refused_for_a_gpu_and_a_missing_gpu_is_one_line(failure):
    line = failure("--device", "cuda", "--runtimes", "OpenVINO", script=benchmark.benchmark)
    assert "--runtimes: --device cuda does not use it" in line
    if not torch.cuda.is_available():
        assert "--device cuda: no CUDA device" in failure("--device", "cuda", script=benchmark.benchmark)
