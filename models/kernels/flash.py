"""FlashRNN (arXiv 2412.07752), where its package is installed: a candidate of --lstm-backend auto on CUDA, not our own.

It takes heads of one size and reads forward alone: cells are padded to a power of two, and those that go backward read
their tokens from the last to the first. It has not run on a GPU here: `auto` checks it before it takes it.
"""

import functools
import importlib
import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

from models.kernels.cells import LSTM, Cell, CellKind, Task
from models.kernels.stock import padded_cell, unpad

BACKEND = "triton_fused"  # of FlashRNN's; `vanilla` is in plain torch and runs anywhere, for tests
LEAST, MOST = 16, 128  # hidden units a cell


@torch.compiler.assume_constant_result
@functools.cache
def installed() -> bool:
    return bool(importlib.util.find_spec("flashrnn"))


def refusal(task: Task) -> str:
    """Why FlashRNN cannot do a task; empty where it can."""
    if task.kind != LSTM:
        return "computes LSTMs"
    device = task.device.type == "cuda" or BACKEND == "vanilla"
    fits = device and installed() and task.dtype != torch.float64 and task.units <= MOST
    return "" if fits else f"needs CUDA, the package flashrnn, float32 and at most {MOST} units a head"


def turned(tensor: Tensor) -> Tensor:
    """(B, N, H, 2, m), the tokens of the second direction from the last to the first."""
    return torch.stack([tensor[:, :, :, 0], tensor[:, :, :, 1].flip(1)], dim=3)


def fused(kind: CellKind, x: Tensor, cells: Sequence[Cell]) -> Tensor:
    """See `models.kernels`."""
    flashrnn = importlib.import_module("flashrnn").flashrnn
    u = max(LEAST, 1 << (max(cell.units for cell in cells) - 1).bit_length())
    wide = [padded_cell(cell, u) for cell in cells]
    w_ih, w_hh = (torch.stack(weights).unflatten(1, (4, u)) for weights in list(zip(*wide, strict=True))[:2])
    bias = torch.stack([(cell.bias_ih + cell.bias_hh).view(4, u) for cell in wide], dim=1)  # (4, 2 H, u)
    tokens = turned(x[:, :, :, None].expand(-1, -1, -1, 2, -1)).flatten(2, 3)  # (B, N, 2 H, d)
    inputs = torch.einsum("bnkd,kgud->bngku", tokens, w_ih).contiguous()
    dtype = str(x.dtype).removeprefix("torch.")
    states, _ = flashrnn(inputs, w_hh.transpose(0, 1), bias, function="lstm", backend=BACKEND, dtype=dtype)
    hidden = turned(states[0].unflatten(2, (-1, 2))).flatten(2, 3)  # (B, N, 2 H, u)
    return unpad(hidden, [cell.units for cell in cells])
