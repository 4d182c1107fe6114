// Matrix products with packed weights: out (rows, n) = bias + a (rows, k) W, accumulators of M rows and three vectors
// in registers.
//
// W lies in panels of P = 3 V outputs, one after the other, so that a product reads memory in order:
//
//   float32   [panel][k][P]          panel 0:  k = 0 | w(0, 0) w(0, 1) ...  w(0, P-1) |
//                                              k = 1 | w(1, 0) w(1, 1) ...  w(1, P-1) |   ... then panel 1
//   bfloat16  [panel][k / 2][P][2]   panel 0:  k = 0, 1 | w(0, 0) w(1, 0)  w(0, 1) w(1, 1) ... |
//   int8      the same, or [panel][k / 4][P][4]: see dots.h
//
// n and, but in float32, k are padded with zeros: neighbouring k are one 32-bit word, in a as in W. Rows of a may lie
// any distance apart. Of int8 a row and a column of W have a scale each, by which their sum is multiplied.
#pragma once
#include <algorithm>
#include <array>
#include <type_traits>
#include <utility>

#include "amx.h"

namespace {

constexpr int C = 3;                                        // vectors in a panel
constexpr int P = C * V;                                    // outputs in a panel
constexpr int MOST = std::max(V == 16 ? 8 : 4, amx::ROWS);  // rows of any tile
constexpr int64_t GRAIN = 2 * V;                            // every width is padded to a multiple of this
constexpr int64_t LINE = 64;                                // bytes that come from memory together
constexpr int64_t HIDDEN = 768;  // hidden units of the MLP between fc1 and fc2 at once, whole panels
static_assert(HIDDEN % P == 0);
constexpr int FETCH = 8;  // lines that one step of AMX fetches ahead: six tiles' worth are a panel

constexpr int64_t padded(int64_t n) { return (n + GRAIN - 1) / GRAIN * GRAIN; }

template <class X>
constexpr bool is_q8 = std::is_same_v<X, q8>;
template <class X>
constexpr int64_t GROUP = 4 / sizeof(X);  // k in a word
// Rows of a tile: M C accumulators, C vectors of W and one of a fill the registers; pairs of 16 bits want one more.
template <class X>
constexpr int M = V == 16                     ? 8
                  : is_q8<X> && GROUP<X> == 2 ? 3
                                              : 4;
template <class X>  // what activations are between products in X
using Stored = std::conditional_t<is_q8<X>, float, X>;
template <class X>
using Sum = std::conditional_t<is_q8<X>, vi, vf>;

// A word of a row for all lanes; V words of W; their products added.
inline vf word(const float* a) { return splat(*a); }
inline vf words(const float* w) { return load(w); }
inline vf add(vf a, vf w, vf sum) { return sum + a * w; }

inline vi word(const q8* a) {
  int32_t four;
  __builtin_memcpy(&four, a, 4);
  return four - vi{};
}
inline vi words(const q8* w) { return load_ints(w); }
inline vi add(vi a, vi w, vi sum) { return add_dots(a, w, sum); }

#if FAR_BFLOAT16
inline __m512bh word(const bf16* a) {
  int32_t both;
  __builtin_memcpy(&both, a, 4);
  return (__m512bh)_mm512_set1_epi32(both);
}
inline __m512bh words(const bf16* w) { return (__m512bh)_mm512_loadu_si512(w); }
inline vf add(__m512bh a, __m512bh w, vf sum) { return (vf)_mm512_dpbf16_ps((__m512)sum, a, w); }
#endif

// acc[r][j] += sum over k of a[r][k] * w[k][j]; w points at J neighbouring vectors, rows `ldw` words apart; the words
// of a row lie `hop` elements apart. depth is a multiple of GROUP.
template <int R, int J, class X>
inline void product(Sum<X> (&acc)[R][J], const X* a, int64_t lda, const X* w, int64_t ldw, int64_t depth,
                    int64_t hop = GROUP<X>) {
  for (int64_t k = 0; k < depth; k += GROUP<X>, w += GROUP<X> * ldw, a += hop) {
    decltype(word(a)) s[R];
    for (int r = 0; r < R; ++r) s[r] = word(a + r * lda);
    for (int j = 0; j < J; ++j) {
      const auto column = words(w + GROUP<X> * j * V);
      for (int r = 0; r < R; ++r) acc[r][j] = add(s[r], column, acc[r][j]);
    }
  }
}

// The same for one panel, few vectors wide: they wait in registers for the rows. Meanwhile memory comes from `ahead`, a
// line each 16 bytes of a row: a core alone fetches too late what lies behind a page's end.
template <int R, int J, class X>
inline void panel_product(Sum<X> (&acc)[R][J], const X* a, int64_t lda, const X* w, int64_t depth, const char* ahead) {
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; k += GROUP<X>, w += GROUP<X> * P, ahead += LINE / 4) {
    __builtin_prefetch(ahead, 0, 2);
    decltype(words(w)) column[J];
    for (int j = 0; j < J; ++j) column[j] = words(w + GROUP<X> * j * V);
    for (int r = 0; r < R; ++r) {
      const auto s = word(a + r * lda + k);
      for (int j = 0; j < J; ++j) acc[r][j] = add(s, column[j], acc[r][j]);
    }
  }
}

// Rows that a product reads; of int8 each has a scale, that of the next `step` further.
template <class X>
struct Rows {
  const X* data;
  int64_t ld;
  const float* scales = nullptr;
  int64_t step = 1;

  Rows from(int64_t row) const { return {data + row * ld, ld, scales ? scales + row * step : nullptr, step}; }
};

// What a product multiplies with: `depth` rows of panels that lie `stride` elements apart, and a bias, that of each row
// `ldb` floats behind the one before. width: a multiple of V. Of int8: scales of the columns, and what their sums begin
// with, for each HIDDEN inputs apart.
template <class X>
struct Weights {
  const X* w;
  const float* bias;
  int64_t depth, width, stride;
  const float *scales = bias, *starts = bias;
  int64_t ldb = 0;

  // Outputs from..from + count, from a multiple of P.
  Weights columns(int64_t from, int64_t count) const {
    return {w + from / P * stride, bias + from,   depth, std::min(count, width - from), stride,
            scales + from,         starts + from, ldb};
  }
  // Inputs from..from + count, from a multiple of HIDDEN.
  Weights rows(int64_t from, int64_t count) const {
    return {w + from * P, bias,   std::min(count, depth - from),  width,
            stride,       scales, starts + from / HIDDEN * width, ldb};
  }
};

// Vector j of what the sums of row r begin with, and of what they mean.
template <class X>
Sum<X> first_sums(const Weights<X>& m, int64_t r, int64_t j) {
  if constexpr (is_q8<X>)
    return load_ints(m.starts + j * V);
  else
    return load(m.bias + r * m.ldb + j * V);
}
template <class X>
vf result(Sum<X> sum, const Rows<X>& a, const Weights<X>& m, int64_t r, int64_t j) {
  if constexpr (is_q8<X>)
    return load(m.bias + r * m.ldb + j * V) +
           __builtin_convertvector(sum, vf) * (a.scales[r * a.step] * load(m.scales + j * V));
  else
    return sum;
}

// bias + a W for R rows and J vectors of one panel.
template <int R, int J, class X>
void tile(const Rows<X>& a, const Weights<X>& m, float* out, int64_t ldo, const char* ahead) {
  Sum<X> acc[R][J];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < J; ++j) acc[r][j] = first_sums(m, r, j);
  panel_product<R, J>(acc, a.data, a.ld, m.w, m.depth, ahead);
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < J; ++j) store(out + r * ldo + j * V, result(acc[r][j], a, m, r, j));
}

template <class X>
using Tile = void (*)(const Rows<X>&, const Weights<X>&, float*, int64_t, const char*);
template <int J, class X, int... R>
constexpr std::array<Tile<X>, M<X> + 1> tiles(std::integer_sequence<int, R...>) {
  return {nullptr, tile<R + 1, J, X>...};
}
template <int J, class X>
constexpr std::array<Tile<X>, M<X> + 1> TILES = tiles<J, X>(std::make_integer_sequence<int, M<X>>());

// Where a tile lies: in rows row..row + count, of which the first `skip` are done already.
struct Part {
  int64_t column, row, skip, count;
  const char* ahead;
};

#if FAR_AMX
template <int J, class X>
void amx_tile(const Rows<X>& a, const Weights<X>& m, float* out, int64_t ldo, const char* ahead) {
  if constexpr (is_q8<X>) {
    amx::block<J, FETCH>(a.data, a.ld, m.w, P, m.depth, m.starts, 0, out, ldo, ahead);
    for (int r = 0; r < amx::ROWS; ++r)
      for (int j = 0; j < J; ++j) {
        float* at = out + r * ldo + j * V;
        store(at, result(load_ints(at), a, m, r, j));
      }
  } else {
    amx::block<J, FETCH>(a.data, a.ld, m.w, P, m.depth, m.bias, m.ldb, out, ldo, ahead);
  }
}

// for_tiles by AMX, for at least one tile's rows. The last tile begins early enough to be whole.
template <class X, class F>
void for_amx_tiles(int64_t rows, const Weights<X>& m, const F& f) {
  constexpr Tile<X> sizes[] = {nullptr, amx_tile<1>, amx_tile<2>, amx_tile<3>};
  const amx::Shapes shapes(amx::ROWS);
  for (int64_t n = 0; n < m.width; n += P) {
    Weights<X> panel = m.columns(n, P);
    const char* next = reinterpret_cast<const char*>(panel.w + m.stride);
    for (int64_t r = 0; r < rows; r += amx::ROWS) {
      const int64_t row = std::min(r, rows - amx::ROWS), part = r / amx::ROWS % (C * amx::ROWS / FETCH);
      panel.bias = m.bias + n + row * m.ldb;
      f(sizes[panel.width / V], panel, {n, row, r - row, amx::ROWS, next + part * FETCH * LINE});
    }
  }
}
#endif

// Calls f(tile, panel, part) for all of a product's tiles: a panel stays in cache while the rows pass. They fetch what
// lies behind it, the next panel or the next product's first: weights are packed in the order of use.
template <class X, class F>
inline void for_tiles(int64_t rows, const Weights<X>& m, const F& f) {
#if FAR_AMX
  if constexpr (!std::is_same_v<X, float>)
    if (rows >= amx::ROWS && amx::here()) return for_amx_tiles(rows, m, f);
#endif
  const int64_t bytes = m.depth * P * sizeof(X),
                each = m.depth * sizeof(X) / 16 * LINE;  // of a panel; fetched by a tile
  const std::array<Tile<X>, M<X> + 1>* sizes[] = {nullptr, &TILES<1, X>, &TILES<2, X>, &TILES<3, X>};
  for (int64_t n = 0; n < m.width; n += P) {
    Weights<X> panel = m.columns(n, P);
    for (int64_t r = 0; r < rows; r += M<X>) {
      const int64_t count = std::min<int64_t>(M<X>, rows - r);
      const char* ahead = reinterpret_cast<const char*>(panel.w + m.stride) + r / M<X> * each % bytes;
      panel.bias = m.bias + n + r * m.ldb;
      f((*sizes[panel.width / V])[count], panel, {n, r, 0, count, ahead});
    }
  }
}

// Calls f(row, column, vector of sums) for all of bias + a W.
template <class X, class F>
void multiply_then(const Rows<X>& a, int64_t rows, const Weights<X>& m, const F& f) {
  alignas(64) float sums[MOST * P];
  for_tiles(rows, m, [&](Tile<X> tile, const Weights<X>& panel, const Part& at) {
    tile(a.from(at.row), panel, sums, P, at.ahead);
    for (int64_t i = at.skip; i < at.count; ++i)
      for (int64_t j = 0; j < panel.width; j += V) f(at.row + i, at.column + j, load(sums + i * P + j));
  });
}

// out (rows, n) = bias + a W.
template <class X>
void multiply(const Rows<X>& a, int64_t rows, const Weights<X>& m, float* out, int64_t ldo) {
  for_tiles(rows, m, [&](Tile<X> tile, const Weights<X>& panel, const Part& at) {
    tile(a.from(at.row), panel, out + at.row * ldo + at.column, ldo, at.ahead);
  });
}

// out (rows, n) += bias + a W.
template <class X>
void multiply_add(const Rows<X>& a, int64_t rows, const Weights<X>& m, float* out, int64_t ldo) {
  multiply_then(a, rows, m, [&](int64_t row, int64_t column, vf sums) {
    float* to = out + row * ldo + column;
    store(to, load(to) + sums);
  });
}

// out (rows, n) = f(bias + a W), rounded to out's type.
template <class X, class Y, class F>
void multiply_into(const Rows<X>& a, int64_t rows, const Weights<X>& m, Y* out, int64_t ldo, const F& f) {
  multiply_then(a, rows, m, [&](int64_t row, int64_t at, vf sums) { store(out + row * ldo + at, f(sums)); });
}

// out (rows, n) = bias + a W in out's type.
template <class X, class Y>
void multiply_to(const Rows<X>& a, int64_t rows, const Weights<X>& m, Y* out, int64_t ldo) {
  if constexpr (std::is_same_v<Y, float>)
    multiply(a, rows, m, out, ldo);
  else
    multiply_into(a, rows, m, out, ldo, [](vf x) { return x; });
}

}  // namespace
