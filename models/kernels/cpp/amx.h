// Products in bfloat16 by Intel's AMX, whose one instruction multiplies two tiles of 16 rows of 64 bytes. It reads
// pairs of k side by side, as product.h and recurrence.h lay W out:
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

constexpr int ROWS = 16;                 // of a tile
constexpr int DEPTH = 32;                // k in a tile
constexpr int64_t STEP = 3 * ROWS * 64;  // bytes of a panel of three tiles

#if FAR_AMX
// Whether this CPU has tiles and the system lets this process use them.
inline bool here() {
  constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM and what it is asked for
  static const bool granted = __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
                              syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
  return granted;
}

// The shapes of this thread's tiles as long as it lives, for `r` rows of a: 0 to 3 are sums, 4 is a, 5 is w.
struct alignas(64) Shapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {};

  explicit Shapes(int64_t r) {
    for (int i = 0; i < 5; ++i) rows[i] = r;
    rows[5] = ROWS;
    std::atomic_signal_fence(std::memory_order_seq_cst);  // GCC does not know what the instruction reads
    _tile_loadconfig(this);
  }
  ~Shapes() { _tile_release(); }
  Shapes(const Shapes&) = delete;
  Shapes& operator=(const Shapes&) = delete;
};

// out = bias + a W for the rows of Shapes and J <= 4 tiles of columns; depth is a multiple of DEPTH, ldw counts pairs.
// Biases of neighbouring rows lie ldb apart. Meanwhile FETCH lines a step come from `ahead`.
template <int J, int FETCH>
inline void block(const bf16* a, int64_t lda, const bf16* w, int64_t ldw, int64_t depth, const float* bias, int64_t ldb,
                  float* out, int64_t ldo, const char* ahead) {
// The instructions know their tiles by number alone.
#define FAR_COLUMNS(DO)           \
  DO(0);                          \
  if constexpr (J > 1) { DO(1); } \
  if constexpr (J > 2) { DO(2); } \
  if constexpr (J > 3) { DO(3); }
#define FAR_BEGIN(j) _tile_loadd(j, bias + j * V, 4 * ldb)
#define FAR_ADD(j)                        \
  _tile_loadd(5, w + 2 * j * V, 4 * ldw); \
  _tile_dpbf16ps(j, 4, 5)
#define FAR_END(j) _tile_stored(j, out + j * V, 4 * ldo)
  std::atomic_signal_fence(std::memory_order_seq_cst);  // nor that these read memory
  FAR_COLUMNS(FAR_BEGIN)
  for (int64_t k = 0; k < depth; k += DEPTH, a += DEPTH, w += DEPTH * ldw, ahead += STEP) {
    for (int i = 0; i < FETCH; ++i) __builtin_prefetch(ahead + 64 * i, 0, 2);
    _tile_loadd(4, a, 2 * lda);
    FAR_COLUMNS(FAR_ADD)
  }
  FAR_COLUMNS(FAR_END)
#undef FAR_COLUMNS
#undef FAR_BEGIN
#undef FAR_ADD
#undef FAR_END
}
#else
inline bool here() { return false; }
#endif

}  // namespace amx
}  // namespace
