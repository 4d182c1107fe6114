"""The CPU kernel, forward and backward, and fuse() against the float64 reference; builds that collide, fall back, or have nowhere to go."""

import os
import subprocess
import sys

import pytest
import torch

from engine.count import count_macs
from models import kernels
from models.bilstm import MultiHeadBiLSTM
from models.fuse import FusedBiLSTM, fuse
from models.kernels import cpu
from models.replace import FarConfig, build
from tests.conftest import ROOT
from utils.errors import FarError

UNITS = [[(64, 64)] * 3, [(64, 1), (17, 40), (3, 64)], [(16, 16), (33, 5), (48, 49)]]


def layer(units, tokens=197, dim=192):
    m = MultiHeadBiLSTM(dim, len(units), tokens, units)
    for p in m.parameters():
        if p.dim() == 1:
            torch.nn.init.normal_(p, std=0.3)
    return m.requires_grad_(False)


def cells(m):
    return [direction.cell() for head in m.lstm for direction in head]


def error_against_float64(x, m, got):
    double = [kernels.Cell(*(w.double() for w in cell)) for cell in cells(m)]
    expected = kernels.KERNELS["reference"](x.double(), double)
    return ((got - expected).norm() / expected.norm()).item()


def gradient_errors(x, m, compute):
    """Relative errors of hidden states and of every gradient of a random weighting of them, against the float64 reference.

    Gradients that almost cancel (a bias of one unit) are held to a thousandth of the weighting's norm instead of their own.
    """
    weights = [w for cell in cells(m) for w in cell]
    double = [t.detach().double().requires_grad_() for t in (x, *weights)]
    expected = kernels.KERNELS["reference"](double[0], [kernels.Cell(*double[i : i + 4]) for i in range(1, len(double), 4)])
    got, direction = compute(), torch.randn_like(expected)
    ours = torch.autograd.grad(got, [x, *weights], direction.to(got.dtype))
    theirs = torch.autograd.grad(expected, double, direction, materialize_grads=True)  # at one token W_hh has none
    pairs = [(got, expected), *zip(ours, theirs, strict=True)]
    return [((a - b).norm() / b.norm().clamp(min=1e-3 * direction.norm())).item() for a, b in pairs]


BUILDS = {"tuned": cpu.TUNED, "avx2": ("-mavx2", "-mfma"), "portable": cpu.PORTABLE}


@pytest.fixture(scope="module", params=BUILDS)
def operators(request):
    if request.param == "avx2" and "AVX" not in torch.backends.cpu.get_cpu_capability():
        pytest.skip("no AVX2 here")
    found = cpu.load(BUILDS[request.param])
    if found is None:
        pytest.skip("no C++ compiler here")
    return found


@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize(("tokens", "batch"), [(1, 1), (2, 3), (197, 1), (197, 8), (197, 33), (1025, 2), (50, 7)])
def test_the_cpu_kernel_matches_the_reference(operators, units, tokens, batch):
    m = layer(units)
    x = torch.randn(batch, tokens, 3, 64)
    assert error_against_float64(x, m, cpu.fused(x, cells(m), operators)) < 1e-6


@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize(("tokens", "batch"), [(1, 1), (2, 3), (197, 1), (50, 33), (1025, 2)])
def test_bfloat16_recurrent_weights_round_and_nothing_else(units, tokens, batch):
    if not cpu.has_bfloat16():
        pytest.skip("no AVX512_BF16 here")
    m, x = layer(units), torch.randn(batch, tokens, 3, 64)
    packed = torch.ops.far.pack([w for cell in cells(m) for w in cell], half=True)
    got = torch.ops.far.run_packed(x, packed, [u for pair in units for u in pair])
    rounded = [cell._replace(weight_hh=cell.weight_hh.bfloat16().float()) for cell in cells(m)]
    with_rounded_weights = cpu.fused(x, rounded)
    assert error_against_float64(x, m, got) < 5e-3
    assert ((got - with_rounded_weights).norm() / got.norm()).item() < 3e-3  # what is left: the hidden state's rounding, 2^-9
    assert torch.equal(got, cpu.fused(x, cells(m))) == (tokens == 1)  # the first token meets no recurrence


def test_bfloat16_is_refused_where_it_cannot_run(monkeypatch):
    monkeypatch.setattr(cpu, "has_bfloat16", lambda: False)
    with pytest.raises(FarError, match="--fuse float32"):
        FusedBiLSTM(layer(UNITS[0]), torch.bfloat16)


@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize(("tokens", "batch"), [(1, 1), (2, 3), (197, 8), (50, 33), (1025, 2)])
def test_the_cpu_kernels_backward_matches_the_reference(operators, units, tokens, batch):
    m = layer(units).requires_grad_()
    x = torch.randn(batch, 3, tokens, 64).transpose(1, 2).requires_grad_()  # not contiguous
    assert max(gradient_errors(x, m, lambda: cpu.fused(x, cells(m), operators))) < 1e-5


def test_the_cpu_kernels_graph_can_be_walked_twice_and_frozen_parts_stay_without_gradients(operators):
    m = layer(UNITS[1])
    m.lstm[1][0].weight_hh.requires_grad_()
    x = torch.randn(2, 7, 3, 64)
    loss = cpu.fused(x, cells(m), operators).square().sum()
    first, second = (torch.autograd.grad(loss, m.lstm[1][0].weight_hh, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and first.norm() > 0
    loss.backward()
    assert m.lstm[0][0].weight_hh.grad is None and x.grad is None


def test_the_cpu_kernel_reads_strided_input(operators):
    m = layer(UNITS[1])
    views = (
        torch.randn(3, 20, 4, 64).transpose(0, 1)[:, :, :3],
        torch.randn(64, 20, 2, 3).permute(2, 1, 3, 0),
        torch.randn(2, 9, 1, 64).expand(2, 9, 3, 64),
    )
    for x in views:
        assert error_against_float64(x, m, cpu.fused(x, cells(m), operators)) < 1e-6


def test_extreme_input_saturates_and_nan_passes_through(operators):
    m = layer(UNITS[0])
    x = torch.randn(2, 12, 3, 64) * 1e4
    assert error_against_float64(x, m, cpu.fused(x, cells(m), operators)) < 1e-3  # gates of 1e4 are rounded to 1e-3 in float32
    x[0, 5, 1, 0] = float("nan")
    bad = cpu.fused(x, cells(m), operators).isnan()  # (2, 12, 384)
    assert bad[0, 5:, 128:192].all() and bad[0, :6, 192:256].all()
    assert not bad[1].any() and not bad[0, :5, 128:192].any() and not bad[0, :, :128].any()


def assert_layer_is_current(m, x):
    """The layer computes with the weights it has now, whoever wrote them and how."""
    m.backend = "auto"
    got = m(x).detach()
    m.backend = "reference"
    torch.testing.assert_close(got, m(x).detach(), rtol=1e-3, atol=1e-4)
    return got


def scale_by_data(m):
    for p in m.parameters():
        p.data *= 0.5


def scale_by_copy(m):
    for p in m.parameters():
        p.data.copy_(p.data * 0.5)


def scale_by_raw_memory(m):
    """As a collective of torch.distributed writes: no version counter moves."""
    for p in m.parameters():
        p.detach().numpy()[...] *= 0.5


def scale_by_loading(m):
    m.load_state_dict({name: w * 0.5 for name, w in m.state_dict().items()})


def scale_in_inference(m):
    with torch.inference_mode():
        scale_by_copy(m)


def scale_by_a_step(m):
    for p in m.requires_grad_().parameters():
        p.grad = p.detach() * 0.5
    torch.optim.SGD(m.parameters(), lr=1.0).step()
    m.requires_grad_(False)


@pytest.mark.parametrize("change", [scale_by_data, scale_by_copy, scale_by_raw_memory, scale_by_loading, scale_in_inference, scale_by_a_step])
def test_a_layer_computes_with_the_weights_it_has_now(change):
    m, x = layer(UNITS[1]), torch.randn(1, 30, 192)
    before = assert_layer_is_current(m, x)
    change(m)
    after = assert_layer_is_current(m, x)
    assert not torch.allclose(before, after, atol=1e-3)
    with torch.inference_mode():
        assert_layer_is_current(m, x)


BROADCAST = """
import sys
import utils, torch
from torch import distributed as dist
from models.bilstm import MultiHeadBiLSTM
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
torch.manual_seed(rank)
m, x = MultiHeadBiLSTM(64, 2, 9).requires_grad_(False), torch.ones(1, 9, 64)
m(x)
for p in m.parameters():
    dist.broadcast(p, 0)
got = m(x)
m.backend = "reference"
print((got - m(x)).abs().max().item() < 1e-5)
"""


def test_weights_that_another_process_sends_are_used(tmp_path):
    both = [start(BROADCAST, str(rank), str(tmp_path / "store"), OMP_NUM_THREADS="1") for rank in (0, 1)]
    for process in both:
        said, error = process.communicate(timeout=300)
        assert said.strip() == "True", error


def test_auto_takes_the_cpu_kernel_only_where_it_fits():
    x = torch.randn(1, 5, 3, 64)
    assert kernels.choose("auto", x, 64) == ("cpu" if cpu.available() else "torch")
    assert kernels.choose("auto", x.double(), 64) == kernels.choose("auto", x.bfloat16(), 64) == "torch"
    with pytest.raises(FarError, match="--lstm-backend cpu"):
        kernels.choose("cpu", x.double(), 64)


@pytest.mark.skipif(not cpu.available(), reason="no C++ compiler here")
def test_a_layer_trains_with_the_cpu_kernel(monkeypatch):
    called = []
    monkeypatch.setitem(kernels.KERNELS, "cpu", lambda x, c: called.append(1) or cpu.fused(x, c))
    m, x = layer(UNITS[0]).requires_grad_(), torch.randn(2, 30, 192)
    grads = {}
    for m.backend in ("auto", "torch"):
        grads[m.backend] = torch.autograd.grad(m(x).square().sum(), list(m.parameters()))
    assert called == [1]
    for a, b in zip(*grads.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("keep", [1.0, 0.5, 0.25, 0.05])
def test_fuse_keeps_the_function_in_float64(keep):
    for units in ([[max(1, int(64 * keep))] * 2] * 3, [[max(1, int(u * keep)) for u in pair] for pair in UNITS[1]]):
        m = layer(units).double()
        f = FusedBiLSTM(m)
        x = torch.randn(2, 40, 192, dtype=torch.float64)
        expected = m(x)
        assert ((f(x) - expected).norm() / expected.norm()).item() < 1e-12
        torch.testing.assert_close(FusedBiLSTM(m.float())(x.float()), expected.float(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("patience", [0.0, 100.0])
def test_fuse_keeps_the_function_whichever_maps_it_merges(patience, monkeypatch):
    monkeypatch.setattr("models.fuse.PATIENCE", patience)
    for m in (layer([(64, 64)] * 12, dim=768), layer(UNITS[1])):
        f, x = FusedBiLSTM(m), torch.randn(2, 30, m.dim)
        torch.testing.assert_close(f(x), m(x), rtol=1e-3, atol=1e-4)
        f.tokens = 1
        torch.testing.assert_close(f(x), m(x)[:, :1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("units", [64, 32, 8])
def test_a_fused_layers_macs_are_counted_as_merged(units):
    config = FarConfig("DeiT-Tiny", 10, 224, replaced=(0,), units={"0": [[units] * 2] * 3})
    plain, fused = build(config), fuse(build(config))
    total = 6 * units
    before = 192 * 192 + 4 * total * (64 + units) + 64 * total + 192 * 192  # pre_proj, LSTMs, head_proj, post_proj
    inputs = min(192 * 192 + 4 * total * 64, 4 * total * 192)  # merged where that costs less
    after = inputs + 4 * total * units + 192 * total
    assert count_macs(plain) - count_macs(fused) == 197 * (before - after)


def test_a_fused_model_gives_the_models_logits():
    units = {"1": [[5, 32], [1, 7]]}
    config = FarConfig("DeiT-Micro", 10, 32, replaced=(0, 1, 3), units=units)
    model = build(config).eval()
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
    torch.testing.assert_close(fuse(model)(x), expected, rtol=1e-3, atol=1e-4)
    assert sum(isinstance(block.attn, FusedBiLSTM) for block in model.blocks) == 3


@pytest.mark.parametrize("replaced", [(0, 1, 2, 3), (3,), (0, 1)])
def test_a_fused_models_last_block_goes_on_with_the_class_token_alone(replaced):
    config = FarConfig("DeiT-Micro", 10, 32, replaced=replaced, units={"3": [[5, 32], [1, 7]]} if 3 in replaced else {})
    model = build(config).double().eval()
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        expected, plain = model(x), count_macs(model)
    torch.testing.assert_close(fuse(model)(x), expected, rtol=1e-10, atol=1e-12)
    assert model.forward_features(x).shape[1] == (1 if 3 in replaced else 65)
    if 3 in replaced:
        assert plain - count_macs(model) > 64 * 2 * 4 * 64**2  # the last MLP on 64 patches, at least


AVAILABLE = """
import utils, torch
from models.kernels import cpu
print(cpu.available(), flush=True)
"""


def start(program=AVAILABLE, *argv, **env):
    return subprocess.Popen([sys.executable, "-c", program, *argv], cwd=ROOT, env={**os.environ, **env}, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)  # fmt: skip


def test_two_processes_building_at_once_do_not_collide(tmp_path):
    both = [start(TORCH_EXTENSIONS_DIR=str(tmp_path / "cache")) for _ in range(2)]
    for process in both:
        said, error = process.communicate(timeout=300)
        assert said.strip() == str(cpu.available()), error
    assert len(list((tmp_path / "cache").iterdir())) <= 1  # one build, nothing left over


def test_a_home_that_cannot_be_written_does_not_break_it(tmp_path):
    (tmp_path / "file").write_text("")  # a file in the folder's place fails for root too
    process = start(TORCH_EXTENSIONS_DIR=str(tmp_path / "file" / "cache"), TMPDIR=str(tmp_path))
    said, error = process.communicate(timeout=300)
    assert said.strip() == str(cpu.available()), error


def test_without_a_compiler_torch_serves_and_one_line_says_so(tmp_path):
    process = start(TORCH_EXTENSIONS_DIR=str(tmp_path), TMPDIR=str(tmp_path), CXX="no-such-compiler", PATH=os.environ["PATH"])
    said, error = process.communicate(timeout=300)
    assert said.strip() == "False" and error.count("could not be built") == 1, error
