"""A multi-head bidirectional RNN for inference: neighbouring linear maps merged where that costs less."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import kernels
from models.operations import Operation, recurrence, side_by_side
from utils.errors import FarError

# One large matrix product beats H small ones and a copy until it has this many times their multiplications (measured at
# 197 tokens, D 192: an unpruned layer, 73.7 k against 61.4 k a token, is faster merged).
PATIENCE = 1.25
Map = tuple[Tensor, Tensor]  # weight (out, in) and bias (out,)


@dataclass(frozen=True)
class Merged:
    """The maps of a MultiHeadBiRNN as they are computed, x (B, N, D) to (B, N, D): `pre`, cells, `heads`, `out`.

    pre is None where pre_proj is merged into the cells' input weights, which then read all D channels: where
    D * G sum(u) < D^2 + d * G sum(u), G the gates. `heads` is empty where the head projections are merged into `out`:
    where D * sum(u) is at most PATIENCE times d * sum(u) + D^2 (multiplications a token).
    """

    kind: kernels.CellKind
    backend: str
    num_heads: int
    pre: Map | None
    cells: list[kernels.AnyCell]
    heads: list[Map]
    out: Map


def hooked(*modules: nn.Module) -> bool:
    """True if hooks or a replaced forward change what the modules compute."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any("forward" in vars(module) or any(getattr(module, kind) for kind in kinds) for module in modules)


def plain(*modules: nn.Module) -> bool:
    """True if all are nn.Linear themselves, no subclasses, which may compute something else."""
    return all(type(module) is nn.Linear for module in modules) and not hooked(*modules)


@torch.no_grad()
def merge(attn: nn.Module) -> Merged:
    """The maps of a MultiHeadBiRNN, in its own precision, autocast or not."""
    cells, kind, dim, width = attn.cells(), attn.direction.kind, attn.dim, attn.width
    pre, out = ((proj.weight, proj.bias) for proj in (attn.pre_proj, attn.post_proj))
    heads, total = [(proj.weight, proj.bias) for proj in attn.head_proj], sum(cell.units for cell in cells)
    device = out[0].device.type
    with torch.autocast("cpu" if device == "meta" else device, enabled=False):
        if dim * kind.gates * total < dim**2 + width * kind.gates * total:
            weights, biases = (w.split(width) for w in pre)  # a head's rows of pre_proj
            for k, cell in enumerate(cells):
                bias = cell.bias_ih + cell.weight_ih @ biases[k // 2]
                cells[k] = cell._replace(weight_ih=cell.weight_ih @ weights[k // 2], bias_ih=bias)
            pre = None
        if dim * total <= PATIENCE * (width * total + dim**2):
            weight, bias = out
            columns = zip(weight.split(width, dim=1), heads, strict=True)  # a head's columns of post_proj
            joined = torch.cat([part @ w for part, (w, _) in columns], dim=1)
            heads, out = [], (joined, bias + weight @ torch.cat([b for _, b in heads]))
    return Merged(kind, attn.backend, attn.num_heads, pre, cells, heads, out)


def frozen(*tensors: Tensor) -> nn.ParameterList:
    return nn.ParameterList(nn.Parameter(t.detach().clone(), requires_grad=False) for t in tensors)


def refuse_loading(module: nn.Module, *_) -> None:
    """Hook before load_state_dict: merged weights have no names to load by."""
    raise FarError("load_state_dict: this model is fused, its weights are merged; load them before fuse()")


class MergedBiRNN(nn.Module):
    """The function of merged maps without gradients, by any kernel: x (B, N, D) to (B, N, D)."""

    def __init__(self, maps: Merged):
        super().__init__()
        self.kind, self.backend, self.num_heads = maps.kind, maps.backend, maps.num_heads
        self.pre, self.out = frozen(*(maps.pre or ())), frozen(*maps.out)
        self.cells = nn.ModuleList(frozen(*cell) for cell in maps.cells)
        self.heads = nn.ModuleList(frozen(*head) for head in maps.heads)
        self.register_load_state_dict_pre_hook(refuse_loading)

    def operations(self, tokens: int) -> list[Operation]:
        """See `models.parts.BlockPart`."""

        def maps(name: str, layers: Sequence[nn.ParameterList]) -> Operation:
            biases = tokens * sum(len(bias) for _, bias in layers)
            return side_by_side(name, [weight for weight, _ in layers], tokens, biases)

        pre = [maps("pre_proj", [self.pre])] if self.pre else []
        heads = [maps("head_proj", self.heads)] if self.heads else []
        cells = [self.kind.cell(*cell) for cell in self.cells]
        return [*pre, *recurrence(self.kind, cells, tokens), *heads, maps("post_proj", [self.out])]

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """See `models.parts.Replacement`."""
        if torch.is_grad_enabled() and (x.requires_grad or self.out[0].requires_grad):
            raise FarError("a fused layer has no gradients: take them before fuse(), or call it under torch.no_grad()")
        b, n, dim = x.shape
        h = self.num_heads  # with pre_proj merged each of them reads all of x, which is not copied
        p = F.linear(x, *self.pre).view(b, n, h, dim // h) if self.pre else x.unsqueeze(2).expand(b, n, h, dim)
        hidden = kernels.compute(self.backend, self.kind, p, [self.kind.cell(*cell) for cell in self.cells])
        if self.heads:
            parts = hidden.split([w.shape[1] for w, _ in self.heads], dim=2)
            hidden = torch.cat([F.linear(part, *head) for part, head in zip(parts, self.heads, strict=True)], dim=2)
        return F.linear(hidden, *self.out)
