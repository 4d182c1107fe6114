// softmax(q k^T) v of one head for up to P queries, in float32; q comes scaled. Queries are columns: scores (tokens, P)
// are a product of the keys with the transposed queries as their one panel, the softmax runs down the columns without
// any sum across a vector, and neither keys nor values are copied.
//
//   qkv, a row a token       | q of head 0 | q of head 1 | ... | k of head 0 | ... | v of head 0 | ... |
//   queries (d, P)           panel of one product, column j is query j
//   scores  (tokens, P)      then their exponentials
#pragma once
#include <cstring>

#include "product.h"

namespace {

struct Heads {
  const float* qkv;  // of one image
  int64_t row, tokens, heads, depth;
};

constexpr int QUERIES = V == 16 ? 6 : 3;  // that share what is read of the values

inline int64_t attention_floats(int64_t tokens, int64_t depth) { return (depth + tokens + 3) * P + QUERIES; }

// exp(score - the column's largest) in place; `sums` takes the columns' sums.
inline void softmax_columns(float* scores, int64_t tokens, int64_t columns, float* sums) {
  for (int64_t j = 0; j < columns; j += V) {
    vf top = load(scores + j), total{};
    for (int64_t t = 1; t < tokens; ++t) {
      const vf x = load(scores + t * P + j);
      top = x > top ? x : top;
    }
    for (int64_t t = 0; t < tokens; ++t) {
      const vf x = exp_(load(scores + t * P + j) - top);
      store(scores + t * P + j, x);
      total += x;
    }
    store(sums + j, total);
  }
}

// out[r] = sum over tokens of scores[.][r] v[.], over the column's sum, for `count` queries and up to J vectors of
// channels.
template <int R, int J, class X>
void weigh_values(const float* scores, const Heads& from, const float* v, const float* sums, int64_t count,
                  int64_t channels, X* out, int64_t ldo) {
  vf acc[R][J] = {};
  product<R, J>(acc, scores, 1, v, from.row, from.tokens, P);
  alignas(64) X line[J * V];
  for (int64_t r = 0; r < count; ++r) {
    for (int j = 0; j < J; ++j) store(line + j * V, acc[r][j] / sums[r]);
    std::memcpy(out + r * ldo, line, std::min<int64_t>(channels, J * V) * sizeof(X));
  }
}

// Rows out[first..first + count] of one head, at its channels.
template <class X>
void attend(const Heads& from, int64_t head, int64_t first, int64_t count, X* out, int64_t ldo, float* scratch) {
  const int64_t d = from.depth, dim = from.heads * d, columns = (count + V - 1) / V * V;
  const float *q = from.qkv + first * from.row + head * d, *k = from.qkv + dim + head * d, *v = k + dim;
  float *queries = scratch, *zeros = queries + d * P, *sums = zeros + P, *scores = sums + P;
  std::memset(queries, 0, (d + 1) * P * sizeof(float));
  for (int64_t j = 0; j < count; ++j)
    for (int64_t i = 0; i < d; ++i) queries[i * P + j] = q[j * from.row + i];
  multiply(Rows<float>{k, from.row}, from.tokens, Weights<float>{queries, zeros, d, columns, d * P}, scores, P);
  softmax_columns(scores, from.tokens, columns, sums);
  for (int64_t r = 0; r < count; r += QUERIES)
    for (int64_t i = 0; i < d; i += 4 * V) {
      const auto weigh = d - i > 2 * V ? weigh_values<QUERIES, 4, X> : weigh_values<QUERIES, 2, X>;
      X* to = out + (first + r) * ldo + head * d + i;
      weigh(scores + r, from, v + i, sums + r, std::min<int64_t>(QUERIES, count - r), d - i, to, ldo);
    }
}

}  // namespace
