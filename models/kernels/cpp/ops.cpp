// The operators' names and types. Compiled for one namespace a set of compiler flags (models/kernels/cpu.py).
#include "gradients.h"
#include "layer.h"
#include "model.h"

namespace {

constexpr auto INT8_TYPE = sizeof(q8) == 1 ? at::kChar : at::kShort;  // of packed products

// The plan, checked against the other two.
const far_engine::Plan& plan_of(const at::Tensor& plan, const at::Tensor& vectors, const at::Tensor& products,
                                bool natural) {
  TORCH_CHECK(plan.scalar_type() == at::kLong && vectors.scalar_type() == at::kFloat && plan.is_contiguous() &&
                  vectors.is_contiguous() && products.is_contiguous(),
              "a plan in int64, vectors in float32");
  const auto type = products.scalar_type();
  const bool int8 = type == at::kChar || type == at::kShort;
  TORCH_CHECK(type == at::kFloat || type == at::kBFloat16 || int8, "products must be float32, bfloat16 or int8");
  TORCH_CHECK(!int8 || type == (natural ? at::kChar : INT8_TYPE),
              "packed for another kind of CPU: load the unfused model and fuse it here");
  const int64_t precision = int8                    ? far_engine::INT8
                            : type == at::kBFloat16 ? far_engine::BFLOAT16
                                                    : far_engine::FLOAT32;
  const int64_t* from = plan.const_data_ptr<int64_t>();
  const char* fault = far_engine::find_fault(from, plan.numel(), vectors.numel(), products.numel(), precision, natural);
  TORCH_CHECK(!fault, fault, ": load the unfused model and fuse it here");
  return *reinterpret_cast<const far_engine::Plan*>(from);
}

// A model's natural form to its packed one, see model.h: plan, vectors, products.
std::tuple<at::Tensor, at::Tensor, at::Tensor> pack_model(const at::Tensor& plan, const at::Tensor& vectors,
                                                          const at::Tensor& products) {
  const auto& natural = plan_of(plan, vectors, products, true);
  const far_engine::Packed packed = far_engine::pack(natural, vectors.const_data_ptr<float>(), vectors.numel(),
                                                     products.const_data_ptr(), products.numel());
  const auto copy = [](const auto& from, at::ScalarType type) {
    const int64_t bytes = from.size() * sizeof(from[0]);
    at::Tensor to = at::empty({bytes / int64_t(at::elementSize(type))}, type);
    std::memcpy(to.mutable_data_ptr(), from.data(), bytes);
    return to;
  };
  constexpr at::ScalarType types[] = {at::kFloat, at::kBFloat16, INT8_TYPE};
  return {copy(packed.plan, at::kLong), copy(packed.vectors, at::kFloat),
          copy(packed.products, types[packed.head().precision])};
}

// Images (B, channels, height, width) of any strides to logits (B, classes), by a packed model.
at::Tensor model(const at::Tensor& images, const at::Tensor& plan, const at::Tensor& vectors,
                 const at::Tensor& products, int64_t classes) {
  const auto& p = plan_of(plan, vectors, products, false);
  TORCH_CHECK(images.dim() == 4 && images.scalar_type() == at::kFloat && images.size(1) == p.channels &&
                  images.size(2) == p.height && images.size(3) == p.width && classes == p.classes,
              "images must be (B, ", p.channels, ", ", p.height, ", ", p.width, "), float32");
  at::Tensor logits = at::empty({images.size(0), classes}, images.options(), at::MemoryFormat::Contiguous);
  static auto* pool = new far_engine::Pool;  // never destroyed: threads may outlive static objects
  if (images.size(0))
    far_engine::run(p, vectors.const_data_ptr<float>(), products.const_data_ptr(), images.const_data_ptr<float>(),
                    images.size(0), images.strides().data(), logits.mutable_data_ptr<float>(), at::get_num_threads(),
                    *pool);
  return logits;
}

// Whether this CPU has what the compiler was told to use: a library made for another machine then registers nothing.
bool runs_here() {
  bool has = true;
#if defined(__x86_64__)
  __builtin_cpu_init();
#ifdef __AVX2__
  has = has && __builtin_cpu_supports("avx2");
#endif
#ifdef __FMA__
  has = has && __builtin_cpu_supports("fma");
#endif
#ifdef __FMA4__
  has = has && __builtin_cpu_supports("fma4");
#endif
#ifdef __AVX512BW__
  has = has && __builtin_cpu_supports("avx512bw");
#endif
#ifdef __AVX512VNNI__
  has = has && __builtin_cpu_supports("avx512vnni");
#endif
#ifdef __AVX512F__
  has = has && __builtin_cpu_supports("avx512f");
#endif
#ifdef __AVX512BF16__
  has = has && __builtin_cpu_supports("avx512bf16");
#endif
#endif
  return has;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(FAR_NAMESPACE, m) {
  if (!runs_here()) return;
  const auto on_cpu = [](auto* function) { return torch::dispatch(c10::DispatchKey::CPU, function); };
  m.def("forward(Tensor x, Tensor[] weights) -> Tensor", on_cpu(&forward));
  m.def("train(Tensor x, Tensor[] weights) -> (Tensor, Tensor[], Tensor[])", on_cpu(&train));
  m.def(
      "backward(Tensor grad, Tensor x, Tensor[] weights, Tensor hidden, Tensor[] gates, Tensor[] states, bool[] "
      "wanted) "
      "-> Tensor[]",
      on_cpu(&backward));
  m.def("model(Tensor images, Tensor plan, Tensor vectors, Tensor products, int classes) -> Tensor", on_cpu(&model));
  m.def("pack(Tensor plan, Tensor vectors, Tensor products) -> (Tensor, Tensor, Tensor)", on_cpu(&pack_model));
  m.def("vector_width() -> int", []() -> int64_t { return V; });
  m.def("has_bfloat16() -> bool", []() -> bool { return FAR_BFLOAT16; });
}
