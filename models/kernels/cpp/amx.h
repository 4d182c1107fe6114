// Products in bfloat16 and int8 by Intel's AMX, whose one instruction multiplies two tiles of 16 rows of 64 bytes. It
// reads words of 32 bits, two k of bfloat16 or four of int8 side by side, as product.h and recurrence.h lay W out:
//
//   a     16 rows of 16 words      a row's neighbouring k; of int8 unsigned, see dots.h
//   w     16 rows of 16 words      row i holds the i-th word of k of 16 columns
//   sums  16 rows of 16 floats, or integers
//
// Rows may lie any distance apart. The system lends a process its tiles on request.
#pragma once
#include <atomic>
#include <type_traits>

#include "dots.h"

// Older clangs spell the last two macros without a second underscore.
#if FAR_BFLOAT16 && defined(__AVX512VNNI__) && defined(__linux__) && \
    (defined(__AMX_BF16__) || defined(__AMXBF16__)) && (defined(__AMX_INT8__) || defined(__AMXINT8__))
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#define FAR_AMX 1
#else
#define FAR_AMX 0
#endif

namespace {
namespace amx {

constexpr int ROWS = 16;                 // of a tile
constexpr int64_t STEP = 3 * ROWS * 64;  // bytes of a panel of three tiles
template <class X>
constexpr int DEPTH = 64 / sizeof(X);  // k in a tile

#if FAR_AMX
// Whether this CPU has tiles and the system lets this process use them. __builtin_cpu_supports is no in zig's programs.
inline bool here() {
  constexpr int REQUEST = 0x1023, TILE_DATA = 18;         // ARCH_REQ_XCOMP_PERM and what it is asked for
  constexpr unsigned BITS = 1 << 22 | 1 << 24 | 1 << 25;  // of bfloat16, tiles and int8
  static const bool granted = [] {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & BITS) == BITS &&
           syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
  }();
  return granted;
}

// The shapes of this thread's tiles as long as it lives, for `r` rows of a: 0 to 3 are sums, 4 is a, 5 is w; 6 and 7
// are halves of 4 and 5, for what is left of a depth.
struct alignas(64) Shapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 32, 64};
  uint8_t rows[16] = {};

  explicit Shapes(int64_t r) {
    for (int i = 0; i < 5; ++i) rows[i] = r;
    rows[5] = ROWS, rows[6] = r, rows[7] = ROWS / 2;
    std::atomic_signal_fence(std::memory_order_seq_cst);  // GCC does not know what the instruction reads
    _tile_loadconfig(this);
  }
  ~Shapes() { _tile_release(); }
  Shapes(const Shapes&) = delete;
  Shapes& operator=(const Shapes&) = delete;
};

// out = first + a W for the rows of Shapes and J <= 4 tiles of columns, in floats, or of int8 in integers. depth is a
// multiple of half a tile's, ldw counts words. What neighbouring rows begin with lies ldf words apart. Meanwhile FETCH
// lines a step come from `ahead`.
template <int J, int FETCH, class X>
inline void block(const X* a, int64_t lda, const X* w, int64_t ldw, int64_t depth, const float* first, int64_t ldf,
                  float* out, int64_t ldo, const char* ahead) {
  constexpr int64_t WORD = 4 / sizeof(X);
// The instructions know their tiles by number alone.
#define FAR_COLUMNS(DO)           \
  DO(0);                          \
  if constexpr (J > 1) { DO(1); } \
  if constexpr (J > 2) { DO(2); } \
  if constexpr (J > 3) { DO(3); }
#define FAR_BEGIN(j) _tile_loadd(j, first + j * V, 4 * ldf)
#define FAR_MULTIPLY(j, A, W)                \
  _tile_loadd(W, w + WORD * j * V, 4 * ldw); \
  if constexpr (std::is_same_v<X, bf16>)     \
    _tile_dpbf16ps(j, A, W);                 \
  else                                       \
    _tile_dpbusd(j, A, W)
#define FAR_ADD(j) FAR_MULTIPLY(j, 4, 5)
#define FAR_ADD_HALF(j) FAR_MULTIPLY(j, 6, 7)
#define FAR_END(j) _tile_stored(j, out + j * V, 4 * ldo)
  std::atomic_signal_fence(std::memory_order_seq_cst);  // nor that these read memory
  FAR_COLUMNS(FAR_BEGIN)
  for (; depth >= DEPTH<X>; depth -= DEPTH<X>, a += DEPTH<X>, w += DEPTH<X> * ldw, ahead += STEP) {
    for (int i = 0; i < FETCH; ++i) __builtin_prefetch(ahead + 64 * i, 0, 2);
    _tile_loadd(4, a, sizeof(X) * lda);
    FAR_COLUMNS(FAR_ADD)
  }
  if (depth) {
    _tile_loadd(6, a, sizeof(X) * lda);
    FAR_COLUMNS(FAR_ADD_HALF)
  }
  FAR_COLUMNS(FAR_END)
#undef FAR_COLUMNS
#undef FAR_BEGIN
#undef FAR_MULTIPLY
#undef FAR_ADD
#undef FAR_ADD_HALF
#undef FAR_END
}
#else
inline bool here() { return false; }
#endif

}  // namespace amx
}  // namespace
