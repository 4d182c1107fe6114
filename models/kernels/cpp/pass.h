// How a team goes through the model. Everything but mixing is local to a row: a member takes a tile of rows from mixing
// to mixing while they lie in its cache. So a block is two phases with a barrier behind each:
//
//   mix    p (rows, D) -> z (rows, sum u)   a task is a cell and a tile of images, or P queries of a head of an image
//   rows   z -> x += out, norm2, fc1, GELU, x += fc2, the next block's norm1 and pre_proj -> p
//
// x, the residual stream, is float32; p, z and everything else a product reads is X, float or bfloat16.
// With at least as many images as threads each thread is a team of its own and there are no barriers at all.
#pragma once
#include "attention.h"
#include "model.h"
#include "recurrence.h"
#include "rows.h"
#include "scan.h"
#include "team.h"
#include "tilewalk.h"

namespace {

using namespace far_engine;

constexpr int64_t ROWS = 128;    // rows that go from mixing to mixing together
constexpr int64_t HIDDEN = 768;  // hidden units of the MLP between fc1 and fc2 at once, whole panels
static_assert(HIDDEN % P == 0);

// Whether cells are walked by AMX.
template <class X>
bool by_tiles(int64_t tokens) {
  return !std::is_same_v<X, float> && tokens >= amx::ROWS && amx::here();
}

constexpr int64_t spaced(int64_t width) {
  return padded(width) + GRAIN;
}  // rows' distance: no power of two, room to overrun

// The largest sizes among the blocks.
struct Sizes {
  int64_t mixed = 0, units = 0, hidden = 0, attention = 0;
  explicit Sizes(const Plan& plan) {
    for (int64_t i = 0; i < plan.blocks; ++i) {
      const BlockPlan& b = plan.block(i);
      mixed = std::max(mixed, b.mixed);
      hidden = std::max(hidden, b.fc1.width);
      if (b.heads) attention = std::max(attention, attention_floats(plan.tokens(), b.depth));
      for (int64_t k = 0; k < b.cell_count; ++k) units = std::max(units, plan.at<CellPlan>(b.cells)[k].units);
    }
  }
};

// What a team shares, for `rows` tokens.
template <class X>
struct Shared {
  int64_t ldx, ldz, ldqkv;
  float *x, *qkv;
  X *p, *z;
  Shared(Pieces& pieces, const Plan& plan, const Sizes& sizes, int64_t rows)
      : ldx(spaced(plan.dim)), ldz(spaced(sizes.mixed)), ldqkv(spaced(3 * plan.dim)) {
    x = pieces.take<float>(rows * ldx);
    qkv = pieces.take<float>(sizes.attention ? rows * ldqkv : 0);
    p = pieces.take<X>(rows * ldx);
    z = pieces.take<X>(rows * ldz);
  }
};

// What a member has for itself, for a tile of `rows` tokens and walks over `images`.
template <class X>
struct Own {
  int64_t ldwide, each;  // each: floats of a walk over one image
  X *normed, *joined, *wide;
  float *work, *logits;
  Own(Pieces& pieces, const Plan& plan, const Sizes& sizes, int64_t rows, int64_t images)
      : ldwide(spaced(std::max(std::min(sizes.hidden, HIDDEN), plan.embed.depth))) {
    normed = pieces.take<X>(rows * spaced(plan.dim));
    joined = pieces.take<X>(rows * spaced(plan.dim));
    wide = pieces.take<X>(rows * ldwide);
    const int64_t U = (sizes.units + V - 1) / V * V;
    const auto floats = [&](int64_t rows) { return std::max(walk_floats(rows, U, false), tile_walk_floats(rows, U)); };
    each = floats(1);
    work = pieces.take<float>(
        std::max({TOGETHER * each, floats(images), scan_floats(U), sizes.attention, padded(plan.embed.depth)}));
    logits = pieces.take<float>(rows * padded(plan.classes));
  }
};

// One member's way through the model, for `images` images.
template <class X>
class Pass {
 public:
  Pass(const Plan& plan, const float* vectors, const void* products, const Shared<X>& shared, const Own<X>& own,
       Member& member)
      : plan(plan),
        vectors(vectors),
        products(static_cast<const X*>(products)),
        all(shared),
        own(own),
        member(member),
        tokens(plan.tokens()) {}

  void run(const Images& from, float* logits) {
    member.rows(from.batch * tokens, ROWS, [&](int64_t row, int64_t count) { embed(from, row, count); });
    member.meet();
    for (int64_t i = 0; i < plan.blocks; ++i) {
      const BlockPlan& block = plan.block(i);
      const bool last = i + 1 == plan.blocks;
      mix(block, from.batch, last);
      member.meet();
      if (last)  // the classifier reads the first token alone: once tokens are mixed, only that one goes on
        member.rows(from.batch, ROWS, [&](int64_t image, int64_t count) { classify(block, image, count, logits); });
      else
        member.rows(from.batch * tokens, ROWS, [&](int64_t row, int64_t count) {
          finish(block, row, count, 1);
          prepare(plan.block(i + 1), row, count);
        });
      member.meet();
    }
  }

 private:
  Weights<X> weights(const Map& map) const {
    return {products + map.weights, vectors + map.bias, map.depth, padded(map.width), map.depth * P};
  }

  // x of tokens row..row + count: prefix tokens as they are, patches through the embedding, positions added.
  void embed(const Images& from, int64_t row, int64_t count) {
    for (int64_t r = row; r < row + count;) {
      const int64_t token = r % tokens, here = std::min(row + count - r, tokens - token);
      if (token < plan.prefix) {
        std::memcpy(all.x + r * all.ldx, vectors + plan.prefix_rows + token * padded(plan.dim),
                    padded(plan.dim) * sizeof(float));
        ++r;
        continue;
      }
      patches(from, r / tokens, token - plan.prefix, here, all.x + r * all.ldx);
      r += here;
    }
    std::memset(all.p + row * all.ldx, 0, count * all.ldx * sizeof(X));  // what no block writes must be numbers too
    prepare(plan.block(0), row, count);
  }

  void patches(const Images& from, int64_t image, int64_t first, int64_t count, float* x) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t y = (first + i) / plan.columns() * plan.patch_h, left = (first + i) % plan.columns() * plan.patch_w;
      const float* corner = from.data + image * from.image + y * from.row + left * from.column;
      patch_row(from, corner, plan.channels, plan.patch_h, plan.patch_w, own.work, own.wide + i * own.ldwide);
    }
    Weights<X> w = weights(plan.embed);
    w.bias = vectors + plan.positions + first * padded(plan.dim);
    multiply(own.wide, own.ldwide, count, w, x, all.ldx, padded(plan.dim));
  }

  // norm1 and pre_proj: x to what mixing reads.
  void prepare(const BlockPlan& block, int64_t row, int64_t count) {
    const float* x = all.x + row * all.ldx;
    X* p = all.p + row * all.ldx;
    X* normed = block.before.width ? own.normed : p;
    norm_rows(x, all.ldx, count, plan.dim, vectors + block.norm1, normed, all.ldx);
    if (block.heads)
      multiply(normed, all.ldx, count, weights(block.before), all.qkv + row * all.ldqkv, all.ldqkv);
    else if (block.before.width)
      multiply_to(normed, all.ldx, count, weights(block.before), p, all.ldx);
  }

  void mix(const BlockPlan& block, int64_t images, bool last) {
    if (block.heads)
      attention(block, images, last);
    else if (block.gates == 2)
      scan(block, images, last);
    else
      recurrence(block, images, last);
  }

  void recurrence(const BlockPlan& block, int64_t images, bool last) {
    const Problem<X> problem{all.p, all.z, tokens, block.depth, tokens * all.ldx, all.ldx, tokens * all.ldz, all.ldz};
    const int64_t tiles = (images + TILE - 1) / TILE, cells = block.cell_count;
    const int64_t group = images > 1 ? 1 : together(block);
    member.share((cells + group - 1) / group * tiles, [&](int64_t i) {
      const int64_t k = i / tiles * group, count = std::min(group, cells - k);
      const int64_t first = images * (i % tiles) / tiles, rows = images * (i % tiles + 1) / tiles - first;
      walk(problem, plan.at<CellPlan>(block.cells) + k, count, first, rows, last);
      for (int64_t n = 0; n < count; ++n) clear_behind(block, plan.at<CellPlan>(block.cells)[k + n], first, rows);
    });
  }

  void scan(const BlockPlan& block, int64_t images, bool last) {
    member.share(block.cell_count * images, [&](int64_t i) {
      const CellPlan& c = plan.at<CellPlan>(block.cells)[i / images];
      const int64_t image = i % images, row = image * tokens, width = 2 * ((c.units + V - 1) / V * V);
      const Weights<X> gates{products + c.w_ih, vectors + c.bias, block.depth, width, block.depth * P};
      const int64_t steps = last && !c.reverse ? 1 : tokens;
      scan_cell(gates, all.p + row * all.ldx + c.from, all.ldx, tokens, steps, c.reverse, c.units,
                all.z + row * all.ldz + c.column, all.ldz, own.work);
      clear_behind(block, c, image, 1);
    });
  }

  // Zeros behind the last cell's columns of `count` images: products read bfloat16 up to the padded width.
  void clear_behind(const BlockPlan& block, const CellPlan& c, int64_t image, int64_t count) {
    if (std::is_same_v<X, float> || c.column + c.units != block.mixed) return;
    for (int64_t row = image * tokens; row < (image + count) * tokens; ++row)
      std::memset(all.z + row * all.ldz + block.mixed, 0, (all.ldz - block.mixed) * sizeof(X));
  }

  // How many cells of a single image are walked together: while there is work for all members, and W_hh stay in a
  // core's first cache: three cells of 16 units then go faster than one by one, two of 64 slower. Batches fill a core
  // anyway.
  int64_t together(const BlockPlan& block) const {
    constexpr int64_t CACHE = 32768;
    const int64_t units = plan.at<CellPlan>(block.cells)[0].units, bytes = 4 * units * units * sizeof(X);
    return std::clamp<int64_t>(std::min(block.cell_count / member.team_size(), CACHE / bytes), 1, TOGETHER);
  }

  // `count` cells over the tokens of images first..first + rows, one image where they are several.
  void walk(const Problem<X>& problem, const CellPlan* plans, int64_t count, int64_t first, int64_t rows, bool last) {
    Cell<X> cells[TOGETHER];
    int64_t steps[TOGETHER];
    for (int64_t i = 0; i < count; ++i) {
      const CellPlan& c = plans[i];
      steps[i] = last && !c.reverse ? 1 : tokens;  // who reads the first token alone asks no more of this direction
      cells[i] = {products + c.w_ih,
                  products + c.w_hh,
                  vectors + c.bias,
                  c.units,
                  (c.units + V - 1) / V,
                  c.reverse,
                  c.from,
                  c.column,
                  4 * V,
                  problem.depth * 4 * V};
    }
    constexpr bool HALF = !std::is_same_v<X, float>;
#if FAR_AMX
    if constexpr (HALF)
      if (by_tiles<X>(tokens))
        return walk_together<TileWalk>(count, steps, [&](std::optional<TileWalk>& walk, int64_t i) {
          walk.emplace(problem, cells[i], first, rows, own.work + i * own.each);
        });
#endif
    using One = Walk<1, false, HALF, X>;
    if (rows > 1) return RUN<false, HALF, X>[rows](problem, cells[0], Kept{}, first, steps[0], own.work);
    walk_together<One>(count, steps, [&](std::optional<One>& walk, int64_t i) {
      walk.emplace(problem, cells[i], nothing, first, own.work + i * own.each);
    });
  }

  void attention(const BlockPlan& block, int64_t images, bool last) {
    const int64_t queries = last ? 1 : tokens, tiles = (queries + P - 1) / P;
    member.share(images * block.heads * tiles, [&](int64_t i) {
      const int64_t image = i / tiles / block.heads, head = i / tiles % block.heads, first = i % tiles * P;
      const Heads heads{all.qkv + image * tokens * all.ldqkv, all.ldqkv, tokens, block.heads, block.depth};
      X* z = all.z + image * tokens * all.ldz;
      attend(heads, head, first, std::min<int64_t>(P, queries - first), z, all.ldz, own.work);
      if (head == 0)
        for (int64_t row = first; row < std::min(first + P, queries); ++row)
          std::memset(z + row * all.ldz + block.mixed, 0, (all.ldz - block.mixed) * sizeof(X));
    });
  }

  // Output map and MLP of every `hop`-th row from `row` on, added to x.
  void finish(const BlockPlan& block, int64_t row, int64_t count, int64_t hop) {
    float* x = all.x + row * all.ldx;
    const X* z = all.z + row * all.ldz;
    const int64_t ldx = hop * all.ldx, ldz = hop * all.ldz;
    if (block.apart_count) {
      for (int64_t h = 0; h < block.apart_count; ++h) {
        const HeadPlan& head = plan.at<HeadPlan>(block.apart)[h];
        multiply_to(z + head.from, ldz, count, weights(head.map), own.joined + head.to, all.ldx);
      }
      // Heads may end before the padding that `out` reads, where another pass's bytes may be no numbers.
      for (int64_t r = 0; r < count; ++r)
        std::memset(own.joined + r * all.ldx + plan.dim, 0, (all.ldx - plan.dim) * sizeof(X));
      multiply_add(own.joined, all.ldx, count, weights(block.out), x, ldx);
    } else {
      multiply_add(z, ldz, count, weights(block.out), x, ldx);
    }
    norm_rows(x, ldx, count, plan.dim, vectors + block.norm2, own.normed, all.ldx);
    const Weights<X> fc1 = weights(block.fc1), fc2 = weights(block.fc2);
    const int64_t hidden = block.fc1.width;
    for (int64_t n = 0; n < hidden; n += HIDDEN) {
      multiply_into(own.normed, all.ldx, count, fc1.columns(n, HIDDEN), own.wide, own.ldwide, gelu);
      Weights<X> part = fc2.rows(n, HIDDEN);
      if (n) part.bias = zeros();
      multiply_add(own.wide, own.ldwide, count, part, x, ldx);
    }
  }

  // The last block's second half, the final norm and the classifier, for the first tokens of images.
  void classify(const BlockPlan& block, int64_t image, int64_t count, float* logits) {
    finish(block, image * tokens, count, tokens);
    const int64_t ld = padded(plan.classes);
    norm_rows(all.x + image * tokens * all.ldx, tokens * all.ldx, count, plan.dim, vectors + plan.norm, own.normed,
              all.ldx);
    multiply(own.normed, all.ldx, count, weights(plan.head), own.logits, ld);
    for (int64_t i = 0; i < count; ++i)
      std::memcpy(logits + (image + i) * plan.classes, own.logits + i * ld, plan.classes * sizeof(float));
  }

  const float* zeros() const { return vectors; }  // the plan begins vectors with a row of zeros

  const Plan& plan;
  const float* vectors;
  const X* products;
  const Shared<X>& all;
  const Own<X>& own;
  Member& member;
  const int64_t tokens;
  const Kept nothing{};
};

}  // namespace
