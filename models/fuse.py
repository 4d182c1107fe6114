"""A FAR model for inference: neighbouring linear maps merged where that costs less, weights laid out for the kernel."""

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


class FusedBiLSTM(nn.Module):
    """The function of a MultiHeadBiLSTM without gradients: x (B, N, D) to (B, N, D).

    pre_proj is merged into the input weights where D * 4 sum(u) < D^2 + d * 4 sum(u); head_proj into post_proj where
    D * sum(u) is at most PATIENCE times d * sum(u) + D^2 (multiplications a token). recurrent: precision of W_hh; bfloat16 is
    faster and rounds hidden states to three digits (FarError where the CPU kernel cannot).
    """

    def __init__(self, attn: MultiHeadBiLSTM, recurrent: torch.dtype = torch.float32):
        super().__init__()
        if recurrent == torch.bfloat16 and not (attn.backend in ("auto", "cpu") and kernels.cpu.has_bfloat16()):
            raise FarError("--fuse bfloat16: needs the C++ kernel on a CPU with AVX512_BF16; use --fuse float32")
        self.dim, self.num_heads, self.backend = attn.dim, attn.num_heads, attn.backend
        d, total = attn.dim // attn.num_heads, sum(map(sum, attn.units))
        self.merged_pre = attn.dim * 4 * total < attn.dim**2 + d * 4 * total
        self.merged_out = attn.dim * total <= PATIENCE * (d * total + attn.dim**2)
        self.widths = [sum(pair) for pair in attn.units]
        with torch.no_grad():
            cells = [self._cell(attn, h, r, d) for h in range(attn.num_heads) for r in (0, 1)]
            self.cells = nn.ParameterList(frozen(w) for cell in cells for w in cell)
            empty = attn.pre_proj.weight.new_empty(0)
            self.pre_w = frozen(empty if self.merged_pre else attn.pre_proj.weight)
            self.pre_b = frozen(empty if self.merged_pre else attn.pre_proj.bias)
            post, heads = attn.post_proj, attn.head_proj
            if self.merged_out:
                parts = post.weight.split(d, dim=1)
                out_w = torch.cat([p @ proj.weight for p, proj in zip(parts, heads, strict=True)], dim=1)  # (D, sum u)
                out_b = post.bias + post.weight @ torch.cat([proj.bias for proj in heads])
                self.heads = nn.ModuleList()
            else:
                out_w, out_b = post.weight, post.bias
                self.heads = nn.ModuleList(heads)
            self.out_w, self.out_b = frozen(out_w), frozen(out_b)
        self.tokens = sys.maxsize  # how many of the first tokens anybody reads
        self.packed = None
        if out_w.dtype == torch.float32 and out_w.device.type == "cpu" and self.backend in ("auto", "cpu") and kernels.cpu.available():
            self.packed = kernels.cpu.pack(self._cells(), recurrent=recurrent)

    def _cell(self, attn: MultiHeadBiLSTM, head: int, r: int, d: int) -> kernels.Cell:
        cell = attn.lstm[head][r].cell()
        if not self.merged_pre:
            return cell
        rows = slice(head * d, (head + 1) * d)
        weight = cell.weight_ih @ attn.pre_proj.weight[rows]  # (4 u, D)
        return cell._replace(weight_ih=weight, bias_ih=cell.bias_ih + cell.weight_ih @ attn.pre_proj.bias[rows])

    def _cells(self) -> list[kernels.Cell]:
        return [kernels.Cell(*list(self.cells)[i : i + 4]) for i in range(0, len(self.cells), 4)]

    @torch.no_grad()
    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        kernel_fits = self.packed is not None and x.dtype == torch.float32 and x.device.type == "cpu"
        if kernel_fits and self.merged_out:
            return kernels.cpu.load().layer(x, self.pre_w, self.pre_b, *self.packed, self.out_w, self.out_b, self.tokens)
        b, n, dim = x.shape
        if self.merged_pre:
            p = x.unsqueeze(2).expand(b, n, self.num_heads, dim)
        else:
            p = F.linear(x, self.pre_w, self.pre_b).view(b, n, self.num_heads, -1)
        if kernel_fits:
            hidden = kernels.cpu.run(p, self.packed)
        else:
            cells = self._cells()
            hidden = kernels.KERNELS[kernels.choose(self.backend, p, max(c.weight_hh.shape[1] for c in cells))](p, cells)
        hidden = hidden[:, : self.tokens]
        if not self.merged_out:
            hidden = torch.cat([proj(h) for proj, h in zip(self.heads, hidden.split(self.widths, dim=2), strict=True)], dim=2)
        return F.linear(hidden, self.out_w, self.out_b)


class LastBlock(nn.Module):
    """The last block of a classifier that reads nothing but the class token: once tokens are mixed, only that one goes on.

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
    if isinstance(model.blocks[-1].attn, FusedBiLSTM) and model.global_pool == "token":
        model.blocks[-1] = LastBlock(model.blocks[-1])
    return model.eval().requires_grad_(False)
