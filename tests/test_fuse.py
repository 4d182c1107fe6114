"""fuse(): the function is kept, the arithmetic is counted as merged, and no fused model is ever wrong."""

import pytest
import torch

from deploy.fuse import fuse, merge_blocks
from models.count import count_macs
from models.kernels import cpu
from models.replace import FarConfig, build, set_backend
from tests.test_kernels import UNITS, layer
from utils.errors import FarError

needs_kernel = pytest.mark.skipif(not cpu.available(), reason="no C++ compiler here")


def micro(**kwargs):
    return build(FarConfig("DeiT-Micro", 10, 32, replaced=(0, 1, 3), units={"1": [[5, 32], [1, 7]]}, **kwargs)).eval()


def test_bfloat16_is_refused_where_it_cannot_run(monkeypatch):
    monkeypatch.setattr(cpu, "has_bfloat16", lambda: False)
    with pytest.raises(FarError, match="--fuse float32"):
        fuse(micro(), torch.bfloat16)
    fuse(micro(), torch.float32)


@pytest.mark.parametrize("keep", [1.0, 0.05])
def test_fuse_keeps_the_function_in_float64(keep):
    for units in ([[max(1, int(64 * keep))] * 2] * 3, [[max(1, int(u * keep)) for u in pair] for pair in UNITS[1]]):
        m = layer(units).double()
        f = m.merged()
        x = torch.randn(2, 40, 192, dtype=torch.float64)
        expected = m(x)
        assert ((f(x) - expected).norm() / expected.norm()).item() < 1e-12
        torch.testing.assert_close(m.float().merged()(x.float()), expected.float(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("patience", [0.0, 100.0])
def test_fuse_keeps_the_function_whichever_maps_it_merges(patience, monkeypatch):
    monkeypatch.setattr("models.merged.PATIENCE", patience)
    for m in (layer([(64, 64)] * 12, dim=768), layer(UNITS[1])):
        f, x = m.merged(), torch.randn(2, 30, m.dim)
        torch.testing.assert_close(f(x), m(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("units", [64, 32, 8])
def test_a_fused_layers_macs_are_counted_as_merged(units):
    config = FarConfig("DeiT-Tiny", 10, 224, replaced=(0,), units={"0": [[units] * 2] * 3})
    plain, fused = build(config), merge_blocks(build(config))
    total = 6 * units
    before = 192 * 192 + 4 * total * (64 + units) + 64 * total + 192 * 192  # pre_proj, LSTMs, head_proj, post_proj
    inputs = min(192 * 192 + 4 * total * 64, 4 * total * 192)  # merged where that costs less
    after = inputs + 4 * total * units + 192 * total
    assert count_macs(plain) - count_macs(fused) == 197 * (before - after)


@pytest.mark.parametrize(("rep_by", "backend"), [("multi-lstm", "reference"), ("gru", "torch")])
def test_a_model_fused_for_any_kernel_takes_an_empty_batch(rep_by, backend):
    model = build(FarConfig("DeiT-Micro", 10, 32, rep_by, replaced=(0, 3)))
    set_backend(model, backend)
    assert fuse(model)(torch.randn(0, 3, 32, 32)).shape == (0, 10)


@needs_kernel
def test_nothing_written_elsewhere_reaches_a_fused_layer_and_all_of_its_own_does():
    m = layer([(64, 64)] * 12, dim=768)
    f, x = m.merged(), torch.randn(2, 9, 768)
    before = f(x)
    for p in m.parameters():
        p.data.zero_()
    assert torch.equal(f(x), before)
    for p in f.parameters():
        p.detach().numpy()[...] *= 0.5  # as a broadcast over all parameters would write
    assert (f(x) - before).norm() > 0.1 * before.norm()


def test_loading_into_a_fused_model_is_refused_before_anything_is_written():
    model = micro()
    content = {name: w + 1 for name, w in model.state_dict().items()}
    model = merge_blocks(model)
    before = {name: w.clone() for name, w in model.state_dict().items()}
    for strict in (True, False):
        with pytest.raises(FarError, match=r"before fuse\(\)"):
            model.load_state_dict(content, strict=strict)
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())


def test_a_fused_model_without_the_kernel_moves_freely():
    m = layer(UNITS[1]).double()
    x = torch.randn(2, 9, 192)
    torch.testing.assert_close(m.merged().float()(x), m.float()(x), rtol=1e-3, atol=1e-4)


def test_a_fused_layer_refuses_to_differentiate():
    f = layer(UNITS[0]).merged()
    x = torch.randn(1, 5, 192, requires_grad=True)
    with pytest.raises(FarError, match="no gradients"):
        f(x)
    with torch.no_grad():
        assert torch.equal(f(x), f(x.detach()))
    assert not f(x.detach()).requires_grad
    with pytest.raises(FarError, match="no gradients"):
        f.requires_grad_()(x.detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_fused_layer_keeps_its_precision_under_autocast(dtype):
    f, x = layer(UNITS[1]).merged(), torch.randn(2, 30, 192)
    expected = f(x)
    with torch.autocast("cpu", dtype):
        for same in (x, x.to(dtype)):
            torch.testing.assert_close(f(same).float(), expected, rtol=0.05, atol=0.05)


def test_what_the_operator_does_not_cover_is_merged_with_one_log_line(caplog):
    model, x = micro().double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(fuse(model)(x), model(x), rtol=1e-10, atol=1e-10)
    assert [r.message for r in caplog.records] == [
        "fused block by block, not as one operator: weights that are not float32 on a CPU"
    ]
    caplog.clear()
    fuse(micro())
    assert not caplog.records


def test_a_hook_on_a_replacement_is_called_in_a_fused_model():
    model, x = micro(), torch.randn(2, 3, 32, 32)
    model.blocks[1].attn.register_forward_hook(lambda module, args, output: 2 * output)
    with torch.no_grad():
        torch.testing.assert_close(fuse(model)(x), model(x), rtol=1e-3, atol=1e-4)
