"""The Triton kernels: computed in Triton's interpreter without a GPU, and compiled for two generations of GPUs."""

import json
import os
import subprocess
import sys

import pytest
import torch

from models import kernels
from models.bigru import GRU
from models.kernels import gpu
from tests.conftest import ROOT
from tests.test_kernels import (
    UNITS,
    cells,
    check_that_backward_inside_autocast_is_the_same,
    check_that_nan_stays_in_its_head_and_image,
    error_against_float64,
    gradient_errors,
    layer,
    watch,
)
from utils.errors import FarError

pytest.importorskip("triton")
pytestmark = pytest.mark.cuda  # `make gpu` runs them there
# tests/__init__.py turns the interpreter on where there is no GPU.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def without_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize(
    ("units", "tokens", "batch", "rows"),  # rows a program
    [(UNITS[0], 3, 5, 4), (UNITS[1], 5, 3, 4), (UNITS[2], 2, 9, 16), (UNITS[1], 1, 1, 4)],
)
def test_triton_matches_the_reference_forward_and_backward(units, tokens, batch, rows, monkeypatch):
    monkeypatch.setattr(gpu, "rows_for", lambda *_: rows)
    m = layer(units).to(DEVICE).requires_grad_()
    x = torch.randn(batch, 3, tokens, 64, device=DEVICE).transpose(1, 2).requires_grad_()  # not contiguous
    assert max(gradient_errors(x, m, lambda: gpu.fused(kernels.LSTM, x, cells(m)))) < 1e-5


@pytest.mark.parametrize("name", ["weight_ih", "weight_hh", "bias_hh"])
def test_only_what_needs_a_gradient_gets_one(name):
    m, x = layer([(17, 40)], dim=64).to(DEVICE), torch.randn(2, 4, 1, 64, device=DEVICE)
    weights = [p.requires_grad_() for key, p in m.lstm.named_parameters() if key.endswith(name)]
    got = torch.autograd.grad(gpu.fused(kernels.LSTM, x, cells(m)).square().sum(), weights)
    expected = torch.autograd.grad(kernels.KERNELS["torch"].run(kernels.LSTM, x, cells(m)).square().sum(), weights)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_triton_computes_without_gradients():
    m = layer([(20, 16)], dim=64).to(DEVICE)
    x = torch.randn(2, 20, 1, 64, device=DEVICE)
    assert error_against_float64(x, m, gpu.fused(kernels.LSTM, x, cells(m))) < 1e-6


@pytest.mark.parametrize(
    "check", [check_that_nan_stays_in_its_head_and_image, check_that_backward_inside_autocast_is_the_same]
)
def test_triton_passes_each_check(check):
    check(gpu.fused, DEVICE)


def test_the_triton_operators_keep_what_torch_asks_of_operators():
    shapes = (1, 2, 2, 5), (1, 128, 5), (1, 1, 128), (1, 2, 4, 16, 16)
    inputs = [torch.randn(shape, device=DEVICE, requires_grad=True) for shape in shapes]
    torch.library.opcheck(gpu.recurrence, (*inputs, True))
    with torch.no_grad():
        torch.library.opcheck(gpu.recurrence, (*inputs, False))
        hidden, gates, states = gpu.recurrence(*inputs, True)
        torch.library.opcheck(gpu.recurrence_backward, (torch.randn_like(hidden), inputs[-1], gates, states))


def test_a_layer_takes_triton_where_it_is_named_plain_and_fused(monkeypatch):
    called = []
    watch(monkeypatch, "triton", lambda x: called.append(1))
    m = layer(UNITS[2]).to(DEVICE)
    x = torch.randn(2, 4, 192, device=DEVICE)
    expected = m(x)
    m.backend = "triton"
    for got in (m(x), m.merged()(x), m.mix(x.requires_grad_()) @ m.post_proj.weight.T + m.post_proj.bias):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
    assert len(called) == 3


def test_triton_refuses_what_it_cannot_compute(monkeypatch):
    task = kernels.Task(kernels.LSTM, torch.device(DEVICE), torch.float32, 64)
    for other in (task._replace(units=192), task._replace(dtype=torch.float64), task._replace(kind=GRU)):
        with pytest.raises(FarError, match="--lstm-backend triton"):
            kernels.choose("triton", other)
    assert kernels.choose("triton", task) == "triton"
    monkeypatch.setattr(gpu, "interpreting", lambda: False)
    with pytest.raises(FarError, match="needs CUDA"):
        kernels.choose("triton", task._replace(device=torch.device("cpu")))


PROGRAM = """
import json, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from models.kernels import gpu, lstm_triton
tensors = {
    "forward": ("inputs", "weight", "hidden", "gates", "states"),
    "backward": ("d_hidden", "weight", "gates", "states", "d_inputs"),
}
for capability, name, units, rows, precision in (
    *((80, n, u, r, "tf32") for n in tensors for u, r in ((16, 16), (64, 16))),
    *((c, n, 64, gpu.ROWS[-1], "tf32x3") for c in (80, 90) for n in tensors),
):
    keep = {"NEEDS_GRAD": True} if name == "forward" else {}
    constants = {"U": units, "BT": rows, "PRECISION": precision, **keep}
    types = {**dict.fromkeys(tensors[name], "*fp32"), "B": "i32", "N": "i32", **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(getattr(lstm_triton, name), types, constexprs=constants,
                       attrs={(i,): [["tt.divisibility", 16]] for i in range(5)})
    done = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=gpu.launch_options(units))
    most = gpu.LARGE if precision == "tf32x3" else 99 * 1024
    found = {"fits": done.metadata.shared <= most, "tensor_cores": "mma" in done.asm["ptx"]}
    print(json.dumps({**found, "binary": len(done.asm["cubin"])}))
"""


def test_triton_compiles_for_gpus_that_are_not_here(tmp_path):
    """Within 99 KiB of shared memory, the least that a GPU of compute capability 8 lends to one block."""
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(compiled) == 8
    assert all(c["fits"] and c["tensor_cores"] and c["binary"] for c in compiled), compiled
