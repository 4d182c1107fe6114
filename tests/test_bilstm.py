"""The replacement computes what it says, against torch's own LSTM and a float64 loop."""

import pytest
import torch

from models.bigru import MultiHeadBiGRU
from models.bilstm import MultiHeadBiLSTM
from models.deit import create_teacher
from models.kernels import KERNELS
from models.mingru import MultiHeadBiMinGRU
from models.replace import REPLACEMENTS, parse_blocks, replacements, swap_attention
from tests.conftest import relative_error

RAGGED = [[(64, 64)] * 3, [(64, 1), (17, 40), (3, 64)], [(5, 5), (1, 1), (2, 31)]]


@pytest.mark.parametrize("units", RAGGED)
def test_multi_head_equals_dense_lstm_with_blocks_on_its_diagonal(units):
    m = MultiHeadBiLSTM(192, 3, 197, units).double()
    torch.nn.init.normal_(m.lstm[1][1].bias_hh)
    x = torch.randn(2, 197, 192, dtype=torch.float64)
    dense, width = m.to_dense(), m.width
    out, _ = dense(m.pre_proj(x))  # (B, N, 2 H width)
    out = out.unflatten(2, (2, 3, width))
    z = [
        p(torch.cat([out[:, :, 0, h, :f], out[:, :, 1, h, :b]], 2))
        for h, (p, (f, b)) in enumerate(zip(m.head_proj, units, strict=True))
    ]
    assert relative_error(m(x), m.post_proj(torch.cat(z, 2))) < 1e-10
    off_diagonal = dense.weight_hh_l0.unflatten(0, (4, 3, width)).unflatten(3, (3, width))[:, 0, :, 1]
    assert off_diagonal.abs().max() == 0


def test_a_gru_head_equals_torchs():
    m = MultiHeadBiGRU(192, 3, 9).double()
    for w in m.lstm.parameters():
        torch.nn.init.normal_(w, std=0.2)
    x = torch.randn(2, 9, 192, dtype=torch.float64)
    p, z = m.pre_proj(x), []
    for h in range(3):
        gru = torch.nn.GRU(64, 64, batch_first=True, bidirectional=True).double()
        for r, suffix in enumerate(("", "_reverse")):
            for name, w in m.lstm[h][r].named_parameters():
                getattr(gru, f"{name}_l0{suffix}").data.copy_(w)
        z.append(m.head_proj[h](gru(p[:, :, 64 * h : 64 * (h + 1)])[0]))
    expected = m.post_proj(torch.cat(z, 2))
    for m.backend in ("auto", "reference"):
        assert relative_error(m(x), expected) < 1e-12


@pytest.mark.parametrize("kind", [MultiHeadBiLSTM, MultiHeadBiGRU, MultiHeadBiMinGRU])
@pytest.mark.parametrize("units", RAGGED[1:])
@pytest.mark.parametrize("tokens", [1, 17])
def test_torchs_kernel_matches_the_reference_forward_and_backward(kind, units, tokens):
    m = kind(192, 3, tokens, units).double()
    x = torch.randn(3, 3, tokens, 64, dtype=torch.float64).transpose(1, 2).requires_grad_()  # not contiguous
    for bias in m.lstm.parameters():
        torch.nn.init.normal_(bias, std=0.3)
    weights = [x, *m.lstm.parameters()]
    expected, got = (KERNELS[k].run(m.direction.kind, x, m.cells()) for k in ("reference", "torch"))
    direction = torch.randn_like(expected)
    assert relative_error(got, expected) < 1e-12
    # At one token the recurrent weights have no gradient: both must say zero.
    ours = torch.autograd.grad(got, weights, direction, materialize_grads=True)
    theirs = torch.autograd.grad(expected, weights, direction, materialize_grads=True)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_hooked_head_projection_is_called_as_it_is():
    m, x, called = MultiHeadBiLSTM(192, 3, 9), torch.randn(2, 9, 192), []
    m.head_proj[1].register_full_backward_hook(lambda *_: called.append("hook"))
    parts = m.hidden(m.pre_proj(x).view(2, 9, 3, 64)).split(128, dim=2)
    expected = m.post_proj(torch.cat([proj(h) for proj, h in zip(m.head_proj, parts, strict=True)], 2))
    torch.testing.assert_close(m(x), expected)
    m(x).sum().backward()
    assert called == ["hook"]


@pytest.mark.parametrize("name", sorted(REPLACEMENTS))
def test_swap_carries_the_output_projection_over_and_leaves_other_blocks(name):
    model = create_teacher("DeiT-Micro", 10, 32).eval()
    before = [block.attn for block in model.blocks]
    swap_attention(model, (1, 3), name)
    assert tuple(replacements(model)) == (1, 3)
    assert model.blocks[0].attn is before[0]
    assert torch.equal(model.blocks[3].attn.post_proj.weight, before[3].proj.weight)
    assert model.blocks[3].attn.post_proj not in model.blocks[3].attn.mixing_parts()
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_replace_reads_indices_and_ranges():
    assert parse_blocks("0-11", 12) == parse_blocks("all", 12) == tuple(range(12))
    assert parse_blocks("0,2,5-7", 12) == parse_blocks(["0", "2", "5-7"], 12) == (0, 2, 5, 6, 7)


def test_chrono_init_spreads_memory_over_the_tokens():
    model = create_teacher("DeiT-Micro", 10, 32)
    swap_attention(model, (0,), "multi-lstm", "chrono")
    direction = model.blocks[0].attn.lstm[0][1]
    forget, write = direction.bias_ih[32:64], direction.bias_ih[:32]
    assert torch.equal(forget, -write) and forget.min() >= 0 and 2 < forget.exp().max() <= 64
    assert direction.bias_hh.abs().max() == 0
