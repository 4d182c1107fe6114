// The walk of recurrence.h for a model in bfloat16, by AMX: a time step of up to 16 rows of the batch costs as much as one of
// a single row. Sums are made for all unit blocks, then activated.
//
//   gates   (token of a chunk, row of the batch, width)      input products, to which the recurrent ones are added in place
//   h       (row, U padded to whole tiles' depth) in bfloat16
//   states  (row, U) in float32
#pragma once
#include "recurrence.h"

namespace {

constexpr int TILE_CHUNK = 32;  // tokens whose input products are made at once

inline int64_t tile_walk_floats(int64_t rows, int64_t U) { return (TILE_CHUNK * 4 + 1) * rows * U + rows * padded(U); }

#if FAR_AMX
struct TileWalk {
  const Problem<bf16>& p;
  const Cell<bf16>& c;
  const int64_t b, rows, U, width, depth, direction;  // b: the first row of the batch; depth: of W_hh, padded
  float *const gates, *const states;
  bf16* const h;

  TileWalk(const Problem<bf16>& p, const Cell<bf16>& c, int64_t b, int64_t rows, float* scratch)
      : p(p), c(c), b(b), rows(rows), U(c.blocks * V), width(4 * U), depth(padded(c.units)), direction(c.reverse ? -1 : 1),
        gates(scratch), states(gates + TILE_CHUNK * rows * width), h((bf16*)(states + rows * U)) {
    std::memset(states, 0, rows * U * sizeof(float));
    std::memset(h, 0, rows * depth * sizeof(bf16));
  }

  int64_t token(int64_t step) const { return c.reverse ? p.tokens - 1 - step : step; }

  // Of steps start..start + count, at least a tile's rows. The last tile begins early enough to be whole.
  void inputs(int64_t start, int64_t count) {
    const amx::Shapes shapes(amx::ROWS);
    const int64_t stride = direction * p.token_stride, hop = rows * width;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t t = 0; t < count; t += amx::ROWS) {
        const int64_t from = std::min(t, count - amx::ROWS);
        const bf16* a = p.x + (b + r) * p.batch_stride + token(start + from) * p.token_stride + c.from;
        for (int64_t j = 0; j < c.blocks; ++j)
          amx::block<4, 0>(a, stride, c.w_ih + j * c.panel, c.row, p.depth, c.bias + j * 4 * V, 0,
                           gates + from * hop + r * width + j * 4 * V, hop, nullptr);
      }
  }

  void step(float* at, int64_t token) {
    const bf16* w = (const bf16*)c.w_hh;
    for (int64_t j = 0; j < width; j += 4 * V) amx::block<4, 0>(h, depth, w + 2 * j, width, depth, at + j, width, at + j, width, nullptr);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = 0; j < U; j += V) {
        const float* g = at + r * width + 4 * j;
        vf in[4] = {load(g), load(g + V), load(g + 2 * V), load(g + 3 * V)};
        store(h + r * depth + j, activate(in, states + r * U + j));
      }
      std::memcpy(p.out + (b + r) * p.out_batch + token * p.out_token + c.column, h + r * depth, c.units * sizeof(bf16));
    }
  }

  void run(int64_t steps) {
    for (int64_t done = 0; done < steps;) {
      const int64_t count = std::min<int64_t>(TILE_CHUNK, steps - done);
      // Where less than a tile is left, tokens before or behind fill it.
      const int64_t short_of = std::max<int64_t>(0, amx::ROWS - count), start = std::max<int64_t>(0, done - short_of);
      inputs(start, std::max<int64_t>(count, amx::ROWS));
      const amx::Shapes shapes(rows);
      for (int64_t s = done; s < done + count; ++s) step(gates + (s - start) * rows * width, token(s));
      done += count;
    }
  }
};
#endif

}  // namespace
