"""A FAR model for inference: neighbouring linear maps merged where that costs less, weights laid out for the kernel."""

import copy
import sys

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from models import kernels
from models.bilstm import MultiHeadBiLSTM
from utils.errors import FarError

# One large matrix product beats H small ones and a copy until it has this many times their multiplications (measured at
# 197 tokens, D 192: an unpruned layer, 73.7 k against 61.4 k a token, is faster merged).
PATIENCE = 1.25


def frozen(w: Tensor) -> nn.Parameter:
    return nn.Parameter(w.detach().clone(), requires_grad=False)


def refuse_loading(module: nn.Module, *_) -> None:
    """Hook before load_state_dict: merged weights have no names to load by."""
    raise FarError("load_state_dict: this model is fused, its weights are merged; load them before fuse()")


class FusedBiLSTM(nn.Module):
    """The function of a MultiHeadBiLSTM without gradients: x (B, N, D) to (B, N, D).

    pre_proj is merged into the input weights where D * 4 sum(u) < D^2 + d * 4 sum(u); head_proj into post_proj where
    D * sum(u) is at most PATIENCE times d * sum(u) + D^2 (multiplications a token). recurrent: precision of W_hh;
    bfloat16 is faster and rounds hidden states to three digits (FarError where the CPU kernel cannot).

    Where the C++ kernel serves (float32 on a CPU), `weights` are the cells' only copy, packed for it: three
    tensors a cell.
    Such a module stays where it is, and FarError says so. Elsewhere `weights` are those of `kernels.Cell`, four a cell.
    """

    def __init__(self, attn: MultiHeadBiLSTM, recurrent: torch.dtype = torch.float32):
        super().__init__()
        half = recurrent == torch.bfloat16
        if half and not (attn.backend in ("auto", "cpu") and kernels.cpu.has_bfloat16()):
            raise FarError("--fuse bfloat16: needs the C++ kernel on a CPU with AVX512_BF16; use --fuse float32")
        self.dim, self.num_heads, self.backend = attn.dim, attn.num_heads, attn.backend
        self.units = [u for pair in attn.units for u in pair]
        d, total, like = attn.dim // attn.num_heads, sum(self.units), attn.post_proj.weight
        self.merged_pre = attn.dim * 4 * total < attn.dim**2 + d * 4 * total
        self.depth = attn.dim if self.merged_pre else d  # channels that a cell reads
        self.tokens = sys.maxsize  # how many of the first tokens anybody reads
        fits = like.dtype == torch.float32 and like.device.type == "cpu" and self.backend in ("auto", "cpu")
        self.packed = fits and kernels.cpu.available()
        with torch.no_grad():
            weights = [w for h in range(attn.num_heads) for r in (0, 1) for w in self._cell(attn, h, r, d)]
            weights = torch.ops.far.pack(weights, half) if self.packed else weights
            self.weights = nn.ParameterList(map(frozen, weights))
            empty = like.new_empty(0)
            self.pre_w = frozen(empty if self.merged_pre else attn.pre_proj.weight)
            self.pre_b = frozen(empty if self.merged_pre else attn.pre_proj.bias)
            self._merge_out(attn, attn.dim * total <= PATIENCE * (d * total + attn.dim**2))
        self.register_load_state_dict_pre_hook(refuse_loading)

    def _cell(self, attn: MultiHeadBiLSTM, head: int, r: int, d: int) -> kernels.Cell:
        cell = attn.lstm[head][r].cell()
        if not self.merged_pre:
            return cell
        rows = slice(head * d, (head + 1) * d)
        weight = cell.weight_ih @ attn.pre_proj.weight[rows]  # (4 u, D)
        return cell._replace(weight_ih=weight, bias_ih=cell.bias_ih + cell.weight_ih @ attn.pre_proj.bias[rows])

    def _merge_out(self, attn: MultiHeadBiLSTM, merged: bool) -> None:
        """Sets `out_w`, `out_b` and `heads`, the head projections that stay apart (none where merged)."""
        post, heads = attn.post_proj, attn.head_proj
        out_w, out_b = post.weight, post.bias
        if merged:
            parts = post.weight.chunk(attn.num_heads, dim=1)
            out_w = torch.cat([p @ proj.weight for p, proj in zip(parts, heads, strict=True)], dim=1)  # (D, sum u)
            out_b = post.bias + post.weight @ torch.cat([proj.bias for proj in heads])
        self.heads = nn.ModuleList([] if merged else copy.deepcopy(heads)).requires_grad_(False)
        self.out_w, self.out_b = frozen(out_w), frozen(out_b)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if torch.is_grad_enabled() and (x.requires_grad or self.out_w.requires_grad):
            raise FarError("a fused layer has no gradients: take them before fuse(), or call it under torch.no_grad()")
        if self.packed and not self.heads:
            x = self._uncast(x)
            with torch.autocast("cpu", enabled=False):
                return torch.ops.far.layer(
                    x, self.pre_w, self.pre_b, list(self.weights), self.units, self.out_w, self.out_b, self.tokens
                )
        hidden = self._hidden(x)[:, : self.tokens]
        if self.heads:
            widths = [proj.in_features for proj in self.heads]
            hidden = torch.cat(
                [proj(h) for proj, h in zip(self.heads, hidden.split(widths, dim=2), strict=True)], dim=2
            )
        return F.linear(hidden, self.out_w, self.out_b)

    def _hidden(self, x: Tensor) -> Tensor:
        b, n, dim = x.shape
        if self.merged_pre:
            p = x.unsqueeze(2).expand(b, n, self.num_heads, dim)
        else:
            p = F.linear(x, self.pre_w, self.pre_b).view(b, n, self.num_heads, self.depth)
        if self.packed:
            return torch.ops.far.run_packed(self._uncast(p), list(self.weights), self.units)
        cells = [kernels.Cell(*self.weights[i : i + 4]) for i in range(0, len(self.weights), 4)]
        return kernels.compute(self.backend, p, cells)

    def _uncast(self, x: Tensor) -> Tensor:
        """Undoes autocast: the kernel computes in the weights' precision."""
        return x.to(self.out_w.dtype) if torch.is_autocast_enabled("cpu") else x

    def _apply(self, fn, recurse: bool = True):
        moved = fn(self.out_b)
        if self.packed and (moved.dtype, moved.device.type) != (torch.float32, "cpu"):
            raise FarError(
                f"a model fused for the CPU kernel cannot become {moved.dtype} on {moved.device}; "
                f"move it first, then fuse"
            )
        return super()._apply(fn, recurse)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        width = kernels.cpu.load(kernels.cpu.TUNED).vector_width() if self.packed and kernels.cpu.available() else None
        if self.packed and self.weights[2].shape[-1] != width:  # a bias, (1, blocks, 4, V)
            raise FarError("this model was fused on another kind of CPU; load the unfused one and fuse() it here")


class LastBlock(nn.Module):
    """The last block of a classifier that reads the class token alone: once tokens are mixed, only that one goes on.

    x (B, N, D) to (B, 1, D).
    """

    def __init__(self, block: nn.Module):
        super().__init__()
        self.norm1, self.attn, self.ls1 = block.norm1, block.attn, block.ls1
        self.norm2, self.mlp, self.ls2 = block.norm2, block.mlp, block.ls2
        self.attn.tokens = 1

    def forward(self, x: Tensor, **_) -> Tensor:
        x = x[:, :1] + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


def fuse(model: VisionTransformer, recurrent: torch.dtype = torch.float32) -> VisionTransformer:
    """Makes every LSTM block of the model a FusedBiLSTM, in place, and freezes the model in eval mode.

    Its logits stay the same. Where the last block has LSTMs, `forward_features` gives the class token alone, (B, 1, D).
    """
    for block in model.blocks:
        if isinstance(block.attn, MultiHeadBiLSTM):
            block.attn = FusedBiLSTM(block.attn, recurrent)
    if any(isinstance(block.attn, FusedBiLSTM) for block in model.blocks):
        model.register_load_state_dict_pre_hook(refuse_loading)  # before its other parts are written
    if isinstance(model.blocks[-1].attn, FusedBiLSTM) and model.global_pool == "token":
        model.blocks[-1] = LastBlock(model.blocks[-1])
    return model.eval().requires_grad_(False)
