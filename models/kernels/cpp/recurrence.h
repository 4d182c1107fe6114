// One direction of one head, a cell, over all tokens of a few rows of the batch. The input products of a few tokens go
// to a buffer that stays in cache, then the recurrence walks over them: accumulators of all four gates live in
// registers.
//
// A cell's u units lie in blocks of V, padded with zeros to U = blocks V. For each unit block the four gates follow one
// another, so that one step reads memory in order:
//
//   gates (token)   | block 0: i[V] f[V] g[V] o[V] | block 1: ... |                      width = 4 U floats
//   W_hh            (u, width); in bfloat16 and int8 a word's rows side by side, as (u / 2 rounded up, width, 2)
//   W_ih            (depth, width), or in panels of one block each, (blocks, depth, 4 V): see product.h
//   bias            (width); in int8 then the columns' scales, of W_ih and of W_hh, and what the sums of both begin
//   with
//
// Hidden states lie within one, so those of a product in int8 have one scale.
#pragma once
#include <cstring>
#include <optional>
#include <utility>

#include "product.h"

namespace {

constexpr int CHUNK = 24;                // tokens whose input products are made at once
constexpr int INPUTS = V == 16 ? 6 : 3;  // and how many of them share what is read of W_ih
constexpr int TOGETHER = 3;              // cells that one task walks together at most
constexpr int TILE = V == 16 ? 6 : 3;    // rows of the batch that one task walks

// X: what W_ih is stored in; W_hh in what its reader calls H.
template <class X>
struct Cell {
  const X* w_ih;
  const void* w_hh;
  const float* bias;  // (width)
  int64_t units, blocks, reverse;
  int64_t from, column;  // its first input channel and its first column of the output
  int64_t row, panel;    // words from one k of W_ih to the next, and elements from one unit block to the next

  // Unit block j of the bias, or of the i-th row behind it.
  const float* vectors(int i, int64_t j) const { return bias + (i * blocks + j) * 4 * V; }
};

// X: what the input is read in; scales: of all tokens, in int8. Strides in elements.
template <class X>
struct Problem {
  const X* x;
  Stored<X>* out;
  int64_t tokens, depth, batch_stride, token_stride, out_batch, out_token;
  const float* scales = nullptr;
};

// What training keeps of one cell: gates (B, N, 4 U) and cell states (B, N, U), tokens in place. Backward writes the
// gates' gradients over the gates.
struct Kept {
  float *gates, *states;
};

// The state of R rows between two tokens. h and h_new are what the recurrence reads and writes, in W_hh's type; out is
// the new hidden state in float32 (h_new itself where they are); kept, in training, takes the cell states.
struct State {
  float *h, *h_new, *out, *cell, *kept;
  int64_t ldk;
  bool last;
};

// R rows of input products, all unit blocks: out[r] = bias + a[r] W_ih.
template <int R, class X>
void input_rows(const Cell<X>& c, const Rows<X>& a, int64_t depth, float* out, int64_t ldo) {
  for (int64_t j = 0; j < c.blocks; ++j) {
    const Weights<X> m{c.w_ih + j * c.panel, c.vectors(0, j), depth, 4 * V, 0, c.vectors(1, j), c.vectors(3, j)};
    Sum<X> acc[R][4];
    for (int r = 0; r < R; ++r)
      for (int g = 0; g < 4; ++g) acc[r][g] = first_sums(m, r, g);
    product<R, 4>(acc, a.data, a.ld, m.w, c.row, depth);
    for (int r = 0; r < R; ++r)
      for (int g = 0; g < 4; ++g) store(out + r * ldo + (j * 4 + g) * V, result(acc[r][g], a, m, r, g));
  }
}

// Activates a unit block's gates in place, takes the cell state a token further and gives the hidden state.
inline vf activate(vf (&gate)[4], float* cell) {
  for (const int g : {0, 1, 3}) gate[g] = sigmoid(gate[g]);
  gate[2] = tanh_(gate[2]);
  const vf next = gate[1] * load(cell) + gate[0] * gate[2];
  store(cell, next);
  return gate[3] * tanh_(next);
}

// One time step of J unit blocks from block j on, for R rows. KEEP: the activated gates take the place of their inputs.
template <int R, int J, bool KEEP, class H, class X>
inline void step(const Cell<X>& c, int64_t j, float* gates, int64_t ldg, const State& s) {
  constexpr int64_t G = GROUP<H>;
  constexpr bool FLOAT = std::is_same_v<H, float>;
  static constexpr float STATE = 1.0f / STEPS;
  const int64_t width = c.blocks * 4 * V, U = c.blocks * V, depth = (c.units + G - 1) / G * G;
  const Rows<H> h{(const H*)s.h, G * U, &STATE, 0};
  const Weights<H> m{
      (const H*)c.w_hh + G * j * 4 * V, gates + j * 4 * V, depth, J * 4 * V, 0, c.vectors(2, j), c.vectors(4, j), ldg};
  Sum<H> acc[R][J * 4];
  for (int r = 0; r < R; ++r)
    for (int g = 0; g < J * 4; ++g) acc[r][g] = first_sums(m, r, g);
  if (FLOAT && R == 1 && !KEEP &&
      s.last)  // every other token from the last row to the first: what the cache still holds of W_hh first
    product<R, J * 4>(acc, h.data + depth - 1, h.ld, m.w + (depth - 1) * width, -width, depth, -1);
  else
    product<R, J * 4>(acc, h.data, h.ld, m.w, width, depth);
  const auto activate_all = [&](vf(&sums)[R][J* 4]) {
    for (int r = 0; r < R; ++r)
      for (int b = 0; b < J; ++b) {
        const int64_t at = r * U + (j + b) * V;
        vf(&gate)[4] = reinterpret_cast<vf(&)[4]>(sums[r][b * 4]);
        const vf hidden = activate(gate, s.cell + at);
        store(s.out + at, hidden);
        if constexpr (!FLOAT) store((H*)(s.h_new + r * U) + (j + b) * V, is_q8<H> ? hidden * STEPS : hidden);
        if constexpr (KEEP) {
          for (int g = 0; g < 4; ++g) store(gates + r * ldg + ((j + b) * 4 + g) * V, gate[g]);
          store(s.kept + r * s.ldk + (j + b) * V, load(s.cell + at));
        }
      }
  };
  if constexpr (is_q8<H>) {
    vf sums[R][J * 4];
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (int g = 0; g < J * 4; ++g) sums[r][g] = result(acc[r][g], h, m, r, g);
    activate_all(sums);
  } else {
    activate_all(acc);
  }
}

// Floats of scratch that a walk over R rows needs.
inline int64_t walk_floats(int64_t rows, int64_t U, bool keep) {
  return (keep ? 0 : rows * CHUNK * 4 * U) + 4 * rows * U;
}

// A walk of one cell over the tokens of R rows of the batch, from row `b` on: `inputs` of a chunk, then its tokens one
// by one.
template <int R, bool KEEP, class H, class X>
struct Walk {
  struct Steps {  // what must live while tokens are walked: nothing
    explicit Steps(const Walk&) {}
  };
  static constexpr int LENGTH = CHUNK;
  static constexpr int J =
      R == 1 ? (V == 16 ? 4 : 2) : 1;  // unit blocks at once: as many accumulators as the registers hold
  const Problem<X>& p;
  const Cell<X>& c;
  const Kept& kept;
  const int64_t b, U, width, direction, ldg, hop;
  float* const buffer;
  State state;
  int64_t first = 0;       // the token the chunk starts with
  float* gates = nullptr;  // its input products

  Walk(const Problem<X>& p, const Cell<X>& c, const Kept& kept, int64_t b, float* scratch)
      : p(p),
        c(c),
        kept(kept),
        b(b),
        U(c.blocks * V),
        width(4 * U),
        direction(c.reverse ? -1 : 1),
        ldg((KEEP ? p.tokens : CHUNK) * width),
        hop(KEEP ? direction * width : width),
        buffer(scratch) {
    float* h = scratch + (KEEP ? 0 : R * CHUNK * width);
    std::memset(h, 0, 4 * R * U * sizeof(float));
    if (is_q8<H>) std::memset(h, SHIFT, 2 * R * U * sizeof(float));
    state = {h, h + R * U, h + 3 * R * U, h + 2 * R * U, nullptr, p.tokens * U, false};
  }

  void inputs(int64_t start, int64_t count) {
    first = c.reverse ? p.tokens - 1 - start : start;
    gates = KEEP ? kept.gates + (b * p.tokens + first) * width : buffer;
    const int64_t stride = direction * p.token_stride;
    for (int r = 0; r < R; ++r) {
      const int64_t row = (b + r) * p.tokens + first;
      const Rows<X> a{p.x + (b + r) * p.batch_stride + first * p.token_stride + c.from, stride,
                      p.scales ? p.scales + row : nullptr, direction};
      float* to = gates + r * ldg;
      int64_t t = 0;
      for (; t + INPUTS <= count; t += INPUTS) input_rows<INPUTS>(c, a.from(t), p.depth, to + t * hop, hop);
      for (; t < count; ++t) input_rows<1>(c, a.from(t), p.depth, to + t * hop, hop);
    }
  }

  void token(int64_t t) {
    const int64_t token = first + direction * t;
    float* at = gates + t * hop;
    if (std::is_same_v<H, float>) state.out = state.h_new;
    if (KEEP) state.kept = kept.states + (b * p.tokens + token) * U;
    int64_t j = 0;
    for (; j + J <= c.blocks; j += J) step<R, J, KEEP, H>(c, j, at, ldg, state);
    if (J > 2 && j + 2 <= c.blocks) step<R, (J > 2 ? 2 : 1), KEEP, H>(c, j, at, ldg, state), j += 2;
    for (; j < c.blocks; ++j) step<R, 1, KEEP, H>(c, j, at, ldg, state);
    const float* hidden = std::is_same_v<Stored<X>, float> ? state.out : state.h_new;
    for (int r = 0; r < R; ++r)
      std::memcpy(p.out + (b + r) * p.out_batch + token * p.out_token + c.column, hidden + r * U,
                  c.units * sizeof(*p.out));
    std::swap(state.h, state.h_new);
    state.last = !state.last;
  }
};

// Walks `count` cells together, steps[i] tokens of the i-th, each in its own direction: while one waits for its last
// token another has work. make(i) gives a walk.
template <class W, class F>
void walk_together(int64_t count, const int64_t* steps, const F& make) {
  std::optional<W> walks[TOGETHER];
  for (int64_t i = 0; i < count; ++i) make(walks[i], i);
  const int64_t longest = *std::max_element(steps, steps + count);
  for (int64_t start = 0; start < longest; start += W::LENGTH) {
    for (int64_t i = 0; i < count; ++i)
      if (start < steps[i]) walks[i]->inputs(start, std::min<int64_t>(W::LENGTH, steps[i] - start));
    [[maybe_unused]] const typename W::Steps begin{*walks[0]};
    for (int64_t t = 0; t < std::min<int64_t>(W::LENGTH, longest - start); ++t)
      for (int64_t i = 0; i < count; ++i)
        if (start + t < steps[i]) walks[i]->token(t);
  }
}

// The first `steps` tokens of one cell.
template <int R, bool KEEP, class H, class X>
void run(const Problem<X>& p, const Cell<X>& c, const Kept& kept, int64_t b, int64_t steps, float* scratch) {
  using W = Walk<R, KEEP, H, X>;
  walk_together<W>(1, &steps, [&](std::optional<W>& walk, int64_t) { walk.emplace(p, c, kept, b, scratch); });
}

template <class X>
using Runner = void (*)(const Problem<X>&, const Cell<X>&, const Kept&, int64_t, int64_t, float*);
template <bool KEEP, class H, class X>
constexpr Runner<X> RUN[] = {nullptr,
                             run<1, KEEP, H, X>,
                             run<2, KEEP, H, X>,
                             run<3, KEEP, H, X>,
                             run<(V == 16 ? 4 : 3), KEEP, H, X>,
                             run<(V == 16 ? 5 : 3), KEEP, H, X>,
                             run<(V == 16 ? 6 : 3), KEEP, H, X>};

}  // namespace
