// Multi-head bidirectional LSTM on a CPU, float32. One task is one head, one direction and a tile of the batch; tasks run in
// parallel over torch's threads. Within a task the input product of a few tokens is computed into a buffer that stays in cache,
// then the recurrence walks over them: accumulators of all four gates live in registers. In training the gates and cell states
// of all tokens are kept, and `backward` walks the other way; the weights' gradients are torch's own matrix products.
//
// Weights come as in torch.nn.LSTM, four a cell (one head, one direction): W_ih (4 u, d), W_hh (4 u, u), b_ih and b_hh
// (4 u). Each call packs them to [k][unit block][gate i, f, g, o][V], so that a step reads memory in order: nothing is
// kept that could go stale. Vectors are GCC's (and clang's) portable ones: the compiler's flags make them AVX-512, AVX2 or
// whatever the machine has.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <numeric>
#include <vector>

#if defined(__AVX512BF16__) && defined(__AVX512F__)
#include <immintrin.h>
#define FAR_BFLOAT16 1
#else
#define FAR_BFLOAT16 0
#endif

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

// The same with pairs of neighbouring k as two bfloat16 in 32 bits, in a and in w: half the bytes, half the instructions.
#if FAR_BFLOAT16
template <int R, int C>
inline void product_half(vf (&acc)[R][C], const int32_t* a, int64_t lda, const int32_t* w, int64_t ldw, int64_t pairs) {
  for (int64_t k = 0; k < pairs; ++k, w += ldw) {
    __m512bh s[R];
    for (int r = 0; r < R; ++r) s[r] = (__m512bh)_mm512_set1_epi32(a[r * lda + k]);
    for (int j = 0; j < C; ++j) {
      __m512bh column = (__m512bh)_mm512_loadu_si512(w + j * V);
      for (int r = 0; r < R; ++r) acc[r][j] = (vf)_mm512_dpbf16_ps((__m512)acc[r][j], s[r], column);
    }
  }
}
inline void store_half(void* p, vf x) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)x)); }
#else
template <int R, int C>
inline void product_half(vf (&)[R][C], const int32_t*, int64_t, const int32_t*, int64_t, int64_t) {}
inline void store_half(void*, vf) {}
#endif

struct Cell {
  const float *w_ih, *w_hh, *bias;  // packed: (d, 4 U), (u, 4 U) or as pairs (u / 2, 4 U, 2), (4 U)
  int64_t units, blocks, head, reverse, column;
};

// R rows of input products, all unit blocks: out[r] = bias + a[r] W_ih.
template <int R>
void input_rows(const Cell& c, const float* a, int64_t lda, int64_t depth, float* out, int64_t ldo) {
  const int64_t width = c.blocks * 4 * V;
  for (int64_t j = 0; j < c.blocks; ++j) {
    vf acc[R][4];
    for (int r = 0; r < R; ++r)
      for (int g = 0; g < 4; ++g) acc[r][g] = load(c.bias + (j * 4 + g) * V);
    product<R, 4>(acc, a, lda, c.w_ih + j * 4 * V, width, depth);
    for (int r = 0; r < R; ++r)
      for (int g = 0; g < 4; ++g) store(out + r * ldo + (j * 4 + g) * V, acc[r][g]);
  }
}

// The state of R rows between two tokens. h and h_new are what the recurrence reads and writes, bfloat16 in pairs with HALF;
// out is the new hidden state in float32 (h_new itself without HALF); kept, in training, takes the cell states.
struct State {
  float *h, *h_new, *out, *cell, *kept;
  int64_t ldk;
  bool last;
};

// One time step of J unit blocks from block j on, for R rows. KEEP: the activated gates take the place of their inputs.
template <int R, int J, bool KEEP, bool HALF>
inline void step(const Cell& c, int64_t j, float* gates, int64_t ldg, const State& s) {
  const int64_t width = c.blocks * 4 * V, U = c.blocks * V;
  vf acc[R][J * 4];
  for (int r = 0; r < R; ++r)
    for (int g = 0; g < J * 4; ++g) acc[r][g] = load(gates + r * ldg + j * 4 * V + g * V);
  if constexpr (HALF)
    product_half<R, J * 4>(acc, (const int32_t*)s.h, U, (const int32_t*)c.w_hh + j * 4 * V, width, (c.units + 1) / 2);
  else if (R == 1 && !KEEP && s.last)  // every other token from the last row to the first: what the cache still holds of W_hh first
    product<R, J * 4>(acc, s.h + c.units - 1, U, c.w_hh + (c.units - 1) * width + j * 4 * V, -width, c.units, -1);
  else
    product<R, J * 4>(acc, s.h, U, c.w_hh + j * 4 * V, width, c.units);
  for (int r = 0; r < R; ++r)
    for (int b = 0; b < J; ++b) {
      const int64_t at = r * U + (j + b) * V;
      const vf gate[4] = {sigmoid(acc[r][b * 4]), sigmoid(acc[r][b * 4 + 1]), tanh_(acc[r][b * 4 + 2]), sigmoid(acc[r][b * 4 + 3])};
      const vf cell = gate[1] * load(s.cell + at) + gate[0] * gate[2], hidden = gate[3] * tanh_(cell);
      store(s.cell + at, cell);
      store(s.out + at, hidden);
      if constexpr (HALF) store_half((uint16_t*)(s.h_new + r * U) + (j + b) * V, hidden);
      if constexpr (KEEP) {
        for (int g = 0; g < 4; ++g) store(gates + r * ldg + ((j + b) * 4 + g) * V, gate[g]);
        store(s.kept + r * s.ldk + (j + b) * V, cell);
      }
    }
}

struct Problem {
  const float* x;
  float* out;
  int64_t tokens, depth, batch_stride, token_stride, head_stride, out_width;
};

// What training keeps of one cell: gates (B, N, 4 U) and cell states (B, N, U), tokens in place. Backward writes the gates'
// gradients over the gates.
struct Kept {
  float *gates, *states;
};

// All tokens of one cell for R rows of the batch, from row `b` on.
template <int R, bool KEEP, bool HALF>
void run(const Problem& p, const Cell& c, const Kept& kept, int64_t b, std::vector<float>& scratch) {
  constexpr int J = R == 1 ? (V == 16 ? 4 : 2) : 1;  // as many accumulators as the registers hold
  const int64_t U = c.blocks * V, width = 4 * U, buffer = KEEP ? 0 : R * CHUNK * width;
  scratch.assign(buffer + 4 * R * U, 0.0f);
  float* h = scratch.data() + buffer;
  State state{h, h + R * U, h + 3 * R * U, h + 2 * R * U, nullptr, p.tokens * U, false};
  const int64_t direction = c.reverse ? -1 : 1, stride = direction * p.token_stride;
  const int64_t ldg = KEEP ? p.tokens * width : CHUNK * width, hop = KEEP ? direction * width : width;
  for (int64_t start = 0; start < p.tokens; start += CHUNK) {
    const int64_t count = std::min<int64_t>(CHUNK, p.tokens - start);
    const int64_t first = c.reverse ? p.tokens - 1 - start : start;
    float* gates = KEEP ? kept.gates + (b * p.tokens + first) * width : scratch.data();
    for (int r = 0; r < R; ++r) {
      const float* a = p.x + (b + r) * p.batch_stride + first * p.token_stride + c.head * p.head_stride;
      float* to = gates + r * ldg;
      int64_t t = 0;
      constexpr int M = V == 16 ? 6 : 3;
      for (; t + M <= count; t += M) input_rows<M>(c, a + t * stride, stride, p.depth, to + t * hop, hop);
      for (; t < count; ++t) input_rows<1>(c, a + t * stride, stride, p.depth, to + t * hop, hop);
    }
    for (int64_t t = 0; t < count; ++t) {
      const int64_t token = first + direction * t;
      float* at = gates + t * hop;
      if (!HALF) state.out = state.h_new;
      if (KEEP) state.kept = kept.states + (b * p.tokens + token) * U;
      int64_t j = 0;
      for (; j + J <= c.blocks; j += J) step<R, J, KEEP, HALF>(c, j, at, ldg, state);
      if (J > 2 && j + 2 <= c.blocks) step<R, (J > 2 ? 2 : 1), KEEP, HALF>(c, j, at, ldg, state), j += 2;
      for (; j < c.blocks; ++j) step<R, 1, KEEP, HALF>(c, j, at, ldg, state);
      for (int r = 0; r < R; ++r)
        std::memcpy(p.out + ((b + r) * p.tokens + token) * p.out_width + c.column, state.out + r * U, c.units * sizeof(float));
      std::swap(state.h, state.h_new);
      state.last = !state.last;
    }
  }
}

// dh[r] = dgates[r] W_hh for C blocks of previous hidden units from block j on; W_hh packed (4 U, U), rows in the gates' order.
template <int R, int C>
inline void hidden_gradient(const Cell& c, int64_t j, const float* dgates, int64_t ldg, float* dh) {
  const int64_t U = c.blocks * V;
  vf acc[R][C] = {};
  product<R, C>(acc, dgates, ldg, c.w_hh + j * V, U, 4 * U);
  for (int r = 0; r < R; ++r)
    for (int k = 0; k < C; ++k) store(dh + r * U + (j + k) * V, acc[r][k]);
}

// The way back over all tokens of one cell for R rows (backpropagation through time); p.out holds the gradient of hidden.
template <int R>
void run_back(const Problem& p, const Cell& c, const Kept& kept, int64_t b, std::vector<float>& scratch) {
  const int64_t U = c.blocks * V, width = 4 * U, ldg = p.tokens * width, direction = c.reverse ? -1 : 1;
  scratch.assign(3 * R * U, 0.0f);
  float *dh = scratch.data(), *dc = dh + R * U, *zero = dc + R * U;
  for (int64_t s = p.tokens - 1; s >= 0; --s) {
    const int64_t token = c.reverse ? p.tokens - 1 - s : s;
    float* gates = kept.gates + (b * p.tokens + token) * width;
    for (int r = 0; r < R; ++r) {
      const float* states = kept.states + ((b + r) * p.tokens + token) * U;
      const float* before = s > 0 ? states - direction * U : zero;
      const float* from = p.out + ((b + r) * p.tokens + token) * p.out_width + c.column;
      for (int64_t k = 0; k < c.units; ++k) dh[r * U + k] += from[k];
      for (int64_t j = 0; j < c.blocks; ++j) {
        float *g = gates + r * ldg + j * 4 * V, *carry = dc + r * U + j * V;
        const vf in = load(g), forget = load(g + V), new_ = load(g + 2 * V), out = load(g + 3 * V);
        const vf d = load(dh + r * U + j * V), t = tanh_(load(states + j * V));
        const vf cell = load(carry) + d * out * (1.0f - t * t);
        store(g, cell * new_ * in * (1.0f - in));
        store(g + V, cell * load(before + j * V) * forget * (1.0f - forget));
        store(g + 2 * V, cell * in * (1.0f - new_ * new_));
        store(g + 3 * V, d * t * out * (1.0f - out));
        store(carry, cell * forget);
      }
    }
    int64_t j = 0;
    for (; j + 4 <= c.blocks; j += 4) hidden_gradient<R, 4>(c, j, gates, ldg, dh);
    for (; j < c.blocks; ++j) hidden_gradient<R, 1>(c, j, gates, ldg, dh);
  }
}

using Runner = void (*)(const Problem&, const Cell&, const Kept&, int64_t, std::vector<float>&);
constexpr int TILE = V == 16 ? 6 : 3;
template <bool KEEP, bool HALF>
constexpr Runner RUN[] = {nullptr, run<1, KEEP, HALF>, run<2, KEEP, HALF>, run<3, KEEP, HALF>,
                          run<4, KEEP, HALF>, run<5, KEEP, HALF>, run<6, KEEP, HALF>};
constexpr Runner BACK[] = {nullptr, run_back<1>, run_back<2>, run_back<3>, run_back<4>, run_back<5>, run_back<6>};

// Shares cells and tiles of the batch out to torch's threads, the costliest first.
void share_out(const Runner* runners, const Problem& p, const std::vector<Cell>& cells, const std::vector<Kept>& kept, int64_t batch) {
  struct Task { size_t cell; int64_t row, rows, cost; };
  std::vector<Task> tasks;
  const int64_t tiles = (batch + TILE - 1) / TILE;
  for (size_t k = 0; k < cells.size(); ++k)
    for (int64_t i = 0; i < tiles; ++i) {  // rows shared out evenly: 8 is 4 + 4, not 6 + 2
      const int64_t from = batch * i / tiles, to = batch * (i + 1) / tiles;
      tasks.push_back({k, from, to - from, (to - from) * cells[k].units * (cells[k].units + p.depth)});
    }
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.cost > b.cost; });
  std::atomic<size_t> next{0};
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), tasks.size());
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    std::vector<float> scratch;
    for (size_t i; (i = next++) < tasks.size();) {
      const Task& task = tasks[i];
      runners[task.rows](p, cells[task.cell], kept.empty() ? Kept{} : kept[task.cell], task.row, scratch);
    }
  });
}

int64_t blocks_of(int64_t units) { return (units + V - 1) / V; }

// Rows (4 u, m) of a weight to [k][unit block][gate][V], units padded with zeros.
void pack_columns(const float* w, int64_t units, int64_t m, float* to) {
  const int64_t width = blocks_of(units) * 4 * V;
  for (int64_t j = 0; j * V < units; ++j)
    for (int64_t g = 0; g < 4; ++g) {
      const float* from = w + (g * units + j * V) * m;
      float* at = to + (j * 4 + g) * V;
      const int64_t rows = std::min<int64_t>(V, units - j * V);
      for (int64_t k = 0; k < m; ++k, ++from, at += width)
        for (int64_t v = 0; v < V; ++v) at[v] = v < rows ? from[v * m] : 0.0f;
    }
}

// W_hh (4 u, u) for the way back, (4 U, U): rows in the order [unit block][gate][V], both padded with zeros.
void pack_rows(const float* w, int64_t units, float* to) {
  const int64_t U = blocks_of(units) * V;
  std::memset(to, 0, 4 * U * U * sizeof(float));
  for (int64_t g = 0; g < 4; ++g)
    for (int64_t k = 0; k < units; ++k)
      std::memcpy(to + ((k / V * 4 + g) * V + k % V) * U, w + (g * units + k) * units, units * sizeof(float));
}

// The inverse, for gradients: rows (4 U, m) in the kernel's order back to (4 u, m).
at::Tensor natural_rows(const at::Tensor& w, int64_t units) {
  return w.unflatten(0, {-1, 4, V}).transpose(0, 1).flatten(1, 2).slice(1, 0, units).flatten(0, 1).contiguous();
}

// Four weights a cell, checked, contiguous.
std::vector<at::Tensor> checked(at::TensorList weights) {
  TORCH_CHECK(!weights.empty() && weights.size() % 8 == 0, "four weights a cell, two cells a head");
  std::vector<at::Tensor> whole;
  for (size_t i = 0; i < weights.size(); ++i) {
    const at::Tensor &w = weights[i], &w_ih = weights[i - i % 4], &w_hh = weights[i - i % 4 + 1];
    TORCH_CHECK(w.scalar_type() == at::kFloat && w.device().is_cpu(), "weights must be float32 on the CPU");
    TORCH_CHECK(w_ih.dim() == 2 && w_hh.dim() == 2 && w.dim() == (i % 4 < 2 ? 2 : 1) && w.size(0) == 4 * w_hh.size(1) &&
                    w_ih.size(1) == weights[0].size(1), "weights of a cell: (4 u, d), (4 u, u), (4 u), (4 u)");
    whole.push_back(w.contiguous());
  }
  return whole;
}

std::vector<int64_t> units_of(at::TensorList weights) {
  std::vector<int64_t> units;
  for (size_t i = 1; i < weights.size(); i += 4) units.push_back(weights[i].size(1));
  return units;
}

// Three packed tensors a cell: W_ih (d, blocks, 4, V), W_hh (u, blocks, 4, V), bias (1, blocks, 4, V). half: W_hh in
// bfloat16, pairs of rows side by side, (u / 2 rounded up, 4 U, 2).
std::vector<at::Tensor> pack(at::TensorList weights, bool half) {
  TORCH_CHECK(!half || FAR_BFLOAT16, "bfloat16 weights need AVX512_BF16");
  const std::vector<at::Tensor> from = checked(weights);
  std::vector<std::vector<int64_t>> shapes;
  std::vector<int64_t> sizes;
  for (size_t i = 0; i < from.size(); i += 4) {
    const int64_t units = from[i + 1].size(1), blocks = blocks_of(units);
    for (const int64_t rows : {from[i].size(1), units, int64_t{1}}) {
      shapes.push_back({rows, blocks, 4, V});
      sizes.push_back(rows * blocks * 4 * V);
    }
  }
  // One piece of memory: malloc gives and takes back large ones whole, many small ones page by page.
  const int64_t total = std::accumulate(sizes.begin(), sizes.end(), int64_t{0});
  std::vector<at::Tensor> packed = at::empty({total}, from[0].options()).split_with_sizes(sizes);
  for (size_t k = 0; k < packed.size(); ++k) packed[k] = packed[k].view(shapes[k]);
  at::parallel_for(0, from.size() / 4, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> bias;
    for (int64_t k = begin; k < end; ++k) {
      const at::Tensor* w = &from[4 * k];
      const int64_t units = w[1].size(1);
      const float *b_ih = w[2].const_data_ptr<float>(), *b_hh = w[3].const_data_ptr<float>();
      bias.resize(4 * units);
      for (int64_t i = 0; i < 4 * units; ++i) bias[i] = b_ih[i] + b_hh[i];
      pack_columns(w[0].const_data_ptr<float>(), units, w[0].size(1), packed[3 * k].mutable_data_ptr<float>());
      pack_columns(w[1].const_data_ptr<float>(), units, units, packed[3 * k + 1].mutable_data_ptr<float>());
      pack_columns(bias.data(), units, 1, packed[3 * k + 2].mutable_data_ptr<float>());
    }
  });
  for (size_t k = 1; half && k < packed.size(); k += 3) {
    const at::Tensor rows = at::constant_pad_nd(packed[k].flatten(1), {0, 0, 0, packed[k].size(0) % 2});
    packed[k] = rows.to(at::kBFloat16).unflatten(0, {-1, 2}).transpose(1, 2).contiguous();
  }
  return packed;
}

Cell cell(size_t k, int64_t units, int64_t column) {
  return {nullptr, nullptr, nullptr, units, blocks_of(units), (int64_t)k / 2, (int64_t)k % 2, column};
}

using Tensors = std::vector<at::Tensor>;

// x (B, N, H, d); packed weights, three a cell; units of each cell. Returns (B, N, sum u). In training, `gates` and `states`
// take of each cell the activated gates (B, N, 4 U) in packed order and the cell states (B, N, U).
at::Tensor compute(const at::Tensor& input, at::TensorList weights, at::IntArrayRef units, Tensors* gates, Tensors* states) {
  TORCH_CHECK(input.dim() == 4 && input.scalar_type() == at::kFloat, "x must be (B, N, H, d), float32");
  TORCH_CHECK((int64_t)units.size() == 2 * input.size(2) && weights.size() == 3 * units.size(),
              "three packed tensors a cell, 2 H cells");
  Tensors packed;  // a model's `.to(memory_format=...)` reorders whatever has four dimensions
  for (const at::Tensor& w : weights) packed.push_back(w.contiguous());
  const at::Tensor x = input.stride(3) == 1 ? input : input.contiguous();
  std::vector<Cell> cells;
  std::vector<Kept> kept;
  const bool half = packed[1].scalar_type() == at::kBFloat16;
  TORCH_CHECK(!half || (FAR_BFLOAT16 && !gates), "bfloat16 weights need AVX512_BF16, and do not train");
  int64_t total = 0;
  for (size_t k = 0; k < units.size(); ++k) {
    Cell c = cell(k, units[k], total);
    const int64_t width = 4 * V * c.blocks, rows = half ? (units[k] + 1) / 2 * 2 : units[k];
    TORCH_CHECK(packed[3 * k + 2].size(-1) == V, "weights packed for vectors of another width");
    TORCH_CHECK(packed[3 * k].numel() == x.size(3) * width && packed[3 * k + 1].numel() == rows * width &&
                    packed[3 * k + 2].numel() == width, "weights of another size");
    c.w_ih = packed[3 * k].const_data_ptr<float>();
    c.w_hh = static_cast<const float*>(packed[3 * k + 1].const_data_ptr());
    c.bias = packed[3 * k + 2].const_data_ptr<float>();
    cells.push_back(c);
    total += units[k];
    if (gates) {
      gates->push_back(at::empty({x.size(0), x.size(1), width}, x.options()));
      states->push_back(at::empty({x.size(0), x.size(1), width / 4}, x.options()));
      kept.push_back({gates->back().mutable_data_ptr<float>(), states->back().mutable_data_ptr<float>()});
    }
  }
  at::Tensor out = at::empty({x.size(0), x.size(1), total}, x.options());
  const Problem p{x.const_data_ptr<float>(), out.mutable_data_ptr<float>(), x.size(1), x.size(3),
                  x.stride(0), x.stride(1), x.stride(2), total};
  share_out(gates ? RUN<true, false> : half ? RUN<false, true> : RUN<false, false>, p, cells, kept, x.size(0));
  return out;
}

at::Tensor run_packed(const at::Tensor& x, at::TensorList packed, at::IntArrayRef units) {
  return compute(x, packed, units, nullptr, nullptr);
}

at::Tensor forward(const at::Tensor& x, at::TensorList weights) {
  return run_packed(x, pack(weights, false), units_of(weights));
}

std::tuple<at::Tensor, Tensors, Tensors> train(const at::Tensor& x, at::TensorList weights) {
  Tensors gates, states;
  at::Tensor out = compute(x, pack(weights, false), units_of(weights), &gates, &states);
  return {out, gates, states};
}

// From the gradient of hidden (B, N, sum u) to those of the gates' inputs, for the cells marked, written over `gates`.
void walk_back(const at::Tensor& grad, at::TensorList gates, at::TensorList states, at::TensorList w_hh,
               const std::vector<bool>& marked) {
  std::vector<Cell> cells;
  std::vector<Kept> kept;
  std::vector<at::Tensor> w_back;
  int64_t total = 0;
  for (size_t k = 0; k < w_hh.size(); ++k) {
    Cell c = cell(k, w_hh[k].size(1), total);
    total += c.units;
    if (!marked[k]) continue;
    w_back.push_back(at::empty({4 * c.blocks * V, c.blocks * V}, grad.options()));
    pack_rows(w_hh[k].const_data_ptr<float>(), c.units, w_back.back().mutable_data_ptr<float>());
    c.w_hh = w_back.back().const_data_ptr<float>();
    cells.push_back(c);
    kept.push_back({gates[k].mutable_data_ptr<float>(), states[k].mutable_data_ptr<float>()});
  }
  const Problem p{nullptr, const_cast<float*>(grad.const_data_ptr<float>()), grad.size(1), 0, 0, 0, 0, total};
  share_out(BACK, p, cells, kept, grad.size(0));
}

// Gradients from that of hidden (B, N, sum u) and what training kept: of x, then of W_ih, W_hh and the bias of each cell (its
// two biases have one gradient). Only those wanted, 1 + 3 a cell, are computed; the others are empty.
Tensors backward(const at::Tensor& grad, const at::Tensor& x, at::TensorList weights, const at::Tensor& hidden,
                 at::TensorList gates, at::TensorList states, const c10::List<bool>& wanted_list) {
  c10::impl::ExcludeDispatchKeyGuard full_precision(c10::DispatchKey::AutocastCPU);
  const std::vector<at::Tensor> natural = checked(weights);
  const std::vector<int64_t> units = units_of(weights);
  const std::vector<bool> wanted(wanted_list.begin(), wanted_list.end());
  TORCH_CHECK(grad.scalar_type() == at::kFloat && wanted.size() == 1 + 3 * units.size(), "float32, 1 + 3 marks a cell");
  std::vector<at::Tensor> kept, w_hh, results, inputs;
  for (size_t i = 0; i < wanted.size(); ++i) results.push_back(at::empty({0}, grad.options()));
  std::vector<bool> marked;
  for (size_t k = 0; k < units.size(); ++k) {
    marked.push_back(wanted[0] || wanted[3 * k + 1] || wanted[3 * k + 2] || wanted[3 * k + 3]);
    kept.push_back(marked[k] ? gates[k].clone() : gates[k]);  // overwritten; the graph may be walked again
    w_hh.push_back(natural[4 * k + 1]);
  }
  walk_back(grad.contiguous(), kept, states, w_hh, marked);
  const std::vector<at::Tensor> packed = wanted[0] ? pack(weights, false) : std::vector<at::Tensor>{};
  const std::vector<at::Tensor> by_cell = hidden.split_with_sizes(units, 2);
  for (size_t k = 0; k < units.size(); ++k) {
    const at::Tensor d_gates = kept[k].flatten(0, 1);  // (B N, 4 U)
    if (wanted[0]) inputs.push_back(d_gates.matmul(packed[3 * k].flatten(1).t()));
    if (wanted[3 * k + 1])
      results[3 * k + 1] = natural_rows(d_gates.t().matmul(x.select(2, k / 2).flatten(0, 1)), units[k]);
    if (wanted[3 * k + 2]) {
      at::Tensor before = at::zeros_like(by_cell[k]);  // the hidden state each token met
      const int64_t reverse = k % 2, others = hidden.size(1) - 1;
      before.narrow(1, 1 - reverse, others).copy_(by_cell[k].narrow(1, reverse, others));
      results[3 * k + 2] = natural_rows(d_gates.t().matmul(before.flatten(0, 1)), units[k]);
    }
    if (wanted[3 * k + 3]) results[3 * k + 3] = natural_rows(d_gates.sum(0), units[k]);
  }
  if (wanted[0]) {
    std::vector<at::Tensor> heads;
    for (size_t k = 0; k < inputs.size(); k += 2) heads.push_back(inputs[k] + inputs[k + 1]);
    results[0] = at::stack(heads, 1).view(x.sizes());
  }
  return results;
}

// A whole layer: x (B, N, D) to the first `tokens` of (B, N, D), with the two projections around the LSTMs as torch's own matrix
// products. An empty pre_w means that it was merged into the input weights; then every head reads all D channels.
at::Tensor layer(const at::Tensor& x, const at::Tensor& pre_w, const at::Tensor& pre_b, at::TensorList packed, at::IntArrayRef units,
                 const at::Tensor& out_w, const at::Tensor& out_b, int64_t tokens) {
  const int64_t heads = units.size() / 2, b = x.size(0), n = x.size(1);
  at::Tensor p = pre_w.numel() ? at::linear(x, pre_w, pre_b).view({b, n, heads, pre_w.size(0) / heads})
                               : x.contiguous().unsqueeze(2).expand({b, n, heads, x.size(2)});
  return at::linear(run_packed(p, packed, units).narrow(1, 0, std::min(tokens, n)), out_w, out_b);
}

// Whether this CPU has what the compiler was told to use: a library made for another machine then registers nothing.
bool runs_here() {
  bool has = true;
#if defined(__x86_64__)
  __builtin_cpu_init();
#ifdef __AVX2__
  has = has && __builtin_cpu_supports("avx2");
#endif
#ifdef __FMA__
  has = has && __builtin_cpu_supports("fma");
#endif
#ifdef __FMA4__
  has = has && __builtin_cpu_supports("fma4");
#endif
#ifdef __AVX512F__
  has = has && __builtin_cpu_supports("avx512f");
#endif
#ifdef __AVX512BF16__
  has = has && __builtin_cpu_supports("avx512bf16");
#endif
#endif
  return has;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(FAR_NAMESPACE, m) {
  if (!runs_here()) return;
  const auto on_cpu = [](auto* function) { return torch::dispatch(c10::DispatchKey::CPU, function); };
  m.def("forward(Tensor x, Tensor[] weights) -> Tensor", on_cpu(&forward));
  m.def("train(Tensor x, Tensor[] weights) -> (Tensor, Tensor[], Tensor[])", on_cpu(&train));
  m.def("backward(Tensor grad, Tensor x, Tensor[] weights, Tensor hidden, Tensor[] gates, Tensor[] states, bool[] wanted) "
        "-> Tensor[]",
        on_cpu(&backward));
  m.def("pack(Tensor[] weights, bool half=False) -> Tensor[]", on_cpu(&pack));
  m.def("run_packed(Tensor x, Tensor[] packed, int[] units) -> Tensor", on_cpu(&run_packed));
  m.def("layer(Tensor x, Tensor pre_w, Tensor pre_b, Tensor[] packed, int[] units, Tensor out_w, Tensor out_b, int tokens) "
        "-> Tensor",
        on_cpu(&layer));
  m.def("vector_width() -> int", []() -> int64_t { return V; });
  m.def("has_bfloat16() -> bool", []() -> bool { return FAR_BFLOAT16; });
}
