"""What only a GPU can show: `make gpu`. Skipped where there is none."""

import json
import math
import signal
import time

import pytest
import torch

import main
import prune
import visualization
from models import kernels
from models.choosing import CANDIDATES, KERNELS_FILE, choose_kernels
from models.replace import FarConfig, build, load_model, replacements
from tests.conftest import EVAL, ROOT, TRAIN, launch, lines_in, rows, spawn, torchrun, wait_for
from tests.test_kernels import UNITS, cells, gradient_errors, layer
from tests.test_prune import SMALL
from utils.distributed import Context
from utils.run_folder import RunFolder

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]
DEVICE = "cuda"
ON = ["--device", DEVICE]
EACH = pytest.mark.parametrize("name", CANDIDATES["cuda"])
SHORT = ["--epochs", "2", "--block-ft-epochs", "1", *ON]


@EACH
@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize(("tokens", "batch"), [(1, 1), (2, 33), (197, 3), (65, 64)])
@pytest.mark.parametrize(("tf32", "most"), [(False, 5e-5), (True, 2e-2)])
def test_a_kernel_is_the_float64_reference_to_its_precision(name, units, tokens, batch, tf32, most, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
    m = layer(units).to(DEVICE).requires_grad_()
    x = torch.randn(batch, 3, tokens, 64, device=DEVICE).transpose(1, 2).requires_grad_()  # not contiguous
    errors = gradient_errors(x, m, lambda: kernels.KERNELS[name].run(kernels.LSTM, x, cells(m)))
    assert max(errors) < most


@EACH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gates_and_state_keep_their_precision_under_autocast(name, dtype):
    m, x = layer(UNITS[1]).to(DEVICE).requires_grad_(), torch.randn(2, 30, 192, device=DEVICE)
    m.backend = name
    p = m.pre_proj(x).view(2, 30, 3, 64).detach().requires_grad_()
    with torch.autocast(DEVICE, dtype):
        hidden = m.hidden(p)
    assert hidden.dtype == torch.float32
    assert max(gradient_errors(p, m, lambda: hidden)) < 2e-2


@pytest.mark.parametrize("batch", [1, 64])
@pytest.mark.parametrize("base", ["DeiT-Micro", "DeiT-Tiny"])
def test_auto_measures_leaves_nothing_out_and_keeps_to_its_choice(base, batch, tmp_path, capsys):
    model = build(FarConfig(base, 10, 32, replaced=(0, 2))).to(DEVICE)
    context, run = Context(device=torch.device(DEVICE, 0)), RunFolder(tmp_path, Context(), False)
    choose_kernels(model, "auto", batch, context, run)
    said = capsys.readouterr().out
    assert "left out" not in said and all(f"{name} " in said for name in CANDIDATES["cuda"]), said
    before = [attn.backend for attn in replacements(model).values()]
    choose_kernels(model, "auto", batch, context, run)
    assert [attn.backend for attn in replacements(model).values()] == before and not capsys.readouterr().out
    model(torch.randn(batch, 3, 32, 32, device=DEVICE)).square().sum().backward()
    assert all(p.grad.isfinite().all() for attn in replacements(model).values() for p in attn.parameters())


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_a_training_with_clipping_is_stopped_and_goes_on(amp, teacher, tmp_path):
    line = [*TRAIN, *SHORT, "--base-weight", str(teacher), "--amp", amp, "--clip-grad", "1"]
    command, run = [str(ROOT / "main.py"), *line, "--output-dir", "run"], tmp_path / "run"
    process = spawn(*command, cwd=tmp_path)
    wait_for(lambda: lines_in(run / "log.jsonl") >= 2, process, seconds=300)
    time.sleep(0.05)  # into the epoch
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0, said
    chosen = (run / KERNELS_FILE).read_bytes() if (run / KERNELS_FILE).exists() else b""
    done = launch(*command, "--resume", "auto", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert chosen == b"" or (run / KERNELS_FILE).read_bytes() == chosen
    log = rows(run)
    assert [(r["stage"], r["epoch"]) for r in log] == [*(("attn", k) for k in (0, 1, 2)), ("block", 0), ("block", 1)]
    assert all(math.isfinite(value) for r in log for value in [r["val"]["loss"], *r["train"].values()])
    assert log[-1]["train"]["loss"] < log[1]["train"]["loss"] or log[-1]["val"]["acc1"] > log[0]["val"]["acc1"]


def test_a_training_runs_on_every_gpu_and_all_choose_alike(teacher, tmp_path):
    count = max(1, torch.cuda.device_count())
    line = [*TRAIN, *SHORT, "--base-weight", str(teacher), "--amp", "bf16", "--output-dir", "run"]
    done = launch(*torchrun(*line, processes=count), cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("lstm kernel") == len({line for line in done.stdout.splitlines() if "lstm kernel" in line})
    assert len(rows(tmp_path / "run")) == 5
    assert json.loads((tmp_path / "run/result.json").read_text())["images"] == round(0.04 * 1437)  # --holdout


@EACH
def test_a_layer_compiles(name):
    m, x = layer(UNITS[1], tokens=9).to(DEVICE).requires_grad_(), torch.randn(2, 9, 192, device=DEVICE)
    m.backend = name
    compiled = torch.compile(m, fullgraph=name == "triton")
    torch.testing.assert_close(compiled(x), m(x), rtol=1e-2, atol=1e-2)
    ours, theirs = (torch.autograd.grad(f(x).square().sum(), list(m.parameters())) for f in (compiled, m))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_a_model_answers_on_the_gpu_as_on_the_cpu(far, tmp_path):
    results = []
    for device in ("cpu", DEVICE):
        argv = ["--mode", "eval", *EVAL, "--far-weight", str(far / "best.pth"), "--device", device, "--amp", "off"]
        assert main.main([*argv, "--output-dir", str(tmp_path / f"{len(results)}")]) == 0
        results.append(json.loads((tmp_path / f"{len(results)}/result.json").read_text()))
    ours, theirs = results
    assert abs(ours["loss"] - theirs["loss"]) < 2e-2 and abs(ours["acc1"] - theirs["acc1"]) < 2


def test_a_model_is_pruned(far, tmp_path):
    argv = ["--model-path", str(far / "best.pth"), *SMALL, "--keep-ratio", "0.5", *ON, "--output-dir", str(tmp_path)]
    assert prune.main(argv) == 0
    before, after = (json.loads((tmp_path / "prune_report.json").read_text())["rows"][k] for k in (0, -1))
    assert after["units"] == before["units"] / 2
    model, config = load_model(tmp_path / "best.pth")
    assert config.pruned and model.to(DEVICE)(torch.randn(2, 3, 32, 32, device=DEVICE)).shape == (2, 10)


def test_a_model_is_looked_at(teacher, far, tmp_path):
    weights = ["--base-weight", str(teacher), "--far-weight", str(far / "best.pth")]
    assert visualization.main([*weights, "--count", "1", "--block", "0", *ON, "--output-dir", str(tmp_path)]) == 0
    assert list(tmp_path.glob("*.png"))
