"""The best that stock torch can do, with gradients: a scan batched over heads and directions, and cuDNN."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Scan(torch.autograd.Function):
    """The recurrence over tokens for K cells at once; the backward pass is written out, its matrix products are batched.

    gates (N, K, B, 4 u) holds the input products and biases; weight (K, u, 4 u) is W_hh transposed. Returns (N, K, B, u).
    """

    @staticmethod
    def forward(ctx, gates: Tensor, weight: Tensor) -> Tensor:
        n, k, b, u4 = gates.shape
        u = u4 // 4
        acts = torch.empty_like(gates)
        cells = gates.new_empty(n, k, b, u)
        hidden = gates.new_empty(n, k, b, u)
        for t in range(n):
            a = acts[t]
            if t:
                torch.baddbmm(gates[t], hidden[t - 1], weight, out=a)
            else:
                a.copy_(gates[t])
            g = a[..., 2 * u : 3 * u].tanh()
            a.sigmoid_()
            a[..., 2 * u : 3 * u] = g
            c = torch.mul(a[..., :u], g, out=cells[t])
            if t:
                c.addcmul_(a[..., u : 2 * u], cells[t - 1])
            torch.mul(a[..., 3 * u :], c.tanh(), out=hidden[t])
        ctx.save_for_backward(acts, cells, hidden, weight)
        return hidden

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        acts, cells, hidden, weight = ctx.saved_tensors
        n, k, b, u = hidden.shape
        dgates = torch.empty_like(acts)
        back = weight.transpose(1, 2)
        dc = None
        for t in reversed(range(n)):
            i, f, g, o = acts[t].split(u, dim=-1)
            tc = cells[t].tanh()
            dh = grad[t] if t == n - 1 else torch.baddbmm(grad[t], dgates[t + 1], back)
            dct = dh * o * (1 - tc * tc)
            if dc is not None:
                dct += dc
            d = dgates[t]
            torch.mul(dct * g, i * (1 - i), out=d[..., :u])
            if t:
                torch.mul(dct * cells[t - 1], f * (1 - f), out=d[..., u : 2 * u])
            else:
                d[..., u : 2 * u] = 0
            torch.mul(dct * i, 1 - g * g, out=d[..., 2 * u : 3 * u])
            torch.mul(dh * tc, o * (1 - o), out=d[..., 3 * u :])
            dc = dct * f
        # Sum over tokens and batch as one product per cell.
        h = hidden[:-1].permute(1, 3, 0, 2).reshape(k, u, (n - 1) * b)
        dweight = torch.bmm(h, dgates[1:].transpose(0, 1).reshape(k, (n - 1) * b, 4 * u))
        return dgates, dweight


def _padded(tensor: Tensor, u: int, width: int, columns: bool) -> Tensor:
    """(4 u, m) -> (m', 4 width), gate by gate, transposed; padded units get zero weights and so stay zero."""
    m = tensor.shape[1]
    gates = tensor.view(4, u, m)
    if u != width:
        gates = F.pad(gates, (0, width - m if columns else 0, 0, width - u))
    return gates.reshape(4 * width, -1).t()


def _unpad(hidden: Tensor, units: Sequence[int]) -> Tensor:
    """(B, N, K, width) -> (B, N, sum u)."""
    if min(units) == hidden.shape[-1]:
        return hidden.flatten(2)
    return torch.cat([hidden[:, :, k, :u] for k, u in enumerate(units)], dim=2)


def scan(x: Tensor, cells: Sequence) -> Tensor:
    """See `models.kernels`. Every step is one batched product over all heads and directions; ragged cells are padded."""
    b, n, heads, d = x.shape
    units = [cell.weight_hh.shape[1] for cell in cells]
    width = max(units)
    w_ih = torch.stack([_padded(c.weight_ih, u, width, False) for c, u in zip(cells, units, strict=True)])
    w_hh = torch.stack([_padded(c.weight_hh, u, width, True) for c, u in zip(cells, units, strict=True)])
    bias = [_padded((c.bias_ih + c.bias_hh)[:, None], u, width, False) for c, u in zip(cells, units, strict=True)]
    tokens = x.permute(2, 1, 0, 3).reshape(heads, n * b, d)
    w_ih = w_ih.view(heads, 2, d, 4 * width).transpose(1, 2).reshape(heads, d, 8 * width)
    gates = torch.baddbmm(torch.cat(bias).view(heads, 1, 8 * width), tokens, w_ih)
    gates = gates.view(heads, n, b, 2, 4 * width).permute(1, 0, 3, 2, 4)  # (N, H, 2, B, 4 u)
    gates = torch.stack([gates[:, :, 0], gates[:, :, 1].flip(0)], dim=2).view(n, 2 * heads, b, 4 * width)
    with torch.autocast(x.device.type, enabled=False):  # the state is summed over N tokens: keep it in full precision
        hidden = _Scan.apply(gates.to(w_hh.dtype), w_hh)
    hidden = hidden.view(n, heads, 2, b, width)
    hidden = torch.stack([hidden[:, :, 0], hidden[:, :, 1].flip(0)], dim=2)
    return _unpad(hidden.permute(3, 0, 1, 2, 4).reshape(b, n, 2 * heads, width), units)


def stock(x: Tensor, cells: Sequence) -> Tensor:
    """See `models.kernels`. One bidirectional torch LSTM per head (cuDNN on CUDA); a ragged head is padded to its wider side."""
    units = [cell.weight_hh.shape[1] for cell in cells]
    outputs = []
    for h in range(x.shape[2]):
        pair = units[2 * h : 2 * h + 2]
        width = max(pair)
        weights = []
        for cell, u in zip(cells[2 * h : 2 * h + 2], pair, strict=True):
            weights += [
                _padded(cell.weight_ih, u, width, False).t(),
                _padded(cell.weight_hh, u, width, True).t(),
                _padded(cell.bias_ih[:, None], u, width, False)[0],
                _padded(cell.bias_hh[:, None], u, width, False)[0],
            ]
        tokens = x[:, :, h].to(weights[0].dtype).contiguous()
        zero = tokens.new_zeros(2, x.shape[0], width)
        with torch.autocast(x.device.type, enabled=False):
            y = torch._VF.lstm(
                tokens, (zero, zero), [w.contiguous() for w in weights], True, 1, 0.0, torch.is_grad_enabled(), True, True
            )[0]
        outputs.append(_unpad(y.unflatten(2, (2, width)), pair))
    return torch.cat(outputs, dim=2)
