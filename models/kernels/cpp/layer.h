// The operators of one layer, in training and without: cells and tiles of the batch run in parallel over torch's threads.
#pragma once
#include <torch/library.h>

#include <atomic>

#include "pack.h"

namespace {

// Shares cells and tiles of the batch out to torch's threads, the costliest first.
void share_out(const Runner<float>* runners, const Problem<float>& p, const std::vector<Cell<float>>& cells,
               const std::vector<Kept>& kept, int64_t batch) {
  struct Task { size_t cell; int64_t row, rows, cost; };
  std::vector<Task> tasks;
  int64_t floats = 0;
  const int64_t tiles = (batch + TILE - 1) / TILE;
  for (size_t k = 0; k < cells.size(); ++k)
    for (int64_t i = 0; i < tiles; ++i) {  // rows shared out evenly: 8 is 4 + 4, not 6 + 2
      const int64_t from = batch * i / tiles, to = batch * (i + 1) / tiles;
      tasks.push_back({k, from, to - from, (to - from) * cells[k].units * (cells[k].units + p.depth)});
      floats = std::max(floats, walk_floats(to - from, cells[k].blocks * V, !kept.empty()));
    }
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.cost > b.cost; });
  std::atomic<size_t> next{0};
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), tasks.size());
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    std::vector<float> scratch(floats);
    for (size_t i; (i = next++) < tasks.size();) {
      const Task& task = tasks[i];
      const Kept& keeps = kept.empty() ? Kept{} : kept[task.cell];
      runners[task.rows](p, cells[task.cell], keeps, task.row, p.tokens, scratch.data());
    }
  });
}

// A cell yet without weights; `column`: where its hidden units begin in the output.
Cell<float> cell(size_t k, int64_t units, int64_t column) {
  Cell<float> c{};
  c.units = units;
  c.blocks = blocks_of(units);
  c.reverse = k % 2;
  c.column = column;
  return c;
}

// The cells of packed weights, three tensors each, for an input with strides of `x`.
std::vector<Cell<float>> cells_of(const Tensors& packed, at::IntArrayRef units, const at::Tensor& x, bool half) {
  std::vector<Cell<float>> cells;
  int64_t total = 0;
  for (size_t k = 0; k < units.size(); ++k) {
    Cell<float> c = cell(k, units[k], total);
    const int64_t width = 4 * V * c.blocks, rows = half ? (units[k] + 1) / 2 * 2 : units[k];
    TORCH_CHECK(packed[3 * k + 2].size(-1) == V, "weights packed for vectors of another width");
    TORCH_CHECK(packed[3 * k].numel() == x.size(3) * width && packed[3 * k + 1].numel() == rows * width &&
                    packed[3 * k + 2].numel() == width, "weights of another size");
    c.w_ih = packed[3 * k].const_data_ptr<float>();
    c.w_hh = packed[3 * k + 1].const_data_ptr();
    c.bias = packed[3 * k + 2].const_data_ptr<float>();
    c.from = k / 2 * x.stride(2);
    c.row = width;
    c.panel = 4 * V;
    cells.push_back(c);
    total += units[k];
  }
  return cells;
}

// x (B, N, H, d); packed weights, three a cell; units of each cell. Returns (B, N, sum u). In training, `gates` and `states`
// take of each cell the activated gates (B, N, 4 U) in packed order and the cell states (B, N, U).
at::Tensor compute(const at::Tensor& input, at::TensorList weights, at::IntArrayRef units, Tensors* gates, Tensors* states) {
  TORCH_CHECK(input.dim() == 4 && input.scalar_type() == at::kFloat, "x must be (B, N, H, d), float32");
  TORCH_CHECK((int64_t)units.size() == 2 * input.size(2) && weights.size() == 3 * units.size(),
              "three packed tensors a cell, 2 H cells");
  Tensors packed;  // a model's `.to(memory_format=...)` reorders whatever has four dimensions
  for (const at::Tensor& w : weights) packed.push_back(w.contiguous());
  const at::Tensor x = input.stride(3) == 1 ? input : input.contiguous();
  const bool half = packed[1].scalar_type() == at::kBFloat16;
  TORCH_CHECK(!half || (FAR_BFLOAT16 && !gates), "bfloat16 weights need AVX512_BF16, and do not train");
  const std::vector<Cell<float>> cells = cells_of(packed, units, x, half);
  std::vector<Kept> kept;
  for (size_t k = 0; gates && k < cells.size(); ++k) {
    gates->push_back(at::empty({x.size(0), x.size(1), 4 * V * cells[k].blocks}, x.options()));
    states->push_back(at::empty({x.size(0), x.size(1), V * cells[k].blocks}, x.options()));
    kept.push_back({gates->back().mutable_data_ptr<float>(), states->back().mutable_data_ptr<float>()});
  }
  const int64_t total = std::accumulate(units.begin(), units.end(), int64_t{0});
  at::Tensor out = at::empty({x.size(0), x.size(1), total}, x.options());
  const Problem<float> p{x.const_data_ptr<float>(), out.mutable_data_ptr<float>(), x.size(1), x.size(3),
                         x.stride(0), x.stride(1), x.size(1) * total, total};
  const Runner<float>* runners = gates ? RUN<true, false, float> : half ? RUN<false, true, float> : RUN<false, false, float>;
  share_out(runners, p, cells, kept, x.size(0));
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

// A whole layer: x (B, N, D) to the first `tokens` of (B, N, D), with the two projections around the LSTMs as torch's own matrix
// products. An empty pre_w means that it was merged into the input weights; then every head reads all D channels.
at::Tensor layer(const at::Tensor& x, const at::Tensor& pre_w, const at::Tensor& pre_b, at::TensorList packed, at::IntArrayRef units,
                 const at::Tensor& out_w, const at::Tensor& out_b, int64_t tokens) {
  const int64_t heads = units.size() / 2, b = x.size(0), n = x.size(1);
  at::Tensor p = pre_w.numel() ? at::linear(x, pre_w, pre_b).view({b, n, heads, pre_w.size(0) / heads})
                               : x.contiguous().unsqueeze(2).expand({b, n, heads, x.size(2)});
  return at::linear(run_packed(p, packed, units).narrow(1, 0, std::min(tokens, n)), out_w, out_b);
}

}  // namespace
