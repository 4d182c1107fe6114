"""benchmark.py --device cuda from end to end, on a CPU and with made times; the tables that it prints."""

import itertools

import pytest
import torch

import benchmark
from deploy import gpu_speed
from deploy.gpu_speed import Case, GpuConfig
from models import choosing, kernels
from models.replace import replacements
from tests.conftest import report

CPU = torch.device("cpu")


def broken(kind, x, cells):
    raise RuntimeError("no kernel image\nfor this card")


@pytest.fixture
def config(monkeypatch, tmp_path):
    """Two kernels on a CPU, one of them broken; every call takes a millisecond more than the one before."""
    monkeypatch.setitem(kernels.KERNELS, "broken", kernels.Kernel(broken, lambda task: ""))
    for owner in (choosing, gpu_speed):
        monkeypatch.setitem(owner.CANDIDATES, "cpu", ("torch", "broken"))
    clock = map(float, itertools.count(1))
    monkeypatch.setattr(gpu_speed, "measure", lambda call, seconds: (call(), [next(clock), 1e9, 0.0])[1])
    monkeypatch.setattr(choosing, "SECONDS", 0.0)
    return GpuConfig(tmp_path / "gpu", 0.0, (2,), ("DeiT-Micro",))


def test_everything_is_measured_and_shown(config, capsys):
    assert gpu_speed.run(config, CPU) == 0
    said = capsys.readouterr().out
    page, _, auto = said.partition("\nwhat --lstm-backend auto takes\n")
    heads, attention, gru, mingru, stock, failing = page.split("\nlayer, inference, TF32\n")[1].splitlines()[:6]
    assert heads.split() == ["computed", "by", "batch", "2"]
    assert attention.split()[:4] == ["DeiT-Micro", "attention", "(SDPA)", "1"] and " MB" in attention
    assert [line.split()[1] for line in (gru, mingru, stock)] == ["GRU", "minGRU", "torch"] and " MB" in mingru
    assert failing.count("no kernel image") == 1
    written = report(config.output_dir, "gpu.json")
    assert len(written["cases"]) == 2 * 2 * 2 * 5 and sum("failed" in case for case in written["cases"]) == 8
    assert written["about"]["torch"] == torch.__version__
    assert [row["kernel"] for row in written["auto"]] == ["torch"] * 2
    assert auto.count("broken is left out: no kernel image") == 2


@pytest.mark.parametrize("phase", ["inference", "training step"])
def test_a_call_is_what_its_case_says(phase):
    model, ran = gpu_speed.random_model("DeiT-Micro", "torch"), []
    model.register_forward_hook(lambda module, args, y: ran.append((y.dtype, torch.is_inference_mode_enabled())))
    x, training = torch.randn(2, 3, 32, 32), phase == "training step"
    for precision in gpu_speed.PRECISIONS:
        gpu_speed.caller(model, x, Case("model", phase, precision, "DeiT-Micro", "torch", 2))()
        assert all(p.grad is None for p in model.parameters()) and model.training == training
    assert ran == [(torch.float32, not training), (torch.bfloat16, not training)]
    assert not replacements(gpu_speed.random_model("DeiT-Micro", gpu_speed.ATTENTION))
    kinds = {by: gpu_speed.random_model("DeiT-Micro", by).blocks[0].attn.direction.kind.name for by in gpu_speed.CELLS}
    assert kinds == gpu_speed.CELLS


def test_benchmark_hands_over_with_its_own_defaults(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(gpu_speed, "run", lambda config, device: seen.append(config) or 0)
    monkeypatch.setattr(benchmark, "pick_device", torch.device)
    assert benchmark.benchmark(["--device", "cuda"]) == 0
    assert benchmark.benchmark(["--device", "cuda", "--batches", "3", "--output-dir", str(tmp_path)]) == 0
    assert seen == [GpuConfig(), GpuConfig(output_dir=tmp_path, batches=[3])]
