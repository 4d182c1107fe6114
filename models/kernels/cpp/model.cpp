// The door to whole models: a plan is checked, a batch shared out among teams of threads.
#include "model.h"

#include "packer.h"
#include "pass.h"

namespace {

// How a batch is shared out: `teams` teams, each taking the next slab of at most `images` images.
struct Schedule {
  int teams;
  int64_t slabs, images;
  Schedule(int64_t batch, int threads) {
    const int64_t rounds =
        (batch + threads * TILE - 1) / (threads * TILE);  // of all threads, each with up to TILE images
    const int64_t most = (batch + threads * rounds - 1) / (threads * rounds);
    const bool alone = threads == 1 || 10 * batch >= 9 * most * rounds * threads;  // at most a tenth of the time idle
    teams = alone ? threads : 1;
    slabs = alone ? (batch + most - 1) / most
                  : (batch + std::max<int64_t>(TILE, threads) - 1) / std::max<int64_t>(TILE, threads);
    images = (batch + slabs - 1) / slabs;
  }
};

template <class X>
void run_all(const Plan& plan, const float* vectors, const void* products, const Images& images, float* logits,
             int threads, Pool& pool) {
  const Sizes sizes(plan);
  const int64_t tokens = plan.tokens();
  const Schedule schedule(images.batch, threads);
  const int64_t rows = std::min(ROWS, schedule.images * tokens);
  Pieces shared_bytes, own_bytes;
  Shared<X>(shared_bytes, plan, sizes, schedule.images * tokens);
  Own<X>(own_bytes, plan, sizes, rows, std::min<int64_t>(TILE, schedule.images));
  const Scratch scratch(pool, schedule.teams * shared_bytes.bytes + threads * own_bytes.bytes);
  Team team;
  std::atomic<int64_t> next{0};
  in_parallel(threads, [&](int me, int count) {
    const bool alone = schedule.teams > 1 || count == 1;
    Team self;
    Member member(alone ? self : team, alone ? 0 : me, alone ? 1 : count);
    Pieces mine{scratch.data() + (alone ? me : 0) * shared_bytes.bytes};
    const Shared<X> shared(mine, plan, sizes, schedule.images * tokens);
    mine = {scratch.data() + schedule.teams * shared_bytes.bytes + me * own_bytes.bytes};
    const Own<X> own(mine, plan, sizes, rows, std::min<int64_t>(TILE, schedule.images));
    Pass<X> pass(plan, vectors, products, shared, own, member);
    for (int64_t i = alone ? next++ : 0; i < schedule.slabs; i = alone ? next++ : i + 1) {
      const int64_t first = images.batch * i / schedule.slabs;
      Images slab = images;
      slab.data += first * images.image;
      slab.batch = images.batch * (i + 1) / schedule.slabs - first;
      pass.run(slab, logits + first * plan.classes);
    }
  });
}

}  // namespace

namespace far_engine {

const char* find_fault(const int64_t* plan, int64_t length, int64_t vectors, int64_t products, int64_t precision,
                       bool natural) {
  if (length < int64_t(sizeof(Plan) / 8)) return "no plan of a model";
  const Plan& p = *reinterpret_cast<const Plan*>(plan);
  if (p.layout != LAYOUT) return "a plan of another version";
  const int64_t packed_for = precision == INT8 ? V + SHIFT : V;  // V alone does not say how 8 bits are stored
  if (p.vector_width != (natural ? NATURAL : packed_for)) return "packed for another kind of CPU";
  if (p.precision != precision) return "weights of another precision";
  if (precision == BFLOAT16 && !natural && !FAR_BFLOAT16) return "bfloat16 weights need AVX512_BF16";
  if (p.length != length || !Checker{p, vectors, products}.model()) return "a damaged plan";
  return nullptr;
}

void run(const Plan& plan, const float* vectors, const void* products, const float* images, int64_t batch,
         const int64_t* strides, float* logits, int threads, Pool& pool) {
  const Images from{images, batch, strides[0], strides[1], strides[2], strides[3]};
#if FAR_BFLOAT16
  if (plan.precision == BFLOAT16) return run_all<bf16>(plan, vectors, products, from, logits, threads, pool);
#endif
  if (plan.precision == INT8) return run_all<q8>(plan, vectors, products, from, logits, threads, pool);
  run_all<float>(plan, vectors, products, from, logits, threads, pool);
}

Packed pack(const Plan& natural, const float* vectors, int64_t vector_count, const void* products,
            int64_t product_count) {
  if (natural.precision == FLOAT32)
    return Packer<float, float>(natural, vectors, vector_count, products, product_count);
  if (natural.precision == INT8) return Packer<q8, int8_t>(natural, vectors, vector_count, products, product_count);
  using Product = std::conditional_t<FAR_BFLOAT16, bf16, float>;
  return Packer<Product, bf16>(natural, vectors, vector_count, products, product_count);
}

}  // namespace far_engine
