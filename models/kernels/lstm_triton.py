"""The recurrence of all heads and directions as Triton kernels (CUDA): imported on first use only, by gpu.py.

One program is one head, one direction and BT rows of the batch; it walks over all N tokens and holds W_hh on chip
meanwhile. U is the padded number of hidden units. Shapes in memory, all contiguous float32:

    inputs, gates   (H, B, N, 2, 4, U)   gates' inputs, activated gates, and their gradients; in the order i, f, g, o
    weight          (H, 2, 4, U, U)      W_hh[g, j, k]: from hidden unit k to gate g of unit j
    hidden, states  (B, N, 2 H, U)
"""

import triton
import triton.language as tl


@triton.jit
def _tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def _rows(B, N, U: tl.constexpr, BT: tl.constexpr):
    """Where a program's rows start: in (H, B, N, 2, 4, U) and in (B, N, 2 H, U), as (BT, U) offsets, and its mask."""
    cell = tl.program_id(0)
    row = tl.program_id(1) * BT + tl.arange(0, BT)
    unit = tl.arange(0, U)[None, :]
    wide = ((cell // 2 * B + row).to(tl.int64) * N * 2 + cell % 2)[:, None] * (4 * U) + unit
    narrow = (row.to(tl.int64) * N * tl.num_programs(0) + cell)[:, None] * U + unit
    return wide, narrow, (row < B)[:, None] & (unit < U)


@triton.jit
def _token(step, N):
    """The token that this program's direction reads at a step: odd cells read from last to first."""
    return tl.where(tl.program_id(0) % 2 == 0, step, N - 1 - step)


@triton.jit
def _load_gates(at, mask, U: tl.constexpr):
    """i, f, g, o of a token, (BT, U) each."""
    i, f = tl.load(at, mask, 0.0), tl.load(at + U, mask, 0.0)
    return i, f, tl.load(at + 2 * U, mask, 0.0), tl.load(at + 3 * U, mask, 0.0)


@triton.jit
def _store_gates(to, mask, i, f, g, o, U: tl.constexpr):
    tl.store(to, i, mask)
    tl.store(to + U, f, mask)
    tl.store(to + 2 * U, g, mask)
    tl.store(to + 3 * U, o, mask)


@triton.jit
def forward(
    inputs,
    weight,
    hidden,
    gates,
    states,
    B,
    N,
    U: tl.constexpr,
    BT: tl.constexpr,
    NEEDS_GRAD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """hidden of all tokens; with NEEDS_GRAD cell states and activated gates too, for `backward`."""
    wide, narrow, mask = _rows(B, N, U, BT)
    step_wide, step_narrow = 8 * U, tl.num_programs(0) * U
    from_unit, to_unit = tl.arange(0, U)[:, None], tl.arange(0, U)[None, :]
    w = weight + tl.program_id(0) * 4 * U * U + to_unit * U + from_unit  # transposed: (k, j)
    w_i, w_f, w_g, w_o = tl.load(w), tl.load(w + U * U), tl.load(w + 2 * U * U), tl.load(w + 3 * U * U)
    h = tl.zeros((BT, U), tl.float32)
    c = tl.zeros((BT, U), tl.float32)
    i, f, g, o = _load_gates(inputs + wide + _token(0, N) * step_wide, mask, U)
    for s in range(0, N):
        ahead = _token(tl.minimum(s + 1, N - 1), N)  # the next token's inputs travel while this one is computed
        next_i, next_f, next_g, next_o = _load_gates(inputs + wide + ahead * step_wide, mask, U)
        i = tl.sigmoid(i + tl.dot(h, w_i, input_precision=PRECISION))
        f = tl.sigmoid(f + tl.dot(h, w_f, input_precision=PRECISION))
        g = _tanh(g + tl.dot(h, w_g, input_precision=PRECISION))
        o = tl.sigmoid(o + tl.dot(h, w_o, input_precision=PRECISION))
        c = f * c + i * g
        h = o * _tanh(c)
        tl.store(hidden + narrow + _token(s, N) * step_narrow, h, mask)
        if NEEDS_GRAD:
            tl.store(states + narrow + _token(s, N) * step_narrow, c, mask)
            _store_gates(gates + wide + _token(s, N) * step_wide, mask, i, f, g, o, U)
        i, f, g, o = next_i, next_f, next_g, next_o


@triton.jit
def backward(
    d_hidden, weight, gates, states, d_inputs, B, N, U: tl.constexpr, BT: tl.constexpr, PRECISION: tl.constexpr
):
    """Backpropagation through time: gradients of the gates' inputs from those of hidden."""
    wide, narrow, mask = _rows(B, N, U, BT)
    step_wide, step_narrow = 8 * U, tl.num_programs(0) * U
    w = weight + tl.program_id(0) * 4 * U * U + tl.arange(0, U)[:, None] * U + tl.arange(0, U)[None, :]  # (j, k)
    w_i, w_f, w_g, w_o = tl.load(w), tl.load(w + U * U), tl.load(w + 2 * U * U), tl.load(w + 3 * U * U)
    d_h = tl.zeros((BT, U), tl.float32)
    d_c = tl.zeros((BT, U), tl.float32)
    for back in range(0, N):
        s = N - 1 - back
        token, before = _token(s, N), _token(s - 1, N)
        i, f, g, o = _load_gates(gates + wide + token * step_wide, mask, U)
        c = tl.load(states + narrow + token * step_narrow, mask, 0.0)
        c_before = tl.load(states + narrow + before * step_narrow, mask & (s > 0), 0.0)
        d_h += tl.load(d_hidden + narrow + token * step_narrow, mask, 0.0)
        t = _tanh(c)
        d_c += d_h * o * (1.0 - t * t)
        d_i, d_f = d_c * g * i * (1.0 - i), d_c * c_before * f * (1.0 - f)
        d_g, d_o = d_c * i * (1.0 - g * g), d_h * t * o * (1.0 - o)
        d_c = d_c * f
        _store_gates(d_inputs + wide + token * step_wide, mask, d_i, d_f, d_g, d_o, U)
        d_h = tl.dot(d_i, w_i, input_precision=PRECISION)
        d_h = tl.dot(d_f, w_f, d_h, input_precision=PRECISION)
        d_h = tl.dot(d_g, w_g, d_h, input_precision=PRECISION)
        d_h = tl.dot(d_o, w_o, d_h, input_precision=PRECISION)
