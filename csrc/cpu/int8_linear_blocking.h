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

// What a tile will need after its product, asked for while the product runs, a part with each of
// its rows: a burst would hold up the loads of the product itself.
struct Ahead {
  const char *y, *residual;           // residual may be null
  int64_t y_stride, residual_stride;  // bytes
  int64_t row_bytes;                  // of y and residual
  const int8_t* w;                    // the next columns' weights
  int64_t w_bytes_per_row;

  void row(int64_t r) const {
    constexpr int64_t kCacheLine = 64;
    for (int64_t i = 0; i < row_bytes; i += kCacheLine) __builtin_prefetch(y + r * y_stride + i, 1);
    if (residual != nullptr) {
      for (int64_t i = 0; i < row_bytes; i += kCacheLine)
        __builtin_prefetch(residual + r * residual_stride + i);
    }
    for (int64_t i = 0; i < w_bytes_per_row; i += kCacheLine)
      __builtin_prefetch(w + r * w_bytes_per_row + i, 0, 2);
  }
};

}  // namespace lraee::cpu
