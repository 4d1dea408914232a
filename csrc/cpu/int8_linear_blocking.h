#pragma once

#include <cstdint>

namespace lraee::cpu {

// Distance between converted rows, in elements. Whole cache lines, and never a multiple of 1 KiB:
// the rows of one tile would otherwise compete for the same few sets of the L1 cache.
inline int64_t scratch_stride(int64_t K) {
  const int64_t lines = (K + 63) / 64;
  return (lines % 16 == 0 ? lines + 1 : lines) * 64;
}

// Rows converted at a time: with one panel of weights they stay in a 1 MiB L2 cache. A multiple of
// every tile height.
inline int64_t chunk_rows(int64_t K) {
  constexpr int64_t kChunkElements = 256 * 1024, kRowStep = 12, kMaxRows = 192;
  const int64_t rows = kChunkElements / scratch_stride(K) / kRowStep * kRowStep;
  return rows < kRowStep ? kRowStep : rows > kMaxRows ? kMaxRows : rows;
}

// What will be needed after the product of a tile, asked for while it runs: a little at every turn,
// as a burst would hold up the loads of the product itself.
struct Ahead {
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
