// A whole vision transformer whose blocks mix tokens by LSTMs, minGRUs or attention, images to logits.
//
// It comes as three pieces of memory: `products`, all packed matrices (float32 or bfloat16, see product.h); `vectors`,
// all biases, norms and positions (float32, padded with zeros to whole panels); `plan`, 64-bit integers that say where
// in the two each part lies. The plan is one Plan, then a record a block, a cell and a head projection.
// deploy/packed.py writes it, in the order in which the members stand here.
#pragma once
#include <cstdint>

namespace far_model {

constexpr int64_t LAYOUT = 3;  // grows with every change of what follows

// A linear map: `depth` inputs as they are packed, `width` outputs. Places in products and in vectors.
struct Map {
  int64_t depth, width, weights, bias;
};

// One direction of one head: reads `depth` channels (the block's) from channel `from` on, writes hidden states from
// `column` on. A minGRU has no w_hh.
struct CellPlan {
  int64_t units, reverse, from, column, w_ih, w_hh, bias;
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
  int64_t layout, vector_width, bfloat16, length;     // length: of the plan, in integers
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

// What is wrong with a plan for memory of these sizes, in words; null where nothing is.
const char* find_fault(const int64_t* plan, int64_t length, int64_t vectors, int64_t products, bool bfloat16);

// Images (B, channels, height, width) with strides in floats to logits (B, classes).
void run(const Plan& plan, const float* vectors, const void* products, const float* images, int64_t batch,
         const int64_t* strides, float* logits, int threads);

}  // namespace far_model
