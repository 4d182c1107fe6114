// One direction of one head of a minGRU over the tokens of an image: z and n of a few tokens by one product that stays
// in cache, then h += z (n - h) a token at a time.
//
//   gates (token)   | z[U] | n[U] |        U: the cell's units, padded with zeros to whole vectors
#pragma once
#include <cstring>

#include "product.h"

namespace {

constexpr int64_t SCAN = 48;  // tokens whose gates are made at once

inline int64_t scan_floats(int64_t U) { return (2 * SCAN + 1) * U; }

// The first `steps` tokens of `tokens`, from the last one on if `reverse`. Rows of the output lie ldo apart.
template <class X>
void scan_cell(const Weights<X>& w, const Rows<X>& x, int64_t tokens, int64_t steps, bool reverse, int64_t units,
               Stored<X>* out, int64_t ldo, float* scratch) {
  const int64_t width = w.width, U = width / 2;
  float *state = scratch, *gates = scratch + U;
  std::memset(state, 0, U * sizeof(float));
  for (int64_t start = 0; start < steps; start += SCAN) {
    const int64_t count = std::min(SCAN, steps - start), first = reverse ? tokens - start - count : start;
    multiply(x.from(first), count, w, gates, width);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = reverse ? count - 1 - i : i;
      const float* at = gates + row * width;
      Stored<X>* to = out + (first + row) * ldo;
      for (int64_t j = 0; j < U; j += V) {
        const vf h = load(state + j), next = h + sigmoid(load(at + j)) * (load(at + U + j) - h);
        store(state + j, next);
        alignas(64) Stored<X> line[V];
        store(line, next);
        std::memcpy(to + j, line, std::min<int64_t>(V, units - j) * sizeof(*to));
      }
    }
  }
}

}  // namespace
