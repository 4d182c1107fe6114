// Multi-head bidirectional LSTM for inference on a CPU, float32. One task is one head, one direction and a tile of the batch;
// tasks run in parallel over torch's threads. Within a task the input product of a few tokens is computed into a buffer that
// stays in cache, then the recurrence walks over them: accumulators of all four gates live in registers.
//
// Packed weights: [k][unit block][gate i, f, g, o][V], so that a step reads memory in order. Vectors are GCC's (and clang's)
// portable ones: the compiler's flags make them AVX-512, AVX2 or whatever the machine has.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int V = 16;
#else
constexpr int V = 8;
#endif
typedef float vf __attribute__((vector_size(V * 4)));
typedef int vi __attribute__((vector_size(V * 4)));
typedef vf vf_u __attribute__((aligned(4)));

constexpr int CHUNK = 24;  // tokens whose input products are made at once

inline vf load(const float* p) { return *reinterpret_cast<const vf_u*>(p); }
inline void store(float* p, vf x) { *reinterpret_cast<vf_u*>(p) = x; }
inline vf splat(float x) { return x - vf{}; }

// exp by 2^n times a polynomial (Cephes); relative error below 2e-7. A NaN fails both comparisons and passes through.
inline vf exp_(vf x) {
  x = x > 88.0f ? splat(88.0f) : x;
  x = x < -87.0f ? splat(-87.0f) : x;
  const float magic = 12582912.0f;  // adding it rounds to an integer
  vf n = (x * 1.44269504088896341f + magic) - magic;
  vf r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  vi bits = (__builtin_convertvector(n, vi) + 127) << 23;
  return p * reinterpret_cast<vf&>(bits);
}
inline vf sigmoid(vf x) { return 1.0f / (1.0f + exp_(-x)); }
inline vf tanh_(vf x) { return 2.0f / (1.0f + exp_(-2.0f * x)) - 1.0f; }

// acc[r][j] += sum over k of a[r][k] * w[k][j]; w points at J * 4 neighbouring vectors, rows `ldw` floats apart.
template <int R, int J>
inline void product(vf (&acc)[R][J * 4], const float* a, int64_t lda, const float* w, int64_t ldw, int64_t depth) {
  for (int64_t k = 0; k < depth; ++k, w += ldw) {
    vf s[R];
    for (int r = 0; r < R; ++r) s[r] = splat(a[r * lda + k]);
    for (int j = 0; j < J * 4; ++j) {
      vf column = load(w + j * V);
      for (int r = 0; r < R; ++r) acc[r][j] += s[r] * column;
    }
  }
}

struct Cell {
  const float *w_ih, *w_hh, *bias;  // packed: (d, 4 U), (u, 4 U), (4 U)
  int64_t units, blocks, head, reverse, column;
};

// R rows of input products, all unit blocks: out[r] = bias + a[r] W_ih.
template <int R>
void input_rows(const Cell& c, const float* a, int64_t lda, int64_t depth, float* out) {
  const int64_t width = c.blocks * 4 * V;
  for (int64_t j = 0; j < c.blocks; ++j) {
    vf acc[R][4];
    for (int r = 0; r < R; ++r)
      for (int g = 0; g < 4; ++g) acc[r][g] = load(c.bias + (j * 4 + g) * V);
    product<R, 1>(acc, a, lda, c.w_ih + j * 4 * V, width, depth);
    for (int r = 0; r < R; ++r)
      for (int g = 0; g < 4; ++g) store(out + r * width + (j * 4 + g) * V, acc[r][g]);
  }
}

// One time step of J unit blocks from block j on, for R rows: gates, cell state, new hidden state.
template <int R, int J>
inline void step(const Cell& c, int64_t j, const float* gates, int64_t ldg, const float* h, float* h_new, float* state) {
  const int64_t width = c.blocks * 4 * V, U = c.blocks * V;
  vf acc[R][J * 4];
  for (int r = 0; r < R; ++r)
    for (int g = 0; g < J * 4; ++g) acc[r][g] = load(gates + r * ldg + j * 4 * V + g * V);
  product<R, J>(acc, h, U, c.w_hh + j * 4 * V, width, c.units);
  for (int r = 0; r < R; ++r)
    for (int b = 0; b < J; ++b) {
      float* at = state + r * U + (j + b) * V;
      vf cell = sigmoid(acc[r][b * 4 + 1]) * load(at) + sigmoid(acc[r][b * 4]) * tanh_(acc[r][b * 4 + 2]);
      store(at, cell);
      store(h_new + r * U + (j + b) * V, sigmoid(acc[r][b * 4 + 3]) * tanh_(cell));
    }
}

struct Problem {
  const float* x;
  float* out;
  int64_t tokens, depth, batch_stride, token_stride, head_stride, out_width;
};

// All tokens of one cell for R rows of the batch, from row `b` on.
template <int R>
void run(const Problem& p, const Cell& c, int64_t b, std::vector<float>& scratch) {
  constexpr int J = R == 1 ? (V == 16 ? 4 : 2) : 1;  // as many accumulators as the registers hold
  const int64_t U = c.blocks * V, width = 4 * U;
  scratch.assign(R * CHUNK * width + 3 * R * U, 0.0f);
  float *gates = scratch.data(), *h = gates + R * CHUNK * width, *h_new = h + R * U, *state = h_new + R * U;
  const int64_t ldg = CHUNK * width;
  const int64_t stride = c.reverse ? -p.token_stride : p.token_stride;
  for (int64_t start = 0; start < p.tokens; start += CHUNK) {
    const int64_t count = std::min<int64_t>(CHUNK, p.tokens - start);
    const int64_t first = c.reverse ? p.tokens - 1 - start : start;
    for (int r = 0; r < R; ++r) {
      const float* a = p.x + (b + r) * p.batch_stride + first * p.token_stride + c.head * p.head_stride;
      float* to = gates + r * ldg;
      int64_t t = 0;
      constexpr int M = V == 16 ? 6 : 3;
      for (; t + M <= count; t += M) input_rows<M>(c, a + t * stride, stride, p.depth, to + t * width);
      for (; t < count; ++t) input_rows<1>(c, a + t * stride, stride, p.depth, to + t * width);
    }
    for (int64_t t = 0; t < count; ++t) {
      int64_t j = 0;
      for (; j + J <= c.blocks; j += J) step<R, J>(c, j, gates + t * width, ldg, h, h_new, state);
      if (J > 2 && j + 2 <= c.blocks) step<R, (J > 2 ? 2 : 1)>(c, j, gates + t * width, ldg, h, h_new, state), j += 2;
      for (; j < c.blocks; ++j) step<R, 1>(c, j, gates + t * width, ldg, h, h_new, state);
      std::swap(h, h_new);
      const int64_t token = c.reverse ? first - t : first + t;
      for (int r = 0; r < R; ++r)
        std::memcpy(p.out + ((b + r) * p.tokens + token) * p.out_width + c.column, h + r * U, c.units * sizeof(float));
    }
  }
}

using Runner = void (*)(const Problem&, const Cell&, int64_t, std::vector<float>&);
constexpr int TILE = V == 16 ? 6 : 3;
constexpr Runner RUNNERS[] = {nullptr, run<1>, run<2>, run<3>, run<4>, run<5>, run<6>};

// x (B, N, H, d), last dimension contiguous; packed weights, three a cell; units of each cell. Returns (B, N, sum u).
at::Tensor forward(const at::Tensor& x, at::TensorList packed, at::IntArrayRef units) {
  TORCH_CHECK(x.dim() == 4 && x.scalar_type() == at::kFloat && x.stride(3) == 1, "x must be (B, N, H, d), float32, d contiguous");
  TORCH_CHECK((int64_t)units.size() == 2 * x.size(2) && packed.size() == 3 * units.size(), "three packed tensors a cell, 2 H cells");
  std::vector<Cell> cells;
  int64_t total = 0;
  for (size_t k = 0; k < units.size(); ++k) {
    const int64_t blocks = (units[k] + V - 1) / V, width = 4 * V * blocks;
    TORCH_CHECK(packed[3 * k].numel() == x.size(3) * width && packed[3 * k + 1].numel() == units[k] * width, "weights of another size");
    cells.push_back({packed[3 * k].const_data_ptr<float>(), packed[3 * k + 1].const_data_ptr<float>(),
                     packed[3 * k + 2].const_data_ptr<float>(), units[k], blocks, (int64_t)k / 2, (int64_t)k % 2, total});
    total += units[k];
  }
  at::Tensor out = at::empty({x.size(0), x.size(1), total}, x.options());
  const Problem p{x.const_data_ptr<float>(), out.mutable_data_ptr<float>(), x.size(1), x.size(3),
                  x.stride(0), x.stride(1), x.stride(2), total};
  struct Task { size_t cell; int64_t row, rows, cost; };
  std::vector<Task> tasks;
  const int64_t batch = x.size(0), tiles = (batch + TILE - 1) / TILE;
  for (size_t k = 0; k < cells.size(); ++k)
    for (int64_t i = 0; i < tiles; ++i) {  // rows shared out evenly: 8 is 4 + 4, not 6 + 2
      const int64_t from = batch * i / tiles, to = batch * (i + 1) / tiles;
      tasks.push_back({k, from, to - from, (to - from) * units[k] * (units[k] + x.size(3))});
    }
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.cost > b.cost; });
  std::atomic<size_t> next{0};
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), tasks.size());
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    std::vector<float> scratch;
    for (size_t i; (i = next++) < tasks.size();) RUNNERS[tasks[i].rows](p, cells[tasks[i].cell], tasks[i].row, scratch);
  });
  return out;
}

// A whole layer: x (B, N, D) to (B, N, D), with the two projections around the LSTMs as torch's own matrix products.
// An empty pre_w means that it was merged into the input weights; then every head reads all D channels.
at::Tensor layer(const at::Tensor& x, const at::Tensor& pre_w, const at::Tensor& pre_b, at::TensorList packed, at::IntArrayRef units,
                 const at::Tensor& out_w, const at::Tensor& out_b) {
  const int64_t heads = units.size() / 2, b = x.size(0), n = x.size(1);
  at::Tensor p = pre_w.numel() ? at::linear(x, pre_w, pre_b).view({b, n, heads, -1})
                               : x.contiguous().unsqueeze(2).expand({b, n, heads, x.size(2)});
  return at::linear(forward(p, packed, units), out_w, out_b);
}

}  // namespace

TORCH_LIBRARY(FAR_NAMESPACE, m) {
  m.def("forward(Tensor x, Tensor[] packed, int[] units) -> Tensor", &forward);
  m.def("layer(Tensor x, Tensor pre_w, Tensor pre_b, Tensor[] packed, int[] units, Tensor out_w, Tensor out_b) -> Tensor", &layer);
  m.def("vector_width() -> int", []() -> int64_t { return V; });
}
