// Weights of one layer, four a cell as in torch.nn.LSTM: W_ih (4 u, d), W_hh (4 u, u), b_ih and b_hh (4 u), to what
// recurrence.h reads and back. Training packs on each call, so nothing is kept that could go stale.
#pragma once
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <numeric>
#include <vector>

#include "recurrence.h"

namespace {

using Tensors = std::vector<at::Tensor>;

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
Tensors checked(at::TensorList weights) {
  TORCH_CHECK(!weights.empty() && weights.size() % 8 == 0, "four weights a cell, two cells a head");
  Tensors whole;
  for (size_t i = 0; i < weights.size(); ++i) {
    const at::Tensor &w = weights[i], &w_ih = weights[i - i % 4], &w_hh = weights[i - i % 4 + 1];
    TORCH_CHECK(w.scalar_type() == at::kFloat && w.device().is_cpu(), "weights must be float32 on the CPU");
    TORCH_CHECK(w_ih.dim() == 2 && w_hh.dim() == 2 && w.dim() == (i % 4 < 2 ? 2 : 1) && w.size(0) == 4 * w_hh.size(1) &&
                    w_ih.size(1) == weights[0].size(1),
                "weights of a cell: (4 u, d), (4 u, u), (4 u), (4 u)");
    whole.push_back(w.contiguous());
  }
  return whole;
}

std::vector<int64_t> units_of(at::TensorList weights) {
  std::vector<int64_t> units;
  for (size_t i = 1; i < weights.size(); i += 4) units.push_back(weights[i].size(1));
  return units;
}

// Three packed tensors a cell: W_ih (d, blocks, 4, V), W_hh (u, blocks, 4, V), bias (1, blocks, 4, V).
Tensors pack(at::TensorList weights) {
  const Tensors from = checked(weights);
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
  Tensors packed = at::empty({total}, from[0].options()).split_with_sizes(sizes);
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
  return packed;
}

}  // namespace
