"""The fused CUDA kernel: lstm_triton.py between torch's batched matrix products. Float32, forward and backward."""

import functools
import importlib
import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

from models.kernels.cells import LSTM, Cell, CellKind, Task
from models.kernels.stock import padded_cell, unpad

LEAST, MOST = 16, 64  # hidden units a cell: tl.dot starts at 16; more than 64 do not stay on chip
ROWS = (4, 8, 16)  # of the batch in one program; more do not fit beside the weights on every chip
# Of the operators: torch.hub may bring a second copy of this module, whose operators must not take the place of ours.
SPACE = __name__.replace(".", "_")
NOTHING, STATES, ALL = 0, 1, 2  # what is kept for the way back: cell states, or activated gates as well


INSTALLED = importlib.util.find_spec("triton") is not None  # asked once: torch.compile cannot trace the question


def interpreting() -> bool:
    """Whether TRITON_INTERPRET=1 makes Triton run on the CPU, slowly: for tests."""
    return INSTALLED and importlib.import_module("triton").knobs.runtime.interpret


def refusal(task: Task) -> str:
    """Why Triton cannot do a task; empty where it can."""
    if task.kind != LSTM:
        return "computes LSTMs"
    device = INSTALLED and (task.device.type == "cuda" or interpreting())
    fits = device and task.dtype != torch.float64 and task.units <= MOST
    return "" if fits else f"needs CUDA, Triton, float32 and at most {MOST} units a head"


@torch.library.custom_op(f"{SPACE}::recurrence", mutates_args=())
def recurrence(x: Tensor, w_ih: Tensor, bias: Tensor, w_hh: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """Heads' tokens (H, B, N, d) to hidden (B, N, 2 H, U), activated gates (H, B, N, 2, 4, U), states as hidden.

    w_ih, bias: (H, 8 U, d), (H, 1, 8 U), rows by direction, then gate; w_hh: (H, 2, 4, U, U). keep: NOTHING, STATES or
    ALL; what is not kept is empty.
    """
    kernel = importlib.import_module("models.kernels.lstm_triton")
    inputs = _inputs(x, w_ih, bias)
    hidden, gates, states = _outputs(x, w_ih, bias, w_hh, keep)
    kept = (gates if keep == ALL else hidden, states if keep else hidden)  # what is not kept is never touched
    grid, options = _launch(inputs)
    with torch.cuda.device_of(inputs):
        kernel.forward[grid](inputs, w_hh, hidden, *kept, *hidden.shape[:2], KEEP=keep, **options)
    return hidden, gates, states


@recurrence.register_fake
def _outputs(x: Tensor, w_ih: Tensor, bias: Tensor, w_hh: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    heads, batch, tokens, _ = x.shape
    hidden = x.new_empty(batch, tokens, 2 * heads, w_hh.shape[-1])
    gates = x.new_empty((heads, batch, tokens, 2, 4, w_hh.shape[-1]) if keep == ALL else 0)
    return hidden, gates, torch.empty_like(hidden) if keep else x.new_empty(0)


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


def _inputs(x: Tensor, w_ih: Tensor, bias: Tensor) -> Tensor:
    """The gates' inputs (H, B, N, 2, 4, U), from the tokens alone."""
    return torch.baddbmm(bias, x.flatten(1, 2), w_ih.transpose(1, 2)).view(*x.shape[:3], 2, 4, -1)


def _met(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The hidden states (B, N - 1, H, U) that tokens met: forward all but the first, backward all but the last."""
    by_head = hidden.unflatten(2, (-1, 2))
    return by_head[:, :-1, :, 0], by_head[:, 1:, :, 1]


def _gates(x: Tensor, w_ih: Tensor, bias: Tensor, w_hh: Tensor, hidden: Tensor) -> Tensor:
    """Activated gates where hidden states are known: one product of all tokens, no recurrence."""
    gates, (forward, reverse) = _inputs(x, w_ih, bias), _met(hidden)
    gates[:, :, 1:, 0] += torch.einsum("bnhk,hgjk->hbngj", forward, w_hh[:, 0])
    gates[:, :, :-1, 1] += torch.einsum("bnhk,hgjk->hbngj", reverse, w_hh[:, 1])
    gates[..., :2, :].sigmoid_()
    gates[..., 2, :].tanh_()
    gates[..., 3, :].sigmoid_()
    return gates


def _keep(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)  # nobody differentiates gates and states
    *tensors, ctx.keep = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, grad: Tensor, *_):
    x, w_ih, bias, w_hh, hidden, gates, states = ctx.saved_tensors
    needs_x, needs_w, needs_bias, needs_hh, _ = ctx.needs_input_grad
    with torch.autocast(grad.device.type, enabled=False):  # alike where it is called inside autocast
        gates = gates if ctx.keep == ALL else _gates(x, w_ih, bias, w_hh, hidden)
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
    forward, reverse = _met(hidden)
    found = (
        torch.einsum("hbngj,bnhk->hgjk", d_inputs[:, :, 1:, 0], forward),
        torch.einsum("hbngj,bnhk->hgjk", d_inputs[:, :, :-1, 1], reverse),
    )
    return torch.stack(found, dim=1)


recurrence.register_autograd(_backward, setup_context=_keep)


def _launch(inputs: Tensor) -> tuple[tuple[int, int], dict]:
    """Grid and constants for gates' inputs (H, B, N, 2, 4, U)."""
    heads, batch, *_, u = inputs.shape
    rows = rows_for(batch, 2 * heads, processors(inputs.device))
    precision = precision_on(inputs.device)
    return (2 * heads, -(-batch // rows)), {"U": u, "BT": rows, "PRECISION": precision, **launch_options(u)}


def processors(device: torch.device) -> int:
    """That run programs side by side."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def rows_for(batch: int, cells: int, processors: int) -> int:
    """Rows of the batch in a program: the fewest with which every program still has a multiprocessor of its own.

    A step of few rows is shorter, but no program is worth a second round of them.
    """
    return next((rows for rows in ROWS if cells * -(-batch // rows) <= processors), ROWS[-1])


def launch_options(u: int) -> dict[str, int]:
    """Warps that hold 4 U x U weights without spills; no second stage, whose copies would not fit a small chip."""
    return {"num_warps": 8 if u > 32 else 4, "num_stages": 1}


def tf32_allowed() -> bool:
    """To cuDNN's recurrent layers, and so to what takes their place."""
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


def fused(kind: CellKind, x: Tensor, cells: Sequence[Cell], keep: int = ALL) -> Tensor:
    """See `models.kernels`. Cells are padded to one power of two; a padded unit has zero weights and stays zero.

    keep: for the way back, beside hidden. ALL: 5 numbers a hidden unit and token. STATES: 1, and the gates are computed
    again, which takes less memory than all of it in bfloat16 and rounds nothing more.
    """
    u = max(LEAST, 1 << (max(cell.units for cell in cells) - 1).bit_length())
    heads = x.shape[2]
    wide = [padded_cell(cell, u) for cell in cells]
    w_ih, w_hh = (torch.stack(weights) for weights in list(zip(*wide, strict=True))[:2])
    bias = torch.stack([cell.bias_ih for cell in wide]) + torch.stack([cell.bias_hh for cell in wide])
    weights = w_ih.view(heads, 8 * u, -1), bias.view(heads, 1, 8 * u), w_hh.view(heads, 2, 4, u, u)
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights))
    hidden, _, _ = recurrence(x.permute(2, 0, 1, 3).contiguous(), *weights, keep if learns else NOTHING)
    return unpad(hidden, [cell.units for cell in cells])


lean = functools.partial(fused, keep=STATES)
