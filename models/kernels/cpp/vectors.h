// Vectors of V floats by GCC's (and clang's) portable extension: the compiler's flags make them AVX-512, AVX2 or
// whatever the machine has. Only bfloat16 needs instructions by name (AVX512_BF16).
#pragma once
#include <cstdint>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#if defined(__AVX512BF16__) && defined(__AVX512F__)
#define FAR_BFLOAT16 1
#else
#define FAR_BFLOAT16 0
#endif

namespace {

#if defined(__AVX512F__)
constexpr int V = 16;
#elif defined(__wasm__) || defined(__arm__)  // at most 16 registers of four floats
constexpr int V = 4;
#else  // 16 registers of eight (AVX2) or 32 of four (aarch64): a tile of 4 x 3 vectors fills both
constexpr int V = 8;
#endif
typedef float vf __attribute__((vector_size(V * 4)));
typedef int vi __attribute__((vector_size(V * 4)));
typedef vf vf_u __attribute__((aligned(4)));
typedef vi vi_u __attribute__((aligned(4), may_alias));
enum class bf16 : uint16_t {};  // storage alone: products read it in pairs, everything else computes in float

inline vf load(const float* p) { return *reinterpret_cast<const vf_u*>(p); }
inline void store(float* p, vf x) { *reinterpret_cast<vf_u*>(p) = x; }
inline vi load_ints(const void* p) { return *static_cast<const vi_u*>(p); }
inline vf splat(float x) { return x - vf{}; }
#if FAR_BFLOAT16
inline void store(bf16* p, vf x) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)x)); }
#else
inline void store(bf16*, vf) {}  // nobody runs it: packing for bfloat16 is refused
#endif

// 1 / x to float rounding, but 0 where that is no normal number and NaN for infinity.
#if defined(__AVX512F__)
inline vf reciprocal(vf x) {
  const vf y = (vf)_mm512_rcp14_ps((__m512)x);  // to 14 bits, six times faster than a division; then Newton's step
  return y + y * (1.0f - x * y);
}
#else
inline vf reciprocal(vf x) { return 1.0f / x; }
#endif

// exp(x) as 2^n (1 + rest), for x in [-87, 88], by a polynomial (Cephes) with a relative error below 2e-7.
struct Power {
  vf two, rest;
};
inline Power power(vf x) {
  const float magic = 12582912.0f;  // adding it rounds to an integer
  vf n = (x * 1.44269504088896341f + magic) - magic;
  vf r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  vi bits = (__builtin_convertvector(n, vi) + 127) << 23;
  return {reinterpret_cast<vf&>(bits), p * (r * r) + r};
}
// A NaN fails both comparisons and passes through.
inline vf clamp(vf x, float low, float high) {
  x = x > high ? splat(high) : x;
  return x < low ? splat(low) : x;
}
inline vf exp_(vf x) {
  const Power p = power(clamp(x, -87.0f, 88.0f));
  return (p.rest + 1.0f) * p.two;
}
inline vf sigmoid(vf x) { return reciprocal(1.0f + exp_(-x)); }
// By exp(2 x) - 1, which keeps the digits of small x; beyond 9.1 it is 1 in float.
inline vf tanh_(vf x) {
  const Power p = power(clamp(2.0f * x, -30.0f, 30.0f));
  const vf e = p.two * p.rest + (p.two - 1.0f);
  return e * reciprocal(e + 2.0f);
}

// erf as a ratio of polynomials on [-4, 4], beyond which it is 1 in float (the coefficients are Eigen's).
inline vf erf_(vf x) {
  x = clamp(x, -4.0f, 4.0f);
  const vf s = x * x;
  vf p = splat(-2.72614225801306e-10f);
  p = p * s + 2.77068142495902e-08f;
  p = p * s + -2.10102402082508e-06f;
  p = p * s + -5.69250639462346e-05f;
  p = p * s + -7.34990630326855e-04f;
  p = p * s + -2.95459980854025e-03f;
  p = p * s + -1.60960333262415e-02f;
  vf q = splat(-1.45660718464996e-05f);
  q = q * s + -2.13374055278905e-04f;
  q = q * s + -1.68282697438203e-03f;
  q = q * s + -7.37332916720468e-03f;
  q = q * s + -1.42647390514189e-02f;
  return x * p * reciprocal(q);
}
inline vf gelu(vf x) { return x * (0.5f + 0.5f * erf_(x * 0.70710678118654752f)); }

}  // namespace
