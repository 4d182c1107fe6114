"""The fused CUDA kernel: lstm_triton.py between torch's batched matrix products. Float32, forward and backward."""

import importlib
import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

from models.kernels.cells import LSTM, Cell, CellKind, Task, padded_cell, unpad

LEAST, MOST = 16, 64  # hidden units a cell: tl.dot starts at 16; more than 64 do not stay on chip
ROWS = (4, 8, 16)  # of the batch in one program; more do not fit beside the weights on every chip
# The operators' namespace: torch.hub may import a second copy of this module, which must not redefine them.
SPACE = __name__.replace(".", "_")

INSTALLED = importlib.util.find_spec("triton") is not None  # at import: torch.compile cannot trace find_spec


def interpreting() -> bool:
    """True if TRITON_INTERPRET=1 makes Triton run on the CPU, slowly, for tests."""
    return INSTALLED and importlib.import_module("triton").knobs.runtime.interpret


def refusal(task: Task) -> str:
    """Why Triton cannot do a task; empty where it can."""
    if task.kind is not LSTM:
        return "computes LSTMs alone"
    device = INSTALLED and (task.device.type == "cuda" or interpreting())
    fits = device and task.dtype != torch.float64 and task.units <= MOST
    return "" if fits else f"needs CUDA, Triton, float32 and at most {MOST} units a head"


@torch.library.custom_op(f"{SPACE}::recurrence", mutates_args=())
def recurrence(x: Tensor, w_ih: Tensor, bias: Tensor, w_hh: Tensor, needs_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Heads' tokens (H, B, N, d) to hidden (B, N, 2 H, U), activated gates (H, B, N, 2, 4, U), states as hidden.

    w_ih, bias: (H, 8 U, d), (H, 1, 8 U), rows by direction, then gate; w_hh: (H, 2, 4, U, U).
    Gates and states are for the backward pass and empty without needs_grad.
    """
    kernel = importlib.import_module("models.kernels.lstm_triton")
    inputs = torch.baddbmm(bias, x.flatten(1, 2), w_ih.transpose(1, 2)).view(*x.shape[:3], 2, 4, -1)  # of the gates
    hidden, gates, states = _outputs(x, w_ih, bias, w_hh, needs_grad)
    stored = (gates, states) if needs_grad else (hidden, hidden)  # without NEEDS_GRAD the kernel writes neither
    grid, options = _launch(inputs)
    with torch.cuda.device_of(inputs):
        kernel.forward[grid](inputs, w_hh, hidden, *stored, *hidden.shape[:2], NEEDS_GRAD=needs_grad, **options)
    return hidden, gates, states


@recurrence.register_fake
def _outputs(x: Tensor, w_ih: Tensor, bias: Tensor, w_hh: Tensor, needs_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    heads, batch, tokens, _ = x.shape
    hidden = x.new_empty(batch, tokens, 2 * heads, w_hh.shape[-1])
    gates = x.new_empty((heads, batch, tokens, 2, 4, w_hh.shape[-1]) if needs_grad else 0)
    return hidden, gates, torch.empty_like(hidden) if needs_grad else x.new_empty(0)


@torch.library.custom_op(f"{SPACE}::recurrence_backward", mutates_args=())
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


def _setup(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)  # gates and states have no gradients
    x, w_ih, _, w_hh, _ = inputs
    ctx.save_for_backward(x, w_ih, w_hh, *output)


def _backward(ctx, grad: Tensor, *_):
    x, w_ih, w_hh, hidden, gates, states = ctx.saved_tensors
    needs_x, needs_w, needs_bias, needs_hh, _ = ctx.needs_input_grad
    with torch.autocast(grad.device.type, enabled=False):  # backward may be called inside autocast
        d_inputs = recurrence_backward(grad, w_hh, gates, states)
        flat = d_inputs.flatten(3).flatten(1, 2)  # (H, B N, 8 U)
        return (
            torch.bmm(flat, w_ih).view_as(x) if needs_x else None,
            torch.bmm(flat.transpose(1, 2), x.flatten(1, 2)) if needs_w else None,
            flat.sum(1, keepdim=True) if needs_bias else None,
            _w_hh_gradient(d_inputs, hidden) if needs_hh else None,
            None,
        )


def _w_hh_gradient(d_inputs: Tensor, hidden: Tensor) -> Tensor:
    by_head = hidden.unflatten(2, (-1, 2))  # each token meets the hidden state of the token before it in its direction
    forward = torch.einsum("hbngj,bnhk->hgjk", d_inputs[:, :, 1:, 0], by_head[:, :-1, :, 0])
    reverse = torch.einsum("hbngj,bnhk->hgjk", d_inputs[:, :, :-1, 1], by_head[:, 1:, :, 1])
    return torch.stack([forward, reverse], dim=1)


recurrence.register_autograd(_backward, setup_context=_setup)


def _launch(inputs: Tensor) -> tuple[tuple[int, int], dict]:
    """Grid and constants for gates' inputs (H, B, N, 2, 4, U)."""
    heads, batch, *_, u = inputs.shape
    on_gpu = inputs.device.type == "cuda"
    processors = torch.cuda.get_device_properties(inputs.device).multi_processor_count if on_gpu else 1
    rows = rows_for(batch, 2 * heads, processors)
    precision = precision_on(inputs.device)
    return (2 * heads, -(-batch // rows)), {"U": u, "BT": rows, "PRECISION": precision, **launch_options(u)}


def rows_for(batch: int, cells: int, processors: int) -> int:
    """Rows of the batch in a program: the fewest with which every program still has a multiprocessor of its own.

    A step of few rows is shorter, but no program is worth a second round of them.
    """
    return next((rows for rows in ROWS if cells * -(-batch // rows) <= processors), ROWS[-1])


def launch_options(u: int) -> dict[str, int]:
    """Warps that hold 4 U x U weights without spills; no second stage, whose copies would not fit a small chip."""
    return {"num_warps": 8 if u > 32 else 4, "num_stages": 1}


def tf32_allowed() -> bool:
    """True if torch lets cuDNN's recurrent layers, and so this kernel, use TF32."""
    return torch.backends.cudnn.rnn.fp32_precision == "tf32"


LARGE = 144 * 2**10  # bytes of shared memory that three TF32 products take


def precision_on(device: torch.device) -> str:
    """What tl.dot is asked for: TF32 where torch allows it to cuDNN, which would otherwise compute these LSTMs.

    Else full float32: on tensor cores as three TF32 products where the chip has room for both halves of the weights.
    """
    if tf32_allowed():
        return "tf32"
    large = device.type == "cuda" and torch.cuda.get_device_properties(device).shared_memory_per_block_optin >= LARGE
    return "tf32x3" if large else "ieee"


def fused(kind: CellKind, x: Tensor, cells: Sequence[Cell]) -> Tensor:
    """See `models.kernels`. Cells are padded to one power of two; a padded unit has zero weights and stays zero."""
    u = max(LEAST, 1 << (max(cell.units for cell in cells) - 1).bit_length())
    heads = x.shape[2]
    wide = [padded_cell(cell, u) for cell in cells]
    w_ih, w_hh = (torch.stack(weights) for weights in list(zip(*wide, strict=True))[:2])
    bias = torch.stack([cell.bias_ih for cell in wide]) + torch.stack([cell.bias_hh for cell in wide])
    weights = w_ih.view(heads, 8 * u, -1), bias.view(heads, 1, 8 * u), w_hh.view(heads, 2, 4, u, u)
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights))
    hidden, _, _ = recurrence(x.permute(2, 0, 1, 3).contiguous(), *weights, needs_grad)
    return unpad(hidden, [cell.units for cell in cells])
