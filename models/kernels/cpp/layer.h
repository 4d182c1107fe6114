// The operators of one layer, in training and without: cells and tiles of the batch run in parallel over torch's
// threads.
#pragma once
#include <torch/library.h>

#include <atomic>

#include "pack.h"

namespace {

// Shares cells and tiles of the batch out to torch's threads, the costliest first.
void share_out(const Runner<float>* runners, const Problem<float>& p, const std::vector<Cell<float>>& cells,
               const std::vector<Kept>& kept, int64_t batch) {
  struct Task {
    size_t cell;
    int64_t row, rows, cost;
  };
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
std::vector<Cell<float>> cells_of(const Tensors& packed, at::IntArrayRef units, const at::Tensor& x) {
  std::vector<Cell<float>> cells;
  int64_t total = 0;
  for (size_t k = 0; k < units.size(); ++k) {
    Cell<float> c = cell(k, units[k], total);
    const int64_t width = 4 * V * c.blocks;
    TORCH_CHECK(packed[3 * k].numel() == x.size(3) * width, "weights for heads of another width");
    c.w_ih = packed[3 * k].const_data_ptr<float>();
    c.w_hh = packed[3 * k + 1].const_data_ptr<float>();
    c.bias = packed[3 * k + 2].const_data_ptr<float>();
    c.from = k / 2 * x.stride(2);
    c.row = width;
    c.panel = 4 * V;
    cells.push_back(c);
    total += units[k];
  }
  return cells;
}

// x (B, N, H, d); natural weights, four a cell. Returns (B, N, sum u). In training, `gates` and `states` take of each
// cell the activated gates (B, N, 4 U) in packed order and the cell states (B, N, U).
at::Tensor compute(const at::Tensor& input, at::TensorList weights, Tensors* gates, Tensors* states) {
  TORCH_CHECK(input.dim() == 4 && input.scalar_type() == at::kFloat, "x must be (B, N, H, d), float32");
  TORCH_CHECK((int64_t)weights.size() == 8 * input.size(2), "four weights a cell, 2 H cells");
  const Tensors packed = pack(weights);
  const std::vector<int64_t> units = units_of(weights);
  const at::Tensor x = input.stride(3) == 1 ? input : input.contiguous();
  const std::vector<Cell<float>> cells = cells_of(packed, units, x);
  std::vector<Kept> kept;
  for (size_t k = 0; gates && k < cells.size(); ++k) {
    gates->push_back(at::empty({x.size(0), x.size(1), 4 * V * cells[k].blocks}, x.options()));
    states->push_back(at::empty({x.size(0), x.size(1), V * cells[k].blocks}, x.options()));
    kept.push_back({gates->back().mutable_data_ptr<float>(), states->back().mutable_data_ptr<float>()});
  }
  const int64_t total = std::accumulate(units.begin(), units.end(), int64_t{0});
  at::Tensor out = at::empty({x.size(0), x.size(1), total}, x.options());
  const Problem<float> p{x.const_data_ptr<float>(),
                         out.mutable_data_ptr<float>(),
                         x.size(1),
                         x.size(3),
                         x.stride(0),
                         x.stride(1),
                         x.size(1) * total,
                         total};
  const Runner<float>* runners = gates ? RUN<true, float, float> : RUN<false, float, float>;
  share_out(runners, p, cells, kept, x.size(0));
  return out;
}

at::Tensor forward(const at::Tensor& x, at::TensorList weights) { return compute(x, weights, nullptr, nullptr); }

std::tuple<at::Tensor, Tensors, Tensors> train(const at::Tensor& x, at::TensorList weights) {
  Tensors gates, states;
  at::Tensor out = compute(x, weights, &gates, &states);
  return {out, gates, states};
}

}  // namespace
