// The way back over all tokens of one cell (backpropagation through time): from the gradient of hidden states to that
// of the gates' inputs. The weights' gradients are then torch's own matrix products (layer.cpp).
#pragma once
#include "recurrence.h"

namespace {

// dh[r] = dgates[r] W_hh for C blocks of previous hidden units from block j on; W_hh packed (4 U, U), rows in the
// gates' order.
template <int R, int C>
inline void hidden_gradient(const Cell<float>& c, int64_t j, const float* dgates, int64_t ldg, float* dh) {
  const int64_t U = c.blocks * V;
  vf acc[R][C] = {};
  product<R, C>(acc, dgates, ldg, (const float*)c.w_hh + j * V, U, 4 * U);
  for (int r = 0; r < R; ++r)
    for (int k = 0; k < C; ++k) store(dh + r * U + (j + k) * V, acc[r][k]);
}

// One token of one row: gates become their inputs' gradients, dc that of the cell state before. `before`: that cell
// state.
inline void gate_gradients(int64_t blocks, float* gates, const float* states, const float* before, const float* dh,
                           float* dc) {
  for (int64_t j = 0; j < blocks; ++j) {
    float *g = gates + j * 4 * V, *carry = dc + j * V;
    const vf in = load(g), forget = load(g + V), new_ = load(g + 2 * V), out = load(g + 3 * V);
    const vf d = load(dh + j * V), t = tanh_(load(states + j * V));
    const vf cell = load(carry) + d * out * (1.0f - t * t);
    store(g, cell * new_ * in * (1.0f - in));
    store(g + V, cell * load(before + j * V) * forget * (1.0f - forget));
    store(g + 2 * V, cell * in * (1.0f - new_ * new_));
    store(g + 3 * V, d * t * out * (1.0f - out));
    store(carry, cell * forget);
  }
}

// All tokens of R rows, from row `b` of the batch on; p.out holds the gradient of hidden.
template <int R>
void run_back(const Problem<float>& p, const Cell<float>& c, const Kept& kept, int64_t b, int64_t, float* scratch) {
  const int64_t U = c.blocks * V, width = 4 * U, ldg = p.tokens * width, direction = c.reverse ? -1 : 1;
  std::memset(scratch, 0, 3 * R * U * sizeof(float));
  float *dh = scratch, *dc = dh + R * U, *zero = dc + R * U;
  for (int64_t s = p.tokens - 1; s >= 0; --s) {
    const int64_t token = c.reverse ? p.tokens - 1 - s : s;
    float* gates = kept.gates + (b * p.tokens + token) * width;
    for (int r = 0; r < R; ++r) {
      const float* states = kept.states + ((b + r) * p.tokens + token) * U;
      const float* from = p.out + (b + r) * p.out_batch + token * p.out_token + c.column;
      for (int64_t k = 0; k < c.units; ++k) dh[r * U + k] += from[k];
      gate_gradients(c.blocks, gates + r * ldg, states, s > 0 ? states - direction * U : zero, dh + r * U, dc + r * U);
    }
    int64_t j = 0;
    for (; j + 4 <= c.blocks; j += 4) hidden_gradient<R, 4>(c, j, gates, ldg, dh);
    for (; j < c.blocks; ++j) hidden_gradient<R, 1>(c, j, gates, ldg, dh);
  }
}

constexpr Runner<float> BACK[] = {nullptr,
                                  run_back<1>,
                                  run_back<2>,
                                  run_back<3>,
                                  run_back < V == 16 ? 4 : 3 >
                                  , run_back < V == 16 ? 5 : 3 >, run_back < V == 16 ? 6 : 3 > };

}  // namespace
