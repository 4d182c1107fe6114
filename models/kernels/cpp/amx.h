// Products in bfloat16 by Intel's AMX, whose one instruction multiplies two tiles of 16 rows of 64 bytes. It reads pairs of k side
// by side, as product.h and recurrence.h lay W out:
//
//   a     16 rows of 16 pairs      a row's neighbouring k
//   w     16 rows of 16 pairs      row i holds k = 2 i and 2 i + 1 of 16 columns
//   sums  16 rows of 16 floats
//
// Rows may lie any distance apart. The system lends a process its tiles on request.
#pragma once
#include <atomic>

#include "vectors.h"

#if FAR_BFLOAT16 && defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define FAR_AMX 1
#else
#define FAR_AMX 0
#endif

namespace {
namespace amx {

constexpr int ROWS = 16;   // of a tile
constexpr int DEPTH = 32;  // k in a tile

#if FAR_AMX
// Whether this CPU has tiles and the system lets this process use them.
inline bool here() {
  constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM and what it is asked for
  static const bool granted =
      __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") && !syscall(SYS_arch_prctl, REQUEST, TILE_DATA);
  return granted;
}

// The shapes of this thread's tiles as long as it lives, for `rows` rows of a: 0 to 3 are sums, 4 and 6 whole tiles of a and w,
// 5 and 7 what is left of an even `depth`.
struct alignas(64) Shapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};

  Shapes(int64_t r, int64_t depth) {
    const int64_t rest = depth % DEPTH ? depth % DEPTH : DEPTH;
    for (int i = 0; i < 6; ++i) rows[i] = r, bytes[i] = 64;
    rows[6] = ROWS, bytes[6] = 64;
    bytes[5] = 2 * rest;
    rows[7] = rest / 2, bytes[7] = 64;
    std::atomic_signal_fence(std::memory_order_seq_cst);
    _tile_loadconfig(this);
  }
  ~Shapes() { _tile_release(); }
  Shapes(const Shapes&) = delete;
  Shapes& operator=(const Shapes&) = delete;
};

// out = bias + a W for the rows of Shapes and J <= 4 tiles of columns; ldw counts pairs. Biases of neighbouring rows lie ldb
// apart. Meanwhile FETCH lines a step come from `ahead`.
template <int J, int FETCH>
inline void block(const bf16* a, int64_t lda, const bf16* w, int64_t ldw, int64_t depth, const float* bias, int64_t ldb, float* out,
                  int64_t ldo, const char* ahead) {
// The instructions know their tiles by number alone.
#define FAR_COLUMNS(DO) \
  DO(0);                \
  if constexpr (J > 1) { DO(1); } \
  if constexpr (J > 2) { DO(2); } \
  if constexpr (J > 3) { DO(3); }
#define FAR_BEGIN(j) _tile_loadd(j, bias + j * V, 4 * ldb)
#define FAR_WHOLE(j) _tile_loadd(6, w + 2 * j * V, 4 * ldw); _tile_dpbf16ps(j, 4, 6)
#define FAR_REST(j) _tile_loadd(7, w + 2 * j * V, 4 * ldw); _tile_dpbf16ps(j, 5, 7)
#define FAR_END(j) _tile_stored(j, out + j * V, 4 * ldo)
  std::atomic_signal_fence(std::memory_order_seq_cst);  // GCC does not know that a tile reads memory
  FAR_COLUMNS(FAR_BEGIN)
  for (; depth >= DEPTH; depth -= DEPTH, a += DEPTH, w += DEPTH * ldw) {
    for (int i = 0; i < FETCH; ++i) __builtin_prefetch(ahead + 64 * i, 0, 2);
    ahead += 64 * 3 * ROWS;
    _tile_loadd(4, a, 2 * lda);
    FAR_COLUMNS(FAR_WHOLE)
  }
  if (depth > 0) {
    _tile_loadd(5, a, 2 * lda);
    FAR_COLUMNS(FAR_REST)
  }
  FAR_COLUMNS(FAR_END)
#undef FAR_COLUMNS
#undef FAR_BEGIN
#undef FAR_WHOLE
#undef FAR_REST
#undef FAR_END
}
#else
inline bool here() { return false; }
#endif

}  // namespace amx
}  // namespace
