// What is asked of a plan before anything follows it: it comes from a file or a pickle.
#pragma once
#include <algorithm>
#include <iterator>

#include "model.h"
#include "pass.h"

namespace {

using namespace far_model;

// Whether the parts of a plan fit each other and lie in their memory.
struct Checker {
  const Plan& plan;
  int64_t vectors, products;

  static bool lies(int64_t at, int64_t size, int64_t within) { return at >= 0 && size >= 0 && at <= within - size; }
  int64_t depth(int64_t inputs) const { return plan.bfloat16 ? padded(inputs) : inputs; }
  bool vector(int64_t at, int64_t size) const { return lies(at, size, vectors); }
  bool norm(int64_t at) const { return vector(at, 2 * padded(plan.dim) + 1); }
  bool map(const Map& m, int64_t inputs, int64_t outputs) const {
    return inputs > 0 && outputs > 0 && m.depth == depth(inputs) && m.width == outputs &&
           vector(m.bias, padded(outputs)) && lies(m.weights, m.depth * ((padded(outputs) + P - 1) / P * P), products);
  }
  static bool none(const Map& m) { return !m.depth && !m.width && !m.weights && !m.bias; }
  bool cell(const CellPlan& c, const BlockPlan& b) const {
    const int64_t width = b.gates * ((c.units + V - 1) / V * V), rows = plan.bfloat16 ? padded(c.units) : c.units;
    const int64_t panels = b.gates == 4 ? width : (width + P - 1) / P * P;
    return c.units > 0 && lies(c.column, c.units, b.mixed) && lies(c.from, b.depth, spaced(plan.dim)) &&
           vector(c.bias, width) && (c.reverse == 0 || c.reverse == 1) && lies(c.w_ih, b.depth * panels, products) &&
           (b.gates == 2 ? c.w_hh == 0 : lies(c.w_hh, rows * width, products));
  }
  bool head(const HeadPlan& h, const BlockPlan& b) const {
    return lies(h.from, 1, b.mixed) && lies(h.from, h.map.depth, spaced(b.mixed)) &&
           lies(h.to, h.map.width, plan.dim) && map(h.map, h.map.depth, h.map.width);
  }
  bool attention(const BlockPlan& b) const {
    return b.gates == 0 && b.heads <= plan.dim && b.depth == plan.dim / b.heads && b.mixed == b.heads * b.depth &&
           b.mixed == plan.dim && b.cell_count == 0 && b.apart_count == 0 && map(b.before, plan.dim, 3 * plan.dim);
  }
  bool recurrence(const BlockPlan& b) const {
    bool good = (b.gates == 4 || b.gates == 2) && b.depth > 0 && b.depth == depth(b.depth) && b.cell_count > 0 &&
                (none(b.before) || map(b.before, plan.dim, plan.dim));
    int64_t units = 0;
    for (int64_t i = 0; good && i < b.cell_count; ++i) {
      const CellPlan& c = plan.at<CellPlan>(b.cells)[i];
      good = cell(c, b);
      units += c.units;
    }
    for (int64_t i = 0; good && i < b.apart_count; ++i) good = head(plan.at<HeadPlan>(b.apart)[i], b);
    return good && units == b.mixed;
  }
  bool block(const BlockPlan& b) const {
    return norm(b.norm1) && norm(b.norm2) && lies(b.mixed, 1, int64_t{1} << 32) &&
           lies(b.cells, b.cell_count * int64_t(sizeof(CellPlan) / 8), plan.length) &&
           lies(b.apart, b.apart_count * int64_t(sizeof(HeadPlan) / 8), plan.length) &&
           (b.heads > 0 ? attention(b) : b.heads == 0 && recurrence(b)) &&
           map(b.out, b.apart_count ? plan.dim : b.mixed, plan.dim) && map(b.fc1, plan.dim, b.fc1.width) &&
           map(b.fc2, b.fc1.width, plan.dim);
  }
  bool model() const {
    const int64_t sizes[] = {plan.dim, plan.prefix, plan.channels, plan.patch_h, plan.patch_w, plan.height, plan.width};
    bool good = std::all_of(std::begin(sizes), std::end(sizes), [](int64_t n) { return lies(n, 1, int64_t{1} << 20); });
    good = good && plan.dim > 0 && norm(plan.norm) && plan.prefix > 0 && plan.channels > 0 && plan.patch_h > 0 &&
           plan.patch_w > 0 && plan.height >= plan.patch_h && plan.width >= plan.patch_w && plan.blocks > 0 &&
           lies(sizeof(Plan) / 8, plan.blocks * int64_t(sizeof(BlockPlan) / 8), plan.length) &&
           map(plan.embed, plan.channels * plan.patch_h * plan.patch_w, plan.dim) &&
           map(plan.head, plan.dim, plan.classes) && vector(plan.prefix_rows, plan.prefix * padded(plan.dim)) &&
           vector(plan.positions, (plan.tokens() - plan.prefix) * padded(plan.dim));
    for (int64_t i = 0; good && i < plan.blocks; ++i) good = block(plan.block(i));
    return good;
  }
};

}  // namespace
