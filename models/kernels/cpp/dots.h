// Products of 8-bit numbers, summed exactly in 32 bits: one function, add_dots, for each instruction set.
//
// A word of 32 bits holds neighbouring k, of a row as of W:
//
//   VNNI, AVX-VNNI, NEON dotprod   four numbers of 8 bits
//   all others                     two numbers of 16 bits, whose products cannot saturate
//
// VNNI multiplies unsigned numbers by signed ones. So there rows are stored with SHIFT added, and sums begin at -SHIFT
// times the sum of the weights.
#pragma once
#include <type_traits>

#include "vectors.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#elif defined(__wasm_simd128__)
#include <wasm_simd128.h>
#endif

namespace {

constexpr int STEPS = 127;  // of a number's largest magnitude: weights and rows lie in -127..127

#if (defined(__AVX512F__) && defined(__AVX512VNNI__)) || (!defined(__AVX512F__) && defined(__AVXVNNI__))
enum class q8 : int8_t {};
constexpr int SHIFT = 128;
inline vi add_dots(vi a, vi w, vi sum) {
#if defined(__AVX512F__)
  return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)w);
#else
  return (vi)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)a, (__m256i)w);
#endif
}
#elif defined(__ARM_FEATURE_DOTPROD)
enum class q8 : int8_t {};
constexpr int SHIFT = 0;
inline vi add_dots(vi a, vi w, vi sum) {
  const auto half = [&](auto... i) {
    return vdotq_s32((int32x4_t){sum[i]...}, vreinterpretq_s8_s32((int32x4_t){w[i]...}),
                     vreinterpretq_s8_s32((int32x4_t){a[i]...}));
  };
  const int32x4_t low = half(0, 1, 2, 3), high = half(4, 5, 6, 7);
  return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7);
}
#else
enum class q8 : int16_t {};
constexpr int SHIFT = 0;
inline vi add_dots(vi a, vi w, vi sum) {
#if defined(__AVX512BW__)
  return sum + (vi)_mm512_madd_epi16((__m512i)a, (__m512i)w);
#elif defined(__AVX2__) && !defined(__AVX512F__)
  return sum + (vi)_mm256_madd_epi16((__m256i)a, (__m256i)w);
#elif defined(__wasm_simd128__)
  return sum + (vi)wasm_i32x4_dot_i16x8((v128_t)a, (v128_t)w);
#else
  return sum + (a << 16 >> 16) * (w << 16 >> 16) + (a >> 16) * (w >> 16);
#endif
}
#endif

// V numbers within -STEPS..STEPS, rounded, as products read a row. Adding 1.5 2^23 leaves the integer in the low bits,
// of which a NaN's are just some others. GCC narrows a vector number by number unless it goes by halves, or by name.
inline void store(q8* p, vf x) {
  const vi rounded = (vi)(x + (12582912.0f + SHIFT));
#if defined(__AVX512F__) && defined(__AVX512VNNI__)
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)rounded));
#elif defined(__AVX512BW__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)rounded));
#else
  typedef int16_t half __attribute__((vector_size(2 * V)));
  typedef std::underlying_type_t<q8> line __attribute__((vector_size(V * sizeof(q8)), aligned(1), may_alias));
  *reinterpret_cast<line*>(p) = __builtin_convertvector(__builtin_convertvector(rounded, half), line);
#endif
}

}  // namespace
