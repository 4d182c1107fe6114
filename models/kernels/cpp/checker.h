// What is asked of a plan, natural or packed, before anything follows it: it comes from a file or a pickle.
#pragma once
#include <algorithm>
#include <iterator>

#include "model.h"
#include "pass.h"

namespace {

using namespace far_engine;

// Whether the parts of a plan fit each other and lie in their memory. Every number may be any, so nothing is multiplied
// before its factors are known to be small.
struct Checker {
  const Plan& plan;
  int64_t vectors, products;
  mutable int64_t taken = 0;  // numbers of both that the natural form was found to hold so far
  mutable int64_t place = 0;  // in the plan, behind the last table of records

  bool natural() const { return plan.vector_width == NATURAL; }
  // What `n` takes in memory: floats of a row; inputs of a product; a row of what mixing reads.
  int64_t floats(int64_t n) const { return natural() ? n : padded(n); }
  bool int8() const { return plan.precision == INT8; }
  int64_t inputs(int64_t n, bool kept = false) const {
    return natural() || plan.precision == FLOAT32 || kept ? n : padded(n);
  }
  int64_t outputs(int64_t n) const { return natural() ? n : (padded(n) + P - 1) / P * P; }
  int64_t row(int64_t n) const { return natural() ? n : spaced(n); }
  int64_t units(int64_t n) const { return natural() ? n : (n + V - 1) / V * V; }

  // `count` pieces of `each` from `at` on.
  static bool lies(int64_t at, int64_t count, int64_t within, int64_t each = 1) {
    return at >= 0 && count >= 0 && each > 0 && at <= within && count <= (within - at) / each;
  }
  static bool small(int64_t n) { return n > 0 && n <= int64_t{1} << 24; }
  bool take(int64_t at, int64_t count, int64_t within, int64_t each) const {
    if (!lies(at, count, within, each)) return false;
    // A small file in which all records share their weights must not be packed into a large model.
    return !natural() || (taken += count * each) <= vectors + products;
  }
  bool vector(int64_t at, int64_t count, int64_t each = 1) const { return take(at, count, vectors, each); }
  // kept: of float32 among numbers in int8.
  bool matrix(int64_t at, int64_t count, int64_t each, int64_t kept = 0) const {
    const int64_t bytes = natural() ? 1 : sizeof(q8);
    if (!kept) return (!int8() || std::max(count, each) <= DEEPEST) && take(at, count, products, each);
    return int8() && kept == 1 && at % (4 / bytes) == 0 && take(at, count, products, each * 4 / bytes);
  }
  // Rows of vectors that a product in int8 has behind its bias: see packer.h.
  int64_t behind(int64_t products, int64_t starts) const { return int8() ? products + (natural() ? 0 : starts) : 0; }
  bool norm(int64_t at) const { return vector(at, 2 * floats(plan.dim) + 1); }
  bool map(const Map& m, int64_t from, int64_t to, int64_t slab = DEEPEST) const {
    return small(from) && small(to) && m.depth == inputs(from, m.kept) && m.width == to &&
           vector(m.bias, floats(to), 1 + (m.kept ? 0 : behind(1, (from + slab - 1) / slab))) &&
           matrix(m.weights, outputs(to), m.depth, m.kept);
  }
  static bool none(const Map& m) { return !m.depth && !m.width && !m.weights && !m.bias && !m.kept; }
  bool cell(const CellPlan& c, const BlockPlan& b) const {
    if (!small(c.units) || !lies(c.column, c.units, b.mixed) || !lies(c.from, b.depth, row(plan.dim))) return false;
    const int64_t width = b.gates * units(c.units), panels = b.gates == 4 ? width : outputs(width);
    const int64_t recurrent = b.gates == 4;
    return vector(c.bias, width, 1 + behind(1 + recurrent, 1 + (recurrent && !c.kept))) &&
           (c.reverse == 0 || c.reverse == 1) && matrix(c.w_ih, panels, b.depth) &&
           (recurrent ? matrix(c.w_hh, inputs(c.units, c.kept), width, c.kept) : c.w_hh == 0 && c.kept == 0);
  }
  bool head(const HeadPlan& h, const BlockPlan& b) const {
    return small(h.map.depth) && lies(h.from, 1, b.mixed) && lies(h.from, h.map.depth, row(b.mixed)) &&
           lies(h.to, h.map.width, plan.dim) && map(h.map, h.map.depth, h.map.width);
  }
  bool attention(const BlockPlan& b) const {
    return b.gates == 0 && b.heads <= plan.dim && b.depth == plan.dim / b.heads && b.mixed == plan.dim &&
           b.heads * b.depth == plan.dim && b.cell_count == 0 && b.apart_count == 0 &&
           map(b.before, plan.dim, 3 * plan.dim);
  }
  bool recurrence(const BlockPlan& b) const {
    bool good = (b.gates == 4 || b.gates == 2) && small(b.depth) && b.depth == inputs(b.depth) && b.cell_count > 0 &&
                (none(b.before) || map(b.before, plan.dim, plan.dim));
    int64_t total = 0;
    for (int64_t i = 0; good && i < b.cell_count; ++i) {
      const CellPlan& c = plan.at<CellPlan>(b.cells)[i];
      good = cell(c, b) && c.kept == plan.at<CellPlan>(b.cells)->kept;  // walked together
      total += good ? c.units : 0;
    }
    for (int64_t i = 0; good && i < b.apart_count; ++i) good = head(plan.at<HeadPlan>(b.apart)[i], b);
    return good && total == b.mixed;
  }
  // Tables lie one behind the other, so that none is another's or a block's.
  template <class T>
  bool records(int64_t at, int64_t count) const {
    if (at != place || !lies(at, count, plan.length, sizeof(T) / 8)) return false;
    place += count * int64_t(sizeof(T) / 8);
    return true;
  }
  bool block(const BlockPlan& b) const {
    return norm(b.norm1) && norm(b.norm2) && small(b.mixed) && records<CellPlan>(b.cells, b.cell_count) &&
           records<HeadPlan>(b.apart, b.apart_count) && (b.heads > 0 ? attention(b) : b.heads == 0 && recurrence(b)) &&
           map(b.out, b.apart_count ? plan.dim : b.mixed, plan.dim) && map(b.fc1, plan.dim, b.fc1.width) &&
           map(b.fc2, b.fc1.width, plan.dim, HIDDEN);
  }
  bool model() const {
    const int64_t sizes[] = {plan.dim, plan.prefix, plan.channels, plan.patch_h, plan.patch_w, plan.height, plan.width};
    bool good = std::all_of(std::begin(sizes), std::end(sizes), [](int64_t n) { return n > 0 && n <= 1 << 18; });
    good = good && plan.channels <= 1 << 10 && norm(plan.norm) && plan.height >= plan.patch_h &&
           plan.width >= plan.patch_w && plan.blocks > 0 && (place = sizeof(Plan) / 8) &&
           records<BlockPlan>(place, plan.blocks) &&
           map(plan.embed, plan.channels * plan.patch_h * plan.patch_w, plan.dim) &&
           map(plan.head, plan.dim, plan.classes) && vector(plan.prefix_rows, plan.prefix, floats(plan.dim)) &&
           vector(plan.positions, plan.tokens() - plan.prefix, floats(plan.dim));
    for (int64_t i = 0; good && i < plan.blocks; ++i) good = block(plan.block(i));
    return good && place == plan.length;
  }
};

}  // namespace
