// The walk of recurrence.h for a model in bfloat16, by AMX: products of up to 16 rows of the batch cost as much as
// those of a single row. Sums are made for all unit blocks, then activated.
//
//   gates   (token of a chunk, row of the batch, width)   input products, the recurrent ones added in place
//   h       (row, U padded to whole tiles' depth) in bfloat16
//   states  (row, U) in float32
#pragma once
#include "recurrence.h"

namespace {

constexpr int TILE_CHUNK = 32;  // tokens whose input products are made at once

inline int64_t tile_walk_floats(int64_t rows, int64_t U) { return (TILE_CHUNK * 4 + 1) * rows * U + rows * padded(U); }

#if FAR_AMX
struct TileWalk {
  static constexpr int LENGTH = TILE_CHUNK;
  struct Steps : amx::Shapes {
    explicit Steps(const TileWalk& walk) : Shapes(walk.rows) {}
  };
  const Problem<bf16>& p;
  const Cell<bf16>& c;
  const int64_t b, rows, U, width, depth;  // b: the first row of the batch; depth: of W_hh, padded
  float *const gates, *const states;
  bf16* const h;
  int64_t first = 0, skipped = 0;  // the step that the chunk begins with, and its steps that are done already

  TileWalk(const Problem<bf16>& p, const Cell<bf16>& c, int64_t b, int64_t rows, float* scratch)
      : p(p),
        c(c),
        b(b),
        rows(rows),
        U(c.blocks * V),
        width(4 * U),
        depth(padded(c.units)),
        gates(scratch),
        states(gates + TILE_CHUNK * rows * width),
        h((bf16*)(states + rows * U)) {
    std::memset(states, 0, rows * U * sizeof(float));
    std::memset(h, 0, rows * depth * sizeof(bf16));
  }

  // Where less than a tile's tokens are left, those before or behind fill it.
  void inputs(int64_t start, int64_t count) {
    first = std::max<int64_t>(0, start - std::max<int64_t>(0, amx::ROWS - count));
    skipped = start - first;
    whole_tiles(std::max<int64_t>(count, amx::ROWS));
  }

  void token(int64_t t) {
    const bf16* w = (const bf16*)c.w_hh;
    float* at = gates + (skipped + t) * rows * width;
    for (int64_t j = 0; j < width; j += 4 * V)
      amx::block<4, 0>(h, depth, w + 2 * j, width, depth, at + j, width, at + j, width, nullptr);
    bf16* out = p.out + b * p.out_batch + place(first + skipped + t) * p.out_token + c.column;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = 0; j < U; j += V) {
        const float* g = at + r * width + 4 * j;
        vf in[4] = {load(g), load(g + V), load(g + 2 * V), load(g + 3 * V)};
        store(h + r * depth + j, activate(in, states + r * U + j));
      }
      std::memcpy(out + r * p.out_batch, h + r * depth, c.units * sizeof(bf16));
    }
  }

 private:
  int64_t place(int64_t step) const { return c.reverse ? p.tokens - 1 - step : step; }

  // Input products of `count` steps from `first` on, at least a tile's rows. The last tile begins early enough to be
  // whole.
  void whole_tiles(int64_t count) {
    const amx::Shapes shapes(amx::ROWS);
    const int64_t stride = c.reverse ? -p.token_stride : p.token_stride, hop = rows * width;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t t = 0; t < count; t += amx::ROWS) {
        const int64_t from = std::min(t, count - amx::ROWS);
        const bf16* a = p.x + (b + r) * p.batch_stride + place(first + from) * p.token_stride + c.from;
        for (int64_t j = 0; j < c.blocks; ++j)
          amx::block<4, 0>(a, stride, c.w_ih + j * c.panel, c.row, p.depth, c.bias + j * 4 * V, 0,
                           gates + from * hop + r * width + j * 4 * V, hop, nullptr);
      }
  }
};
#endif

}  // namespace
