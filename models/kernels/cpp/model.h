// A whole vision transformer whose blocks mix tokens by LSTMs, minGRUs or attention, images to logits.
//
// It comes as three pieces of memory: `products`, all matrices (float32, bfloat16 or int8); `vectors`, all biases,
// norms and positions, and scales of int8 (float32); `plan`, 64-bit integers that say where in the two each part lies:
// one Plan, then a record a block, a cell and a head projection. There are two forms:
//
//   natural   matrices (outputs, inputs), row by row; of cells in torch's order, gate by gate. It is the same on every
//             machine; deploy/packed.py writes it, in the order in which the members stand here
//   packed    for vectors of V floats: see product.h and recurrence.h; vectors are padded with zeros to whole panels.
//             packer.h makes it of the natural form, and run reads it
#pragma once
#include <cstdint>
#include <new>
#include <vector>

#include "pool.h"

namespace far_engine {

constexpr int64_t LAYOUT = 5;   // grows with every change of what follows
constexpr int64_t NATURAL = 0;  // as the plan's vector_width
enum Precision : int64_t { FLOAT32, BFLOAT16, INT8, PRECISIONS };
constexpr int64_t BYTES[PRECISIONS] = {4, 2, 1};  // of a number in natural products
constexpr int64_t DEEPEST = 1 << 17;              // inputs whose 8-bit products fit a sum of 32 bits

// Memory that begins on a cache line.
template <class T>
struct Aligned {
  using value_type = T;
  static constexpr std::align_val_t LINE{64};
  Aligned() = default;
  template <class Y>
  Aligned(const Aligned<Y>&) {}
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), LINE)); }
  void deallocate(T* p, size_t) { ::operator delete(p, LINE); }
  bool operator==(const Aligned&) const { return true; }
};
template <class T>
using Numbers = std::vector<T, Aligned<T>>;

// A linear map: `depth` inputs (padded where they are packed in less than float32), `width` outputs. Places in products
// and in vectors. kept: its weights are float32 in a model in int8; else scales of outputs lie behind the bias.
struct Map {
  int64_t depth, width, weights, bias, kept;
};

// One direction of one head: reads `depth` channels (the block's) from channel `from` on, writes hidden states from
// `column` on. A minGRU has no w_hh. In int8 scales of w_ih and of w_hh lie behind the bias; kept: w_hh is float32.
struct CellPlan {
  int64_t units, reverse, from, column, w_ih, w_hh, bias, kept;
};

// A head projection that stays apart from the output map: reads hidden states from `from` on, writes channels from `to`
// on.
struct HeadPlan {
  int64_t from, to;
  Map map;
};

struct BlockPlan {
  int64_t norm1, norm2;        // weight, bias, epsilon in vectors
  int64_t heads;               // of attention; 0 where the block has cells
  int64_t gates;               // of a cell: 4 of an LSTM, 2 of a minGRU; 0 of attention
  int64_t depth;               // channels that a cell reads, or that a head of attention has
  int64_t mixed;               // channels that mixing gives: sum of all units, or D
  int64_t cells, cell_count;   // place in the plan; the costliest first
  int64_t apart, apart_count;  // head projections, none where they are merged into `out`
  Map before;                  // pre_proj, or q (scaled), k and v; width 0 where pre_proj is merged into the cells
  Map out, fc1, fc2;
};

struct Plan {
  int64_t layout, vector_width, precision, length;    // length: of the plan, in integers
  int64_t channels, height, width, patch_h, patch_w;  // of images, in pixels
  int64_t prefix, dim, blocks, classes;
  int64_t prefix_rows, positions;  // (prefix, D) with positions added; (patches, D) with the embedding's bias added
  int64_t norm;
  Map embed, head;

  int64_t columns() const { return width / patch_w; }
  int64_t tokens() const { return prefix + height / patch_h * columns(); }
  const BlockPlan& block(int64_t i) const { return reinterpret_cast<const BlockPlan*>(this + 1)[i]; }
  template <class T>
  const T* at(int64_t place) const {
    return reinterpret_cast<const T*>(reinterpret_cast<const int64_t*>(this) + place);
  }
};

// What is wrong with a plan of this form for memory of these sizes, in words; null where nothing is.
const char* find_fault(const int64_t* plan, int64_t length, int64_t vectors, int64_t products, int64_t precision,
                       bool natural);

// Images (B, channels, height, width) with strides in floats to logits (B, classes), by a packed plan without fault.
void run(const Plan& plan, const float* vectors, const void* products, const float* images, int64_t batch,
         const int64_t* strides, float* logits, int threads, Pool& pool);

// A natural plan without fault and its numbers, packed for this CPU. Products in bfloat16 stay so where this CPU
// computes in it, else they become float32.
struct Packed {
  std::vector<int64_t> plan;
  Numbers<float> vectors;
  Numbers<char> products;

  const Plan& head() const { return *reinterpret_cast<const Plan*>(plan.data()); }
};
Packed pack(const Plan& natural, const float* vectors, int64_t vector_count, const void* products,
            int64_t product_count);

}  // namespace far_engine
