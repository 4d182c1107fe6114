// A model's natural form (model.h) laid out for this CPU's vectors.
#pragma once
#include <numeric>

#include "checker.h"

namespace {

inline float widened(bf16 x) {
  const uint32_t bits = uint32_t{static_cast<uint16_t>(x)} << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

// X: what products are packed in; From: what they come in.
template <class X, class From>
class Packer : public Packed {
 public:
  // A little more is reserved than comes in: memory that is moved while it grows costs more than packing.
  Packer(const Plan& natural, const float* vectors_from, int64_t vector_count, const void* products_from,
         int64_t product_count)
      : from_vectors(vectors_from), from_products(static_cast<const From*>(products_from)), dim(natural.dim) {
    const auto* numbers = reinterpret_cast<const int64_t*>(&natural);
    plan.assign(numbers, numbers + natural.length);
    vectors.reserve(vector_count * 5 / 4);
    products.reserve(product_count * 5 / 4 * sizeof(X));
    Plan& p = *reinterpret_cast<Plan*>(plan.data());
    p.vector_width = is_q8<X> ? V + SHIFT : V;
    if (!is_q8<X>) p.precision = std::is_same_v<X, bf16> ? BFLOAT16 : FLOAT32;
    vectors.resize(padded(dim));  // zeros lie first
    p.prefix_rows = rows(p.prefix_rows, p.prefix, dim);
    p.positions = rows(p.positions, p.tokens() - p.prefix, dim);
    norm(p.norm);
    map(p.embed);
    map(p.head);
    for (int64_t i = 0; i < p.blocks; ++i) block(record<BlockPlan>(sizeof(Plan) / 8, i));
  }

 private:
  template <class T>
  static int64_t inputs(int64_t n) {
    return GROUP<T> > 1 ? padded(n) : n;
  }

  template <class T, class N>
  static T rounded(N x) {
    if constexpr (std::is_same_v<N, bf16> && !std::is_same_v<T, bf16>)
      return T(widened(x));
    else
      return T(x);
  }

  // A row of the natural form for each packed one, -1 for zeros. Units are padded to whole vectors.
  struct Straight {
    int64_t n;
    int64_t operator()(int64_t i) const { return i < n ? i : -1; }
  };
  struct GateByGate {  // z of all units, then n
    int64_t units, U;
    int64_t operator()(int64_t i) const { return i < 2 * U && i % U < units ? i / U * units + i % U : -1; }
  };
  struct Interleaved {  // four gates of V units, then of the next V
    int64_t units;
    int64_t operator()(int64_t i) const {
      const int64_t unit = i / (4 * V) * V + i % V;
      return unit < units ? i / V % 4 * units + unit : -1;
    }
  };

  int64_t rows(int64_t at, int64_t n, int64_t width) {
    const int64_t place = vectors.size(), each = padded(width);
    vectors.resize(place + n * each);
    for (int64_t r = 0; r < n; ++r)
      std::copy_n(from_vectors + at + r * width, width, vectors.begin() + place + r * each);
    return place;
  }

  void norm(int64_t& at) {
    const float eps = from_vectors[at + 2 * dim];
    at = rows(at, 2, dim);
    vectors.resize(vectors.size() + V);
    vectors[at + 2 * padded(dim)] = eps;
  }

  template <class Order>
  int64_t bias(int64_t at, int64_t n, const Order& order) {
    const int64_t place = vectors.size();
    vectors.resize(place + padded(n));
    for (int64_t i = 0; i < n; ++i)
      if (const int64_t row = order(i); row >= 0) vectors[place + i] = from_vectors[at + row];
    return place;
  }

  // The place, in X, of (n, k) in panels of `panel` outputs, see product.h. T: what they are packed in, N: what they
  // come in.
  template <class T = X, class N = From, class Order>
  int64_t matrix(int64_t at, int64_t n, int64_t k, int64_t panel, const Order& order) {
    const int64_t start = products.size(), depth = inputs<T>(k), panels = (padded(n) + panel - 1) / panel;
    constexpr int64_t EACH = GROUP<T>;
    products.resize(start + panels * panel * depth * sizeof(T));
    std::vector<const N*> rows(panel);
    for (int64_t from = 0; from < n; from += panel) {
      for (int64_t i = 0; i < panel; ++i) {
        const int64_t row = from + i < n ? order(from + i) : -1;
        rows[i] = row < 0 ? nullptr : reinterpret_cast<const N*>(from_products + at) + row * k;
      }
      T* to = reinterpret_cast<T*>(products.data() + start) + from * depth;
      for (int64_t j = 0; j < k; ++j)
        for (int64_t i = 0; i < panel; ++i)
          if (rows[i]) to[(j / EACH * panel + i) * EACH + j % EACH] = rounded<T>(rows[i][j]);
    }
    return start / int64_t(sizeof(X));
  }

  // What sums of (n, k) in int8 begin with, for each `slab` inputs, as integers behind the scales: see dots.h.
  template <class Order>
  void starts(int64_t at, int64_t n, int64_t k, int64_t slab, const Order& order) {
    if constexpr (is_q8<X>)
      for (int64_t from = 0; from < k; from += slab) {
        const int64_t place = vectors.size();
        vectors.resize(place + padded(n));
        for (int64_t i = 0; i < n; ++i)
          if (const int64_t row = order(i); row >= 0) {
            const From* w = from_products + at + row * k;
            const int32_t start = -SHIFT * std::accumulate(w + from, w + std::min(from + slab, k), 0);
            std::memcpy(&vectors[place + i], &start, sizeof start);
          }
      }
  }

  void map(Map& m, int64_t slab = DEEPEST) {
    const Straight order{m.width};
    const int64_t from = m.weights, vectors_at = m.bias;
    m.bias = bias(vectors_at, m.width, order);
    if (m.kept) return void(m.weights = matrix<float, float>(from, m.width, m.depth, P, order));
    m.weights = matrix(from, m.width, m.depth, P, order);
    if (is_q8<X>) bias(vectors_at + m.width, m.width, order);
    starts(from, m.width, m.depth, slab, order);
    m.depth = inputs<X>(m.depth);
  }

  void cell(CellPlan& c, const BlockPlan& b) {
    const int64_t U = (c.units + V - 1) / V * V, width = b.gates * U;
    const bool recurrent = b.gates == 4;
    const auto pack = [&](int64_t panel, const auto& order) {
      const int64_t ih = c.w_ih, hh = c.w_hh, vectors_at = c.bias, outputs = b.gates * c.units;
      c.w_ih = matrix(ih, width, b.depth, panel, order);
      c.bias = bias(vectors_at, width, order);
      if (is_q8<X>)
        for (int64_t i = 1; i <= 1 + recurrent; ++i) bias(vectors_at + i * outputs, width, order);
      starts(ih, width, b.depth, DEEPEST, order);
      if (!recurrent) return;
      c.w_hh =
          c.kept ? matrix<float, float>(hh, width, c.units, width, order) : matrix(hh, width, c.units, width, order);
      if (!c.kept) starts(hh, width, c.units, DEEPEST, order);
    };
    if (recurrent)
      pack(4 * V, Interleaved{c.units});
    else
      pack(P, GateByGate{c.units, U});
  }

  void block(BlockPlan& b) {  // in the order of use, in which products fetch ahead
    norm(b.norm1);
    norm(b.norm2);
    if (b.before.width) map(b.before);
    for (int64_t i = 0; i < b.cell_count; ++i) cell(record<CellPlan>(b.cells, i), b);
    for (int64_t i = 0; i < b.apart_count; ++i) map(record<HeadPlan>(b.apart, i).map);
    map(b.out);
    map(b.fc1);
    map(b.fc2, HIDDEN);
    if (!b.heads) b.depth = inputs<X>(b.depth);
  }

  template <class T>
  T& record(int64_t at, int64_t i) {
    return reinterpret_cast<T*>(plan.data() + at)[i];
  }

  const float* const from_vectors;
  const From* const from_products;
  const int64_t dim;
};

}  // namespace
