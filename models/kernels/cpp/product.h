// Matrix products with packed weights: out (rows, n) = bias + a (rows, k) W, accumulators of M rows and four vectors in registers.
//
// W lies in panels of P = 4 V outputs, one after the other, so that a product reads memory in order:
//
//   float32   [panel][k][P]          panel 0:  k = 0 | w(0, 0) w(0, 1) ...  w(0, P-1) |
//                                              k = 1 | w(1, 0) w(1, 1) ...  w(1, P-1) |   ... then panel 1
//   bfloat16  [panel][k / 2][P][2]   panel 0:  k = 0, 1 | w(0, 0) w(1, 0)  w(0, 1) w(1, 1) ... |
//
// n and, in bfloat16, k are padded with zeros: a pair is one 32-bit word, in a as in W. Rows of a may lie any distance apart.
#pragma once
#include <algorithm>
#include <type_traits>

#include "vectors.h"

namespace {

constexpr int P = 4 * V;                 // outputs in a panel
constexpr int M = V == 16 ? 6 : 3;       // rows, as many as the registers hold
constexpr int64_t GRAIN = P / 2;         // every width is padded to a multiple of this

constexpr int64_t padded(int64_t n) { return (n + GRAIN - 1) / GRAIN * GRAIN; }

// acc[r][j] += sum over k of a[r][k] * w[k][j]; w points at C neighbouring vectors, rows `ldw` floats apart.
template <int R, int C>
inline void product(vf (&acc)[R][C], const float* a, int64_t lda, const float* w, int64_t ldw, int64_t depth, int64_t hop = 1) {
  for (int64_t k = 0; k < depth; ++k, w += ldw, a += hop) {
    vf s[R];
    for (int r = 0; r < R; ++r) s[r] = splat(a[r * lda]);
    for (int j = 0; j < C; ++j) {
      vf column = load(w + j * V);
      for (int r = 0; r < R; ++r) acc[r][j] += s[r] * column;
    }
  }
}

// The same in bfloat16: half the bytes, and half the instructions. depth is even; ldw counts pairs.
template <int R, int C>
inline void product(vf (&acc)[R][C], const bf16* a, int64_t lda, const bf16* w, int64_t ldw, int64_t depth) {
#if FAR_BFLOAT16
  for (int64_t k = 0; k < depth; k += 2, w += 2 * ldw) {
    __m512bh s[R];
    for (int r = 0; r < R; ++r) {
      int32_t pair;
      __builtin_memcpy(&pair, a + r * lda + k, 4);
      s[r] = (__m512bh)_mm512_set1_epi32(pair);
    }
    for (int j = 0; j < C; ++j) {
      __m512bh column = (__m512bh)_mm512_loadu_si512(w + 2 * j * V);
      for (int r = 0; r < R; ++r) acc[r][j] = (vf)_mm512_dpbf16_ps((__m512)acc[r][j], s[r], column);
    }
  }
#endif
}

// What a product multiplies with: `depth` rows of panels that lie `stride` elements apart, and a bias of padded width.
template <class X>
struct Weights {
  const X* w;
  const float* bias;
  int64_t depth, width, stride;

  // Outputs from..from + count, from a multiple of P.
  Weights columns(int64_t from, int64_t count) const {
    return {w + from / P * stride, bias + from, depth, std::min(count, width - from), stride};
  }
  // Inputs from..from + count.
  Weights rows(int64_t from, int64_t count) const {
    return {w + from * P, bias, std::min(count, depth - from), width, stride};
  }
};

// R rows and C vectors of one panel. ADD: out is added to, else written. Biases of neighbouring rows lie ldb apart.
template <bool ADD, int R, int C, class X>
void tile(const X* a, int64_t lda, const X* w, int64_t depth, const float* bias, int64_t ldb, float* out, int64_t ldo) {
  vf acc[R][C];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < C; ++j) acc[r][j] = load(bias + r * ldb + j * V);
  product<R, C>(acc, a, lda, w, P, depth);
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < C; ++j) {
      float* to = out + r * ldo + j * V;
      store(to, ADD ? acc[r][j] + load(to) : acc[r][j]);
    }
}

template <class X>
using Tile = void (*)(const X*, int64_t, const X*, int64_t, const float*, int64_t, float*, int64_t);
template <bool ADD, int C, class X>
constexpr Tile<X> TILES[] = {nullptr, tile<ADD, 1, C, X>, tile<ADD, 2, C, X>, tile<ADD, 3, C, X>,
                             tile<ADD, V == 16 ? 4 : 3, C, X>, tile<ADD, V == 16 ? 5 : 3, C, X>, tile<ADD, V == 16 ? 6 : 3, C, X>};

// Calls f(tile, panel's column, first row, rows) for all of a product's tiles: a panel stays in cache while the rows pass.
template <bool ADD, class X, class F>
inline void for_tiles(int64_t rows, const Weights<X>& m, const F& f) {
  for (int64_t n = 0; n < m.width; n += P) {
    const Tile<X>* tiles = m.width - n > P / 2 ? TILES<ADD, 4, X> : TILES<ADD, 2, X>;
    for (int64_t r = 0; r < rows; r += M) {
      const int64_t count = std::min<int64_t>(M, rows - r);
      f(tiles[count], n, r, count);
    }
  }
}

// out (rows, n) = bias + a W, or with ADD out += that. Writes padded(n) columns.
template <bool ADD, class X>
void multiply(const X* a, int64_t lda, int64_t rows, const Weights<X>& m, float* out, int64_t ldo, int64_t ldb = 0) {
  for_tiles<ADD>(rows, m, [&](Tile<X> tile, int64_t n, int64_t r, int64_t) {
    tile(a + r * lda, lda, m.w + n / P * m.stride, m.depth, m.bias + r * ldb + n, ldb, out + r * ldo + n, ldo);
  });
}

// out (rows, n) = f(bias + a W), rounded to out's type. Writes padded(n) columns.
template <class X, class Y, class F>
void multiply_into(const X* a, int64_t lda, int64_t rows, const Weights<X>& m, Y* out, int64_t ldo, const F& f) {
  alignas(64) float sums[M * P];
  for_tiles<false>(rows, m, [&](Tile<X> tile, int64_t n, int64_t r, int64_t count) {
    tile(a + r * lda, lda, m.w + n / P * m.stride, m.depth, m.bias + n, 0, sums, P);
    const int64_t columns = m.width - n > P / 2 ? P : P / 2;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = 0; j < columns; j += V) store(out + (r + i) * ldo + n + j, f(load(sums + i * P + j)));
  });
}

// out (rows, n) = bias + a W in out's type.
template <class X, class Y>
void multiply_to(const X* a, int64_t lda, int64_t rows, const Weights<X>& m, Y* out, int64_t ldo) {
  if constexpr (std::is_same_v<Y, float>)
    multiply<false>(a, lda, rows, m, out, ldo);
  else
    multiply_into(a, lda, rows, m, out, ldo, [](vf x) { return x; });
}

}  // namespace
