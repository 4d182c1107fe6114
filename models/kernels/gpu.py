"""The fused CUDA kernel: lstm_triton.py between torch's batched matrix products. Float32, forward and backward.

FlashRNN (arXiv 2412.07752, package flashrnn) was studied for this part. It too keeps W_hh on chip, but takes heads
of one size (a power of two), compiles anew for each batch size and sequence length, and reads one direction: the other
needs a flipped copy.
"""

import importlib
import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

from models.kernels.cells import LSTM, Cell, CellKind, Task
from models.kernels.stock import padded_cell, unpad

LEAST, MOST = 16, 64  # hidden units a cell: tl.dot starts at 16; more than 64 do not stay on chip
ROWS = 16  # of the batch in one program, the least that tl.dot takes


def interpreting() -> bool:
    """Whether TRITON_INTERPRET=1 makes Triton run on the CPU, slowly: for tests."""
    return bool(importlib.util.find_spec("triton")) and importlib.import_module("triton").knobs.runtime.interpret


def refusal(task: Task) -> str:
    """Why Triton cannot do a task; empty where it can."""
    if task.kind != LSTM:
        return "computes LSTMs"
    device = importlib.util.find_spec("triton") and (task.device.type == "cuda" or interpreting())
    fits = bool(device) and task.dtype != torch.float64 and task.units <= MOST
    return "" if fits else f"needs CUDA, Triton, float32 and at most {MOST} units a head"


@torch.library.custom_op("far_triton::recurrence", mutates_args=())
def recurrence(inputs: Tensor, w_hh: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gates' inputs (H, B, N, 2, 4, U) and W_hh (H, 2, 4, U, U) to hidden (B, N, 2 H, U).

    keep: activated gates and cell states besides, for the way back; empty without.
    """
    kernel = importlib.import_module("models.kernels.lstm_triton")
    hidden, gates, states = _outputs(inputs, w_hh, keep)
    kept = (gates, states) if keep else (hidden, hidden)  # never touched
    grid, options = _launch(inputs)
    with torch.cuda.device_of(inputs):
        kernel.forward[grid](inputs, w_hh, hidden, *kept, *hidden.shape[:2], KEEP=keep, **options)
    return hidden, gates, states


@recurrence.register_fake
def _outputs(inputs: Tensor, w_hh: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    heads, batch, tokens, _, _, u = inputs.shape
    hidden = inputs.new_empty(batch, tokens, 2 * heads, u)
    empty = inputs.new_empty(0), inputs.new_empty(0)
    return hidden, *((torch.empty_like(inputs), torch.empty_like(hidden)) if keep else empty)


@torch.library.custom_op("far_triton::recurrence_backward", mutates_args=())
def recurrence_backward(grad: Tensor, w_hh: Tensor, gates: Tensor, states: Tensor) -> Tensor:
    """Gradients of the gates' inputs from those of hidden, (B, N, 2 H, U) to (H, B, N, 2, 4, U)."""
    kernel = importlib.import_module("models.kernels.lstm_triton")
    d_inputs = torch.empty_like(gates)
    grid, options = _launch(gates)
    with torch.cuda.device_of(grad):
        kernel.backward[grid](grad.contiguous(), w_hh, gates, states, d_inputs, *states.shape[:2], **options)
    return d_inputs


@recurrence_backward.register_fake
def _gradient(grad: Tensor, w_hh: Tensor, gates: Tensor, states: Tensor) -> Tensor:
    return torch.empty_like(gates)


def _keep(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)  # nobody differentiates gates and states
    ctx.save_for_backward(inputs[1], *output)


def _backward(ctx, grad: Tensor, *_):
    w_hh, hidden, gates, states = ctx.saved_tensors
    d_inputs = recurrence_backward(grad, w_hh, gates, states)
    if not ctx.needs_input_grad[1]:
        return d_inputs, None, None
    by_head = hidden.unflatten(2, (-1, 2))  # (B, N, H, 2, U): each token met the hidden state of the one before
    forward = torch.einsum("hbngj,bnhk->hgjk", d_inputs[:, :, 1:, 0], by_head[:, :-1, :, 0])
    reverse = torch.einsum("hbngj,bnhk->hgjk", d_inputs[:, :, :-1, 1], by_head[:, 1:, :, 1])
    return d_inputs, torch.stack([forward, reverse], dim=1), None


recurrence.register_autograd(_backward, setup_context=_keep)


def _launch(inputs: Tensor) -> tuple[tuple[int, int], dict]:
    """Grid and constants for gates' inputs (H, B, N, 2, 4, U)."""
    heads, batch, *_, u = inputs.shape
    return (2 * heads, -(-batch // ROWS)), {"U": u, "BT": ROWS, "PRECISION": precision(), **launch_options(u)}


def launch_options(u: int) -> dict[str, int]:
    """Warps that hold 4 U x U weights without spills; no second stage, whose copies would not fit a small chip."""
    return {"num_warps": 8 if u > 32 else 4, "num_stages": 1}


def precision() -> str:
    """TF32 where torch allows it to cuDNN, which would otherwise compute these LSTMs."""
    return "tf32" if torch.backends.cudnn.allow_tf32 else "ieee"


def fused(kind: CellKind, x: Tensor, cells: Sequence[Cell]) -> Tensor:
    """See `models.kernels`. Cells are padded to one power of two; a padded unit has zero weights and stays zero."""
    units = [cell.units for cell in cells]
    u = max(LEAST, 1 << (max(units) - 1).bit_length())
    batch, tokens, heads, _ = x.shape
    wide = [padded_cell(cell, u) for cell in cells]
    w_ih, w_hh = (torch.stack(weights) for weights in list(zip(*wide, strict=True))[:2])
    bias = torch.stack([cell.bias_ih + cell.bias_hh for cell in wide])
    by_head = x.permute(2, 0, 1, 3).flatten(1, 2)  # (H, B N, d)
    inputs = torch.baddbmm(bias.view(heads, 1, 8 * u), by_head, w_ih.view(heads, 8 * u, -1).transpose(1, 2))
    inputs, w_hh = inputs.view(heads, batch, tokens, 2, 4, u), w_hh.view(heads, 2, 4, u, u)
    keep = torch.is_grad_enabled() and (inputs.requires_grad or w_hh.requires_grad)
    return unpad(recurrence(inputs, w_hh, keep)[0], units)
