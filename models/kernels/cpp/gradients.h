// The operator of a layer's gradients: the recurrence runs back in backward.h, the rest is torch's own matrix products.
#pragma once
#include "backward.h"
#include "layer.h"

namespace {

// From the gradient of hidden (B, N, sum u) to those of the gates' inputs, for the cells marked, written over `gates`.
void walk_back(const at::Tensor& grad, at::TensorList gates, at::TensorList states, at::TensorList w_hh,
               const std::vector<bool>& marked) {
  std::vector<Cell<float>> cells;
  std::vector<Kept> kept;
  Tensors w_back;
  int64_t total = 0;
  for (size_t k = 0; k < w_hh.size(); ++k) {
    Cell<float> c = cell(k, w_hh[k].size(1), total);
    total += c.units;
    if (!marked[k]) continue;
    w_back.push_back(at::empty({4 * c.blocks * V, c.blocks * V}, grad.options()));
    pack_rows(w_hh[k].const_data_ptr<float>(), c.units, w_back.back().mutable_data_ptr<float>());
    c.w_hh = w_back.back().const_data_ptr<float>();
    cells.push_back(c);
    kept.push_back({gates[k].mutable_data_ptr<float>(), states[k].mutable_data_ptr<float>()});
  }
  float* out = const_cast<float*>(grad.const_data_ptr<float>());
  const Problem<float> p{nullptr, out, grad.size(1), 0, 0, 0, grad.size(1) * total, total};
  share_out(BACK, p, cells, kept, grad.size(0));
}

// Gradients from that of hidden (B, N, sum u) and what training kept: of x, then of W_ih, W_hh and the bias of each
// cell (its two biases have one gradient). Only those wanted, 1 + 3 a cell, are computed; the others are empty.
Tensors backward(const at::Tensor& grad, const at::Tensor& x, at::TensorList weights, const at::Tensor& hidden,
                 at::TensorList gates, at::TensorList states, const c10::List<bool>& wanted_list) {
  c10::impl::ExcludeDispatchKeyGuard full_precision(c10::DispatchKey::AutocastCPU);
  const Tensors natural = checked(weights);
  const std::vector<int64_t> units = units_of(weights);
  const std::vector<bool> wanted(wanted_list.begin(), wanted_list.end());
  TORCH_CHECK(grad.scalar_type() == at::kFloat && wanted.size() == 1 + 3 * units.size(), "float32, 1 + 3 marks a cell");
  Tensors kept, w_hh, results, inputs;
  for (size_t i = 0; i < wanted.size(); ++i) results.push_back(at::empty({0}, grad.options()));
  std::vector<bool> marked;
  for (size_t k = 0; k < units.size(); ++k) {
    marked.push_back(wanted[0] || wanted[3 * k + 1] || wanted[3 * k + 2] || wanted[3 * k + 3]);
    kept.push_back(marked[k] ? gates[k].clone() : gates[k]);  // overwritten; the graph may be walked again
    w_hh.push_back(natural[4 * k + 1]);
  }
  walk_back(grad.contiguous(), kept, states, w_hh, marked);
  const Tensors packed = wanted[0] ? pack(weights) : Tensors{};
  const Tensors by_cell = hidden.split_with_sizes(units, 2);
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
    Tensors heads;
    for (size_t k = 0; k < inputs.size(); k += 2) heads.push_back(inputs[k] + inputs[k + 1]);
    results[0] = at::stack(heads, 1).view(x.sizes());
  }
  return results;
}

}  // namespace
