// How a team goes through the model. Everything but mixing is local to a row: a member takes a tile of rows from mixing
// to mixing while they lie in its cache. So a block is two phases with a barrier behind each:
//
//   mix    p (rows, D) -> z (rows, sum u)   a task is a cell and a tile of images, or P queries of a head of an image
//   rows   z -> x += out, norm2, fc1, GELU, x += fc2, the next block's norm1 and pre_proj -> p
//
// x, the residual stream, is float32; p, z and everything else a product reads is X, float or bfloat16. Where X is
// int8, z and whatever one member alone needs is float32 until a product reads it: rows are quantized then. With at
// least as many images as threads each thread is a team of its own and there are no barriers at all.
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

constexpr int64_t ROWS = 128;  // rows that go from mixing to mixing together

// Whether cells are walked by AMX.
template <class X>
bool by_tiles(int64_t tokens) {
  return std::is_same_v<X, bf16> && tokens >= amx::ROWS && amx::here();
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
  float *x, *qkv, *scales;  // scales: of p, in int8
  X* p;
  Stored<X>* z;
  Shared(Pieces& pieces, const Plan& plan, const Sizes& sizes, int64_t rows)
      : ldx(spaced(plan.dim)), ldz(spaced(sizes.mixed)), ldqkv(spaced(3 * plan.dim)) {
    x = pieces.take<float>(rows * ldx);
    qkv = pieces.take<float>(sizes.attention ? rows * ldqkv : 0);
    scales = pieces.take<float>(rows);
    p = pieces.take<X>(rows * ldx);
    z = pieces.take<Stored<X>>(rows * ldz);
  }
};

// What a member has for itself, for a tile of `rows` tokens and walks over `images`.
template <class X>
struct Own {
  int64_t ldwide, ldread, each;  // each: floats of a walk over one image
  Stored<X>*normed, *joined, *wide;
  float *work, *logits, *scales;
  X* read;  // with `scales`, in int8: the rows that a product reads
  Own(Pieces& pieces, const Plan& plan, const Sizes& sizes, int64_t rows, int64_t images)
      : ldwide(spaced(std::max(std::min(sizes.hidden, HIDDEN), plan.embed.depth))),
        ldread(std::max({ldwide, spaced(plan.dim), spaced(sizes.mixed)})) {
    normed = pieces.take<Stored<X>>(rows * spaced(plan.dim));
    joined = pieces.take<Stored<X>>(rows * spaced(plan.dim));
    wide = pieces.take<Stored<X>>(rows * ldwide);
    scales = pieces.take<float>(rows);
    read = pieces.take<X>(is_q8<X> ? rows * ldread : 0);
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
  using Y = Stored<X>;

  template <class T>
  Weights<T> weights(const Map& map) const {
    const float *bias = vectors + map.bias, *scales = bias + padded(map.width);
    return {(const T*)(products + map.weights), bias, map.depth, padded(map.width), map.depth * P, scales,
            scales + padded(map.width)};
  }

  // Rows as a product in X reads them, for as long as no others are read; behind their `width` lie another's numbers.
  Rows<X> read(const Y* a, int64_t lda, int64_t rows, int64_t depth, int64_t width) {
    if constexpr (is_q8<X>) {
      quantize_rows(a, lda, rows, depth, own.read, own.ldread, own.scales, width);
      return {own.read, own.ldread, own.scales};
    } else {
      return {a, lda};
    }
  }

  // Calls f(rows, weights) with what the product of `map` reads, of its inputs from..from + count.
  template <class F>
  void with(const Map& map, const Y* a, int64_t lda, int64_t rows, const F& f, int64_t from = 0,
            int64_t count = INT64_MAX, int64_t width = INT64_MAX) {
    if constexpr (is_q8<X>)
      if (map.kept) return f(Rows<Y>{a, lda}, weights<Y>(map).rows(from, count));
    const Weights<X> w = weights<X>(map).rows(from, count);
    f(read(a, lda, rows, w.depth, width), w);
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
    with(plan.embed, own.wide, own.ldwide, count, [&](const auto& a, auto w) {
      w.ldb = padded(plan.dim);
      w.bias = vectors + plan.positions + first * w.ldb;
      multiply(a, count, w, x, all.ldx);
    });
  }

  // norm1 and pre_proj: x to what mixing reads.
  void prepare(const BlockPlan& block, int64_t row, int64_t count) {
    const float* x = all.x + row * all.ldx;
    Y* p = own.joined;
    if constexpr (!is_q8<X>) p = all.p + row * all.ldx;
    Y* normed = block.before.width ? own.normed : p;
    norm_rows(x, all.ldx, count, plan.dim, vectors + block.norm1, normed, all.ldx);
    if (block.before.width)
      with(block.before, normed, all.ldx, count, [&](const auto& a, const auto& w) {
        if (block.heads)
          multiply(a, count, w, all.qkv + row * all.ldqkv, all.ldqkv);
        else
          multiply_to(a, count, w, p, all.ldx);
      });
    if constexpr (is_q8<X>)
      if (!block.heads)
        quantize_rows(p, all.ldx, count, padded(plan.dim), all.p + row * all.ldx, all.ldx, all.scales + row);
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
    const Problem<X> problem{all.p,   all.z,     tokens, block.depth, tokens * all.ldx, all.ldx, tokens * all.ldz,
                             all.ldz, all.scales};
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
      const float* bias = vectors + c.bias;
      const Weights<X> gates{products + c.w_ih, bias,         block.depth,     width,
                             block.depth * P,   bias + width, bias + 2 * width};
      const int64_t steps = last && !c.reverse ? 1 : tokens;
      scan_cell(gates, Rows<X>{all.p + row * all.ldx + c.from, all.ldx, all.scales + row}, tokens, steps, c.reverse,
                c.units, all.z + row * all.ldz + c.column, all.ldz, own.work);
      clear_behind(block, c, image, 1);
    });
  }

  // Zeros behind the last cell's columns of `count` images: products read all but float32 up to the padded width.
  void clear_behind(const BlockPlan& block, const CellPlan& c, int64_t image, int64_t count) {
    if (std::is_same_v<X, float> || c.column + c.units != block.mixed) return;
    for (int64_t row = image * tokens; row < (image + count) * tokens; ++row)
      std::memset(all.z + row * all.ldz + block.mixed, 0, (all.ldz - block.mixed) * sizeof(Y));
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
#if FAR_AMX
    if constexpr (std::is_same_v<X, bf16>)
      if (by_tiles<X>(tokens))
        return walk_together<TileWalk>(count, steps, [&](std::optional<TileWalk>& walk, int64_t i) {
          walk.emplace(problem, cells[i], first, rows, own.work + i * own.each);
        });
#endif
    if constexpr (is_q8<X>)
      if (plans[0].kept) return walk_by<Y>(problem, cells, count, steps, first, rows);
    walk_by<X>(problem, cells, count, steps, first, rows);
  }

  // The same with W_hh in H.
  template <class H>
  void walk_by(const Problem<X>& problem, const Cell<X>* cells, int64_t count, const int64_t* steps, int64_t first,
               int64_t rows) {
    using One = Walk<1, false, H, X>;
    if (rows > 1) return RUN<false, H, X>[rows](problem, cells[0], Kept{}, first, steps[0], own.work);
    walk_together<One>(count, steps, [&](std::optional<One>& walk, int64_t i) {
      walk.emplace(problem, cells[i], nothing, first, own.work + i * own.each);
    });
  }

  void attention(const BlockPlan& block, int64_t images, bool last) {
    const int64_t queries = last ? 1 : tokens, tiles = (queries + P - 1) / P;
    member.share(images * block.heads * tiles, [&](int64_t i) {
      const int64_t image = i / tiles / block.heads, head = i / tiles % block.heads, first = i % tiles * P;
      const Heads heads{all.qkv + image * tokens * all.ldqkv, all.ldqkv, tokens, block.heads, block.depth};
      Y* z = all.z + image * tokens * all.ldz;
      attend(heads, head, first, std::min<int64_t>(P, queries - first), z, all.ldz, own.work);
      if (head == 0)
        for (int64_t row = first; row < std::min(first + P, queries); ++row)
          std::memset(z + row * all.ldz + block.mixed, 0, (all.ldz - block.mixed) * sizeof(Y));
    });
  }

  // Output map and MLP of every `hop`-th row from `row` on, added to x.
  void finish(const BlockPlan& block, int64_t row, int64_t count, int64_t hop) {
    float* x = all.x + row * all.ldx;
    const Y* z = all.z + row * all.ldz;
    const int64_t ldx = hop * all.ldx, ldz = hop * all.ldz;
    if (block.apart_count) {
      for (int64_t h = 0; h < block.apart_count; ++h) {
        const HeadPlan* head = plan.at<HeadPlan>(block.apart) + h;
        const int64_t behind = h + 1 < block.apart_count ? head[1].from : block.mixed;
        const auto project = [&](const auto& a, const auto& w) {
          multiply_to(a, count, w, own.joined + head->to, all.ldx);
        };
        with(head->map, z + head->from, ldz, count, project, 0, INT64_MAX, behind - head->from);
      }
      // Heads may end before the padding that `out` reads, where another pass's bytes may be no numbers.
      for (int64_t r = 0; r < count; ++r)
        std::memset(own.joined + r * all.ldx + plan.dim, 0, (all.ldx - plan.dim) * sizeof(Y));
    }
    with(block.out, block.apart_count ? own.joined : z, block.apart_count ? all.ldx : ldz, count,
         [&](const auto& a, const auto& w) { multiply_add(a, count, w, x, ldx); });
    norm_rows(x, ldx, count, plan.dim, vectors + block.norm2, own.normed, all.ldx);
    for (int64_t n = 0; n < block.fc1.width; n += HIDDEN) {
      with(block.fc1, own.normed, all.ldx, count, [&](const auto& a, const auto& w) {
        multiply_into(a, count, w.columns(n, HIDDEN), own.wide, own.ldwide, gelu);
      });
      const auto add = [&](const auto& a, auto w) {
        if (n) w.bias = zeros();
        multiply_add(a, count, w, x, ldx);
      };
      with(block.fc2, own.wide, own.ldwide, count, add, n, HIDDEN);
    }
  }

  // The last block's second half, the final norm and the classifier, for the first tokens of images.
  void classify(const BlockPlan& block, int64_t image, int64_t count, float* logits) {
    finish(block, image * tokens, count, tokens);
    const int64_t ld = padded(plan.classes);
    norm_rows(all.x + image * tokens * all.ldx, tokens * all.ldx, count, plan.dim, vectors + plan.norm, own.normed,
              all.ldx);
    with(plan.head, own.normed, all.ldx, count,
         [&](const auto& a, const auto& w) { multiply(a, count, w, own.logits, ld); });
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
