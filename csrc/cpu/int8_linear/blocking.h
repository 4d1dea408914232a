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

// Bytes of scratch that one call needs: the rows at work, as the instruction set wants to read
// them.
inline int64_t int8_linear_scratch_bytes(int64_t K) {
  return chunk_rows(K) * scratch_stride(K) * static_cast<int64_t>(sizeof(int16_t));
}

}  // namespace lraee::cpu
