"""Cells frozen for inference, laid out as a kernel reads them."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.kernels import cpu
from models.kernels.cells import Cell, CellKind
from utils.errors import FarError


def frozen(w: Tensor) -> nn.Parameter:
    return nn.Parameter(w.detach().clone(), requires_grad=False)


def head_inputs(x: Tensor, pre: Sequence[Tensor], heads: int) -> Tensor:
    """(B, N, D) to what each head reads (B, N, H, d); with an empty `pre` projection all of x, which is not copied."""
    b, n, dim = x.shape
    if not pre[0].numel():
        return x.unsqueeze(2).expand(b, n, heads, dim)
    return F.linear(x, *pre).view(b, n, heads, dim // heads)


class Natural(nn.Module):
    """The weights as they are, for any kernel."""

    def __init__(self, run: Callable, kind: CellKind, cells: Sequence[Cell]):
        super().__init__()
        self.run, self.kind = run, kind
        self.weights = nn.ParameterList(frozen(w) for cell in cells for w in cell)

    def hidden(self, x: Tensor, pre: Sequence[Tensor], heads: int) -> Tensor:
        """Hidden states (B, N, sum u) of x (B, N, D)."""
        p = head_inputs(x, pre, heads)
        cells = [Cell(*self.weights[i : i + 4]) for i in range(0, len(self.weights), 4)]
        with torch.autocast(p.device.type, enabled=False):
            return self.run(self.kind, p.to(cells[0].weight_hh.dtype), cells)

    def layer(self, x: Tensor, pre: Sequence[Tensor], out: Sequence[Tensor], heads: int, tokens: int) -> Tensor:
        """A whole layer without head projections, x (B, N, D) to (B, min(N, tokens), D); an empty `pre` is merged."""
        return F.linear(self.hidden(x, pre, heads)[:, :tokens], *out)


class Packed(nn.Module):
    """The same for the C++ kernel, which then packs nothing: `weights` are the cells' only copy, three tensors a cell.

    It stays where it is, on this kind of CPU; FarError says so.
    """

    def __init__(self, kind: CellKind, cells: Sequence[Cell], half: bool):
        super().__init__()
        self.units = [cell.units for cell in cells]
        self.weights = nn.ParameterList(map(frozen, torch.ops.far.pack([w for cell in cells for w in cell], half)))

    def hidden(self, x: Tensor, pre: Sequence[Tensor], heads: int) -> Tensor:
        return torch.ops.far.run_packed(head_inputs(x, pre, heads).float(), list(self.weights), self.units)

    def layer(self, x: Tensor, pre: Sequence[Tensor], out: Sequence[Tensor], heads: int, tokens: int) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return torch.ops.far.layer(x.float(), *pre, list(self.weights), self.units, *out, tokens)

    def _apply(self, fn, recurse: bool = True):
        moved = fn(self.weights[2])  # a bias: float32 in either precision
        if (moved.dtype, moved.device.type) != (torch.float32, "cpu"):
            target = f"{moved.dtype} on {moved.device}"
            raise FarError(f"a model fused for the CPU kernel cannot become {target}; move it first, then fuse")
        return super()._apply(fn, recurse)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        width = cpu.load(cpu.TUNED).vector_width() if cpu.available() else None
        if self.weights[2].shape[-1] != width:  # a bias, (1, blocks, 4, V)
            raise FarError("this model was fused on another kind of CPU; load the unfused one and fuse() it here")
