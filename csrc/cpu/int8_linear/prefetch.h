#pragma once

#include <cstdint>

namespace lraee::cpu {

// Software prefetch of what is needed after the product of a tile, while it runs: a little at every
// turn, as a burst would hold up the loads of the product itself.
struct Prefetch {
  // A turn is this many groups of the reduction.
  static constexpr int64_t kTurnGroups = 8;
  static int64_t turns_of(int64_t groups) { return (groups + kTurnGroups - 1) / kTurnGroups; }

  const int8_t *w, *w_end;            // what is left of the next columns' weights
  int64_t w_bytes;                    // of them at a turn
  const char *y, *residual;           // of the tile; residual may be null
  int64_t y_stride, residual_stride;  // bytes
  int64_t row_bytes;                  // of y and residual

  // turns_left: of the tile, which has `rows` rows. Its rows come late, or the weights would drive
  // them out of the L1 cache again. Inlined by force: GCC 12 takes a function that only prefetches
  // for one without effect, and drops the calls.
  [[gnu::always_inline]] void turn(int64_t turns_left, int64_t rows) {
    constexpr int64_t kCacheLine = 64, kTurnsToArrive = 2;
    for (const int8_t* const end = w + w_bytes < w_end ? w + w_bytes : w_end; w < end;
         w += kCacheLine)
      __builtin_prefetch(w, 0, 2);
    const int64_t r = rows + kTurnsToArrive - turns_left;
    if (r < 0 || r >= rows) return;
    for (int64_t i = 0; i < row_bytes; i += kCacheLine) __builtin_prefetch(y + r * y_stride + i, 1);
    if (residual == nullptr) return;
    for (int64_t i = 0; i < row_bytes; i += kCacheLine)
      __builtin_prefetch(residual + r * residual_stride + i);
  }
};

}  // namespace lraee::cpu
