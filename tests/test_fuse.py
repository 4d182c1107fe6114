"""fuse(): the function is kept, the arithmetic is counted as merged, and no fused model is ever wrong."""

import copy
import io

import pytest
import torch

from deploy.fuse import fuse, merge_blocks
from models.count import count_macs
from models.kernels import cpu
from models.merged import MergedBiRNN
from models.replace import FarConfig, build, set_backend
from tests.test_kernels import UNITS, layer
from utils.errors import FarError

needs_kernel = pytest.mark.skipif(not cpu.available(), reason="no C++ compiler here")


def test_bfloat16_is_refused_where_it_cannot_run(monkeypatch):
    monkeypatch.setattr(cpu, "has_bfloat16", lambda: False)
    with pytest.raises(FarError, match="--fuse float32"):
        fuse(micro(), torch.bfloat16)


@pytest.mark.parametrize("keep", [1.0, 0.5, 0.25, 0.05])
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
        torch.testing.assert_close(f(x, tokens=1), m(x)[:, :1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("units", [64, 32, 8])
def test_a_fused_layers_macs_are_counted_as_merged(units):
    config = FarConfig("DeiT-Tiny", 10, 224, replaced=(0,), units={"0": [[units] * 2] * 3})
    plain, fused = build(config), merge_blocks(build(config))
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
    for fused in (fuse(model), merge_blocks(model)):
        torch.testing.assert_close(fused(x), expected, rtol=1e-3, atol=1e-4)
    assert sum(isinstance(block.attn, MergedBiRNN) for block in fused.blocks) == 3


@pytest.mark.parametrize("recurrent", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", [32, 3])  # pre_proj stays apart, or is merged
def test_a_fused_model_takes_any_memory_format_and_an_empty_batch(kept, recurrent):
    if recurrent == torch.bfloat16 and not cpu.has_bfloat16():
        pytest.skip("no AVX512_BF16")
    units = {str(i): [[kept, kept]] * 2 for i in range(4)} if kept < 32 else {}
    config = FarConfig("DeiT-Micro", 10, 32, replaced=(0, 1, 2, 3), units=units)
    model = fuse(build(config), recurrent)
    x = torch.randn(3, 3, 32, 32)
    expected = model(x)
    assert model(x[:0]).shape == (0, 10)
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("rep_by", ["multi-lstm", "gru"])
def test_a_model_fused_for_any_kernel_takes_an_empty_batch(rep_by, backend):
    model = build(FarConfig("DeiT-Micro", 10, 32, rep_by, replaced=(0, 3)))
    set_backend(model, backend)
    assert fuse(model)(torch.randn(0, 3, 32, 32)).shape == (0, 10)


@pytest.mark.parametrize("replaced", [(0, 1, 2, 3), (3,), (0, 1)])
def test_a_fused_models_last_block_goes_on_with_the_class_token_alone(replaced):
    config = FarConfig("DeiT-Micro", 10, 32, replaced=replaced, units={"3": [[5, 32], [1, 7]]} if 3 in replaced else {})
    model = build(config).double().eval()
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        expected, plain = model(x), count_macs(model)
    fused = merge_blocks(model)
    torch.testing.assert_close(fused(x), expected, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(fused.forward_features(x), model.forward_features(x), rtol=1e-10, atol=1e-12)
    if 3 in replaced:
        assert plain - count_macs(fused) > 64 * 2 * 4 * 64**2  # the last MLP on 64 patches, at least


@pytest.mark.parametrize("pool", ["token", "avg", ""])
@torch.no_grad()
def test_a_fused_model_takes_a_classifier_that_reads_other_tokens(pool):
    model = build(FarConfig("DeiT-Micro", 10, 32, "gru", replaced=(0, 3))).eval()
    fused = merge_blocks(model)
    for each in (model, fused):
        each.reset_classifier(5, pool)
    fused.head.load_state_dict(model.head.state_dict())
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-3, atol=1e-4)


def micro(**kwargs):
    return build(FarConfig("DeiT-Micro", 10, 32, replaced=(0, 1, 3), units={"1": [[5, 32], [1, 7]]}, **kwargs)).eval()


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loading_into_a_fused_model_is_refused_before_anything_is_written(dtype):
    model = micro().to(dtype)
    content = {name: w + 1 for name, w in model.state_dict().items()}
    model = merge_blocks(model)
    before = {name: w.clone() for name, w in model.state_dict().items()}
    for load in (
        lambda: model.load_state_dict(content),
        lambda: model.load_state_dict(content, strict=False),
        lambda: model.blocks[0].attn.load_state_dict(model.blocks[0].attn.state_dict()),
    ):
        with pytest.raises(FarError, match=r"before fuse\(\)"):
            load()
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())


def test_a_fused_model_without_the_kernel_moves_freely():
    m = layer(UNITS[1]).double()
    x = torch.randn(2, 9, 192)
    torch.testing.assert_close(m.merged().float()(x), m.float()(x), rtol=1e-3, atol=1e-4)


def test_a_fused_model_can_be_copied_and_pickled():
    model, x, buffer = fuse(micro()), torch.randn(2, 3, 32, 32), io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    expected = model(x)
    for again in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(again(x), expected)
        with pytest.raises(FarError, match="load_state_dict"):
            again.load_state_dict(model.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_fused_layer_refuses_to_differentiate(dtype):
    f = layer(UNITS[0]).to(dtype).merged()
    x = torch.randn(1, 5, 192, dtype=dtype, requires_grad=True)
    with pytest.raises(FarError, match="no gradients"):
        f(x)
    with torch.no_grad():
        assert torch.equal(f(x), f(x.detach()))
    assert not f(x.detach()).requires_grad
    with pytest.raises(FarError, match="no gradients"):
        f.requires_grad_()(x.detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide", [False, True])
def test_a_fused_layer_keeps_its_precision_under_autocast(dtype, wide):
    f = (layer([(64, 64)] * 12, dim=768) if wide else layer(UNITS[1])).merged()
    x = torch.randn(2, 30, 768 if wide else 192)
    expected = f(x)
    with torch.autocast("cpu", dtype):
        for given in (x, x.to(dtype)):
            torch.testing.assert_close(f(given).float(), expected, rtol=0.05, atol=0.05)


def test_a_fused_model_gives_nearly_its_logits_under_autocast():
    model, x = fuse(micro()), torch.randn(3, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(x)
    torch.testing.assert_close(got.float(), model(x), rtol=0.05, atol=0.05)


def test_what_the_operator_does_not_cover_is_merged_with_one_log_line(caplog):
    model, x = micro().double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(fuse(model)(x), model(x), rtol=1e-10, atol=1e-10)
    assert [r.message for r in caplog.records] == [
        "fused block by block, not as one operator: weights that are not float32 on a CPU"
    ]
    caplog.clear()
    fuse(micro())
    assert not caplog.records
