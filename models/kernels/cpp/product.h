// Matrix products with packed weights: out (rows, n) = bias + a (rows, k) W, accumulators of M rows and three vectors
// in registers.
//
// W lies in panels of P = 3 V outputs, one after the other, so that a product reads memory in order:
//
//   float32   [panel][k][P]          panel 0:  k = 0 | w(0, 0) w(0, 1) ...  w(0, P-1) |
//                                              k = 1 | w(1, 0) w(1, 1) ...  w(1, P-1) |   ... then panel 1
//   bfloat16  [panel][k / 2][P][2]   panel 0:  k = 0, 1 | w(0, 0) w(1, 0)  w(0, 1) w(1, 1) ... |
//
// n and, in bfloat16, k are padded with zeros: a pair is one 32-bit word, in a as in W. Rows of a may lie any distance
// apart.
#pragma once
#include <algorithm>
#include <array>
#include <type_traits>
#include <utility>

#include "amx.h"
#include "vectors.h"

namespace {

constexpr int C = 3;                          // vectors in a panel
constexpr int P = C * V;                      // outputs in a panel
constexpr int M = V == 16 ? 8 : 4;            // rows: M C accumulators, C vectors of W and one of a fill the registers
constexpr int64_t GRAIN = 2 * V;              // every width is padded to a multiple of this
constexpr int64_t LINE = 64;                  // bytes that come from memory together
constexpr int FETCH = 8;                      // lines that one step of AMX fetches ahead: six tiles' worth are a panel
constexpr int MOST = std::max(M, amx::ROWS);  // rows of any tile

constexpr int64_t padded(int64_t n) { return (n + GRAIN - 1) / GRAIN * GRAIN; }

#if FAR_BFLOAT16
inline __m512bh pair(const bf16* p) {
  int32_t both;
  __builtin_memcpy(&both, p, 4);
  return (__m512bh)_mm512_set1_epi32(both);
}
inline vf add_pairs(__m512bh a, __m512bh w, vf sum) { return (vf)_mm512_dpbf16_ps((__m512)sum, a, w); }
#endif

// acc[r][j] += sum over k of a[r][k] * w[k][j]; w points at J neighbouring vectors, rows `ldw` floats apart.
template <int R, int J>
inline void product(vf (&acc)[R][J], const float* a, int64_t lda, const float* w, int64_t ldw, int64_t depth,
                    int64_t hop = 1) {
  for (int64_t k = 0; k < depth; ++k, w += ldw, a += hop) {
    vf s[R];
    for (int r = 0; r < R; ++r) s[r] = splat(a[r * lda]);
    for (int j = 0; j < J; ++j) {
      vf column = load(w + j * V);
      for (int r = 0; r < R; ++r) acc[r][j] += s[r] * column;
    }
  }
}

// The same in bfloat16: half the bytes, and half the instructions. depth is even; ldw counts pairs.
template <int R, int J>
inline void product(vf (&acc)[R][J], const bf16* a, int64_t lda, const bf16* w, int64_t ldw, int64_t depth) {
#if FAR_BFLOAT16
  for (int64_t k = 0; k < depth; k += 2, w += 2 * ldw) {
    __m512bh s[R];
    for (int r = 0; r < R; ++r) s[r] = pair(a + r * lda + k);
    for (int j = 0; j < J; ++j) {
      const __m512bh column = (__m512bh)_mm512_loadu_si512(w + 2 * j * V);
      for (int r = 0; r < R; ++r) acc[r][j] = add_pairs(s[r], column, acc[r][j]);
    }
  }
#endif
}

// The same for one panel, few vectors wide: they wait in registers for the rows. Meanwhile memory comes from `ahead`, a
// line each 16 bytes of a row: a core alone fetches too late what lies behind a page's end.
template <int R, int J>
inline void panel_product(vf (&acc)[R][J], const float* a, int64_t lda, const float* w, int64_t depth,
                          const char* ahead) {
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; ++k, w += P, ahead += LINE / 4) {
    __builtin_prefetch(ahead, 0, 2);
    vf column[J];
    for (int j = 0; j < J; ++j) column[j] = load(w + j * V);
    for (int r = 0; r < R; ++r) {
      const vf s = splat(a[r * lda + k]);
      for (int j = 0; j < J; ++j) acc[r][j] += s * column[j];
    }
  }
}

template <int R, int J>
inline void panel_product(vf (&acc)[R][J], const bf16* a, int64_t lda, const bf16* w, int64_t depth,
                          const char* ahead) {
#if FAR_BFLOAT16
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; k += 2, w += 2 * P, ahead += LINE / 4) {
    __builtin_prefetch(ahead, 0, 2);
    __m512bh column[J];
    for (int j = 0; j < J; ++j) column[j] = (__m512bh)_mm512_loadu_si512(w + 2 * j * V);
    for (int r = 0; r < R; ++r) {
      const __m512bh s = pair(a + r * lda + k);
      for (int j = 0; j < J; ++j) acc[r][j] = add_pairs(s, column[j], acc[r][j]);
    }
  }
#endif
}

// What a product multiplies with: `depth` rows of panels that lie `stride` elements apart, and a bias. width: a
// multiple of V.
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

// bias + a W for R rows and J vectors of one panel. Biases of neighbouring rows lie ldb apart.
template <int R, int J, class X>
void tile(const X* a, int64_t lda, const X* w, int64_t depth, const float* bias, int64_t ldb, float* out, int64_t ldo,
          const char* ahead) {
  vf acc[R][J];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < J; ++j) acc[r][j] = load(bias + r * ldb + j * V);
  panel_product<R, J>(acc, a, lda, w, depth, ahead);
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < J; ++j) store(out + r * ldo + j * V, acc[r][j]);
}

template <class X>
using Tile = void (*)(const X*, int64_t, const X*, int64_t, const float*, int64_t, float*, int64_t, const char*);
template <int J, class X, int... R>
constexpr std::array<Tile<X>, M + 1> tiles(std::integer_sequence<int, R...>) {
  return {nullptr, tile<R + 1, J, X>...};
}
template <int J, class X>
constexpr std::array<Tile<X>, M + 1> TILES = tiles<J, X>(std::make_integer_sequence<int, M>());

// Where a tile lies: in rows row..row + count, of which the first `skip` are done already; `vectors` from `column` on.
template <class X>
struct Part {
  const X* panel;
  int64_t column, vectors, row, skip, count;
  const char* ahead;
};

#if FAR_AMX
template <int J>
void amx_tile(const bf16* a, int64_t lda, const bf16* w, int64_t depth, const float* bias, int64_t ldb, float* out,
              int64_t ldo, const char* ahead) {
  amx::block<J, FETCH>(a, lda, w, P, depth, bias, ldb, out, ldo, ahead);
}

// for_tiles by AMX, for at least one tile's rows. The last tile begins early enough to be whole.
template <class F>
void for_amx_tiles(int64_t rows, const Weights<bf16>& m, const F& f) {
  constexpr Tile<bf16> sizes[] = {nullptr, amx_tile<1>, amx_tile<2>, amx_tile<3>};
  const amx::Shapes shapes(amx::ROWS);
  for (int64_t n = 0; n < m.width; n += P) {
    const int64_t vectors = std::min<int64_t>(C, (m.width - n) / V);
    const bf16* panel = m.w + n / P * m.stride;
    const char* next = reinterpret_cast<const char*>(panel + m.stride);
    for (int64_t r = 0; r < rows; r += amx::ROWS) {
      const int64_t row = std::min(r, rows - amx::ROWS), part = r / amx::ROWS % (C * amx::ROWS / FETCH);
      f(sizes[vectors], {panel, n, vectors, row, r - row, amx::ROWS, next + part * FETCH * LINE});
    }
  }
}
#endif

// Calls f(tile, part) for all of a product's tiles: a panel stays in cache while the rows pass. They fetch what lies
// behind it, the next panel or the next product's first: weights are packed in the order of use.
template <class X, class F>
inline void for_tiles(int64_t rows, const Weights<X>& m, const F& f) {
#if FAR_AMX
  if constexpr (std::is_same_v<X, bf16>)
    if (rows >= amx::ROWS && amx::here()) return for_amx_tiles(rows, m, f);
#endif
  const int64_t bytes = m.depth * P * sizeof(X),
                each = m.depth * sizeof(X) / 16 * LINE;  // of a panel; fetched by a tile
  const std::array<Tile<X>, M + 1>* sizes[] = {nullptr, &TILES<1, X>, &TILES<2, X>, &TILES<3, X>};
  for (int64_t n = 0; n < m.width; n += P) {
    const int64_t vectors = std::min<int64_t>(C, (m.width - n) / V);
    const X* panel = m.w + n / P * m.stride;
    for (int64_t r = 0; r < rows; r += M) {
      const int64_t count = std::min<int64_t>(M, rows - r);
      const char* ahead = reinterpret_cast<const char*>(panel + m.stride) + r / M * each % bytes;
      f((*sizes[vectors])[count], {panel, n, vectors, r, 0, count, ahead});
    }
  }
}

// Calls f(row, column, vector of sums) for all of bias + a W.
template <class X, class F>
void multiply_then(const X* a, int64_t lda, int64_t rows, const Weights<X>& m, const F& f) {
  alignas(64) float sums[MOST * P];
  for_tiles(rows, m, [&](Tile<X> tile, const Part<X>& at) {
    tile(a + at.row * lda, lda, at.panel, m.depth, m.bias + at.column, 0, sums, P, at.ahead);
    for (int64_t i = at.skip; i < at.count; ++i)
      for (int64_t j = 0; j < at.vectors * V; j += V) f(at.row + i, at.column + j, load(sums + i * P + j));
  });
}

// out (rows, n) = bias + a W.
template <class X>
void multiply(const X* a, int64_t lda, int64_t rows, const Weights<X>& m, float* out, int64_t ldo, int64_t ldb = 0) {
  for_tiles(rows, m, [&](Tile<X> tile, const Part<X>& at) {
    const float* bias = m.bias + at.row * ldb + at.column;
    tile(a + at.row * lda, lda, at.panel, m.depth, bias, ldb, out + at.row * ldo + at.column, ldo, at.ahead);
  });
}

// out (rows, n) += bias + a W.
template <class X>
void multiply_add(const X* a, int64_t lda, int64_t rows, const Weights<X>& m, float* out, int64_t ldo) {
  multiply_then(a, lda, rows, m, [&](int64_t row, int64_t column, vf sums) {
    float* to = out + row * ldo + column;
    store(to, load(to) + sums);
  });
}

// out (rows, n) = f(bias + a W), rounded to out's type.
template <class X, class Y, class F>
void multiply_into(const X* a, int64_t lda, int64_t rows, const Weights<X>& m, Y* out, int64_t ldo, const F& f) {
  multiply_then(a, lda, rows, m, [&](int64_t row, int64_t at, vf sums) { store(out + row * ldo + at, f(sums)); });
}

// out (rows, n) = bias + a W in out's type.
template <class X, class Y>
void multiply_to(const X* a, int64_t lda, int64_t rows, const Weights<X>& m, Y* out, int64_t ldo) {
  if constexpr (std::is_same_v<Y, float>)
    multiply(a, lda, rows, m, out, ldo);
  else
    multiply_into(a, lda, rows, m, out, ldo, [](vf x) { return x; });
}

}  // namespace
