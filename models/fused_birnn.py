"""A multi-head bidirectional RNN for inference: neighbouring linear maps merged where that costs less."""

import copy
import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import kernels
from models.kernels.packed import frozen
from utils.errors import FarError

# One large matrix product beats H small ones and a copy until it has this many times their multiplications (measured at
# 197 tokens, D 192: an unpruned layer, 73.7 k against 61.4 k a token, is faster merged).
PATIENCE = 1.25


def refuse_loading(module: nn.Module, *_) -> None:
    """Hook before load_state_dict: merged weights have no names to load by."""
    raise FarError("load_state_dict: this model is fused, its weights are merged; load them before fuse()")


class FusedBiRNN(nn.Module):
    """The function of a MultiHeadBiRNN without gradients: x (B, N, D) to (B, min(N, tokens), D).

    pre_proj is merged into the input weights where D * G sum(u) < D^2 + d * G sum(u), G the gates; head_proj into
    post_proj where D * sum(u) is at most PATIENCE times d * sum(u) + D^2 (multiplications a token).

    Args:
        attn: a MultiHeadBiRNN, which stays as it is.
        half: W_hh in bfloat16: faster, and rounds hidden states to three digits. FarError where the kernel cannot.
        tokens: how many of the first tokens anybody reads; None is all.
    """

    def __init__(self, attn: nn.Module, half: bool = False, tokens: int | None = None):
        super().__init__()
        like, cells, kind = attn.post_proj.weight, attn.cells(), attn.direction.kind
        total = sum(cell.units for cell in cells)
        self.heads, self.tokens = attn.num_heads, tokens or sys.maxsize
        merged = attn.dim * kind.gates * total < attn.dim**2 + attn.width * kind.gates * total
        with torch.no_grad():
            cells = _merge_pre(attn, cells) if merged else cells
            task = kernels.Task(kind, like.device, like.dtype, max(cell.units for cell in cells), half)
            self.cells = kernels.KERNELS[kernels.choose(attn.backend, task)].pack(kind, cells, half)
            pre = [like.new_empty(0)] * 2 if merged else attn.pre_proj.parameters()
            self.pre = nn.ParameterList(map(frozen, pre))  # weight and bias; empty where merged
            merged = attn.dim * total <= PATIENCE * (attn.width * total + attn.dim**2)
            self.head_proj = nn.ModuleList([] if merged else copy.deepcopy(attn.head_proj)).requires_grad_(False)
            self.out = nn.ParameterList(map(frozen, _merge_out(attn) if merged else attn.post_proj.parameters()))
        products = sum(cell.weight_ih.numel() + cell.weight_hh.numel() for cell in cells)
        self.macs_a_token = self.pre[0].numel() + products  # what mixes tokens; the output maps are counted apart
        self.register_load_state_dict_pre_hook(refuse_loading)

    def macs(self, shape: Sequence[int]) -> int:
        """See `models.parts.BlockPart`."""
        b, n, _ = shape
        out = self.out[0].numel() + sum(proj.weight.numel() for proj in self.head_proj)
        return b * (n * self.macs_a_token + min(n, self.tokens) * out)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if torch.is_grad_enabled() and (x.requires_grad or self.out[0].requires_grad):
            raise FarError("a fused layer has no gradients: take them before fuse(), or call it under torch.no_grad()")
        if not self.head_proj:
            return self.cells.layer(x, list(self.pre), list(self.out), self.heads, self.tokens)
        hidden = self.cells.hidden(x, list(self.pre), self.heads)[:, : self.tokens]
        heads = hidden.split([proj.in_features for proj in self.head_proj], dim=2)
        z = torch.cat([proj(h) for proj, h in zip(self.head_proj, heads, strict=True)], dim=2)
        return F.linear(z, *self.out)


def _merge_pre(attn: nn.Module, cells: Sequence[kernels.Cell]) -> list[kernels.Cell]:
    """The cells on all D channels of x, pre_proj within their input weights."""
    merged = []
    for k, cell in enumerate(cells):
        rows = slice(k // 2 * attn.width, (k // 2 + 1) * attn.width)
        weight, bias = attn.pre_proj.weight[rows], attn.pre_proj.bias[rows]
        cell = cell._replace(weight_ih=cell.weight_ih @ weight, bias_ih=cell.bias_ih + cell.weight_ih @ bias)
        merged.append(cell)
    return merged


def _merge_out(attn: nn.Module) -> tuple[Tensor, Tensor]:
    """post_proj of all head_proj: (D, sum u) and (D,)."""
    post, heads = attn.post_proj, attn.head_proj
    parts = zip(post.weight.chunk(attn.num_heads, dim=1), heads, strict=True)
    weight = torch.cat([part @ proj.weight for part, proj in parts], dim=1)
    return weight, post.bias + post.weight @ torch.cat([proj.bias for proj in heads])
