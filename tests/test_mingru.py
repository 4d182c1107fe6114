"""minGRU: hidden states are the weighted means that the paper's recurrence unrolls to, however they are computed."""

import pytest
import torch

from models import mingru
from models.kernels import KERNELS
from models.mingru import MINGRU, MultiHeadBiMinGRU, Recurrence, scan, walk

WAYS = pytest.mark.parametrize("way", [scan, walk])


def unrolled(cell, x):
    """h_t = sum over s <= t of z_s n_s times all (1 - z_r) between, written out; x (B, N, d)."""
    u, states = cell.units, []
    z = torch.sigmoid(x @ cell.weight_ih[:u].T + cell.bias_ih[:u])
    n = x @ cell.weight_ih[u:].T + cell.bias_ih[u:]
    for t in range(x.shape[1]):
        states.append(sum(z[:, s] * n[:, s] * (1 - z[:, s + 1 : t + 1]).prod(1) for s in range(t + 1)))
    return torch.stack(states, 1)


@pytest.mark.parametrize("kernel", ["reference", "torch"])
@pytest.mark.parametrize("tokens", [1, 2, 9])
@WAYS
def test_a_head_is_a_weighted_mean_of_its_candidates_from_either_side(kernel, tokens, way, monkeypatch):
    monkeypatch.setattr(Recurrence, "compute", staticmethod(way))
    m = MultiHeadBiMinGRU(24, 3, tokens, [[8, 5], [1, 8], [3, 3]]).double()
    for weight in m.lstm.parameters():
        torch.nn.init.normal_(weight, std=0.7)
    x = torch.randn(2, tokens, 3, 8, dtype=torch.float64)
    expected = []
    for h, (forward, backward) in enumerate(m.lstm):
        expected += [unrolled(forward.cell(), x[:, :, h]), unrolled(backward.cell(), x[:, :, h].flip(1)).flip(1)]
    got = KERNELS[kernel].run(MINGRU, x, m.cells())
    torch.testing.assert_close(got, torch.cat(expected, 2), rtol=1e-12, atol=1e-14)


@WAYS
@pytest.mark.parametrize("tokens", [1, 2, 3, 64, 65, 197])
def test_the_recurrence_and_its_gradients_are_those_of_a_plain_loop(tokens, way, monkeypatch):
    monkeypatch.setattr(Recurrence, "compute", staticmethod(way))
    decay = torch.rand(3, tokens, 4, dtype=torch.float64)
    decay[0, tokens // 2] = 0.0  # a gate wide open, and one shut: nothing stays, everything stays
    decay[1, :, 2] = 1.0
    inputs = [decay.requires_grad_(), torch.randn(3, tokens, 4, dtype=torch.float64, requires_grad=True)]
    states = [inputs[1][:, 0]]
    for t in range(1, tokens):
        states.append(decay[:, t] * states[-1] + inputs[1][:, t])
    expected, got = torch.stack(states, 1), Recurrence.apply(*inputs)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)
    direction = torch.randn_like(got)
    theirs, ours = (torch.autograd.grad(h, inputs, direction, materialize_grads=True) for h in (expected, got))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@WAYS
def test_gates_far_out_stay_finite_in_float32(way, monkeypatch):
    monkeypatch.setattr(Recurrence, "compute", staticmethod(way))
    m = MultiHeadBiMinGRU(16, 2, 257)
    x = (torch.randn(1, 257, 16) * 1e4).requires_grad_()
    m(x).square().mean().backward()
    assert x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in m.parameters())


def test_a_cpu_walks_and_a_compiled_model_scans(monkeypatch):
    m, x = MultiHeadBiMinGRU(16, 2, 9), torch.randn(1, 9, 16)
    with monkeypatch.context() as patch:
        patch.setattr(mingru, "scan", None)
        expected = m(x)
    monkeypatch.setattr(mingru, "walk", None)
    torch.testing.assert_close(torch.compile(m, fullgraph=True, backend="eager")(x), expected, rtol=1e-5, atol=1e-6)


def test_chrono_init_spreads_memory_over_the_tokens():
    m = MultiHeadBiMinGRU(256, 1, 65)
    for direction in m.lstm[0]:
        direction.chrono_init(65)
        memory = 1 / torch.sigmoid(direction.bias_ih[:256])  # tokens until a state has decayed, at zero input
        assert memory.min() < 5 and memory.max() > 50 and (direction.bias_ih[256:] == 0).all()
