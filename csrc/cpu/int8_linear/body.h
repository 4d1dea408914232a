#pragma once

// The blocking that all instruction sets with vectors of products share. Included inside a target
// region, after
//   Tile  the integer product of one tile:
//     kRows, kCols      largest tile; kCols is a multiple of kWidth
//     X, kXOffset       how a converted row stores x_q: X(x_q + kXOffset)
//     convert(x_q, count, x)            one row
//     multiply<R, C>(x, stride, w, groups, acc, prefetch)
//                       acc[R][C] = sum over k of x * w, and software prefetch meanwhile

#include "cpu/int8_linear/epilogue.h"

namespace lraee::cpu {
namespace {

template <int kCols, int R = Tile::kRows>
inline void multiply(int rows, const Tile::X* x, int64_t stride, const int8_t* w, int64_t groups,
                     int32_t* acc, Prefetch& prefetch) {
  if constexpr (R > 1) {
    if (rows < R) return multiply<kCols, R - 1>(rows, x, stride, w, groups, acc, prefetch);
  }
  Tile::template multiply<R, kCols>(x, stride, w, groups, acc, prefetch);
}

// All rows of a chunk, already converted, times the columns [n, n + kCols).
template <int kCols>
void run_columns(const Args& a, const Int8LinearBlock& block, Epilogue<kCols> finish,
                 const Tile::X* x, int64_t m_begin, int64_t m_end, int64_t n) {
  alignas(64) int32_t acc[Tile::kRows * kCols];
  const int64_t groups = num_k_groups(a.K), stride = scratch_stride(a.K);
  const int8_t* w = a.w + n / kPanelWidth * groups * kLineBytes + n % kPanelWidth * kGroupDepth;
  const int64_t rows = m_end - m_begin, num_tiles = (rows + Tile::kRows - 1) / Tile::kRows;
  const int cols = static_cast<int>(a.N - n < kCols ? a.N - n : kCols);
  TileColumns<kCols> columns;
  columns.load(a, n, cols);
  const int64_t bytes = a.out_type == FloatType::kF32 ? 4 : 2;
  Prefetch prefetch{};
  if (n + kCols < block.n_end) {
    const int64_t panels = num_panels(a.N) - (n + kCols) / kPanelWidth;
    const int64_t w_bytes = kCols * groups * kGroupDepth, left = panels * groups * kLineBytes;
    prefetch.w = w + w_bytes;
    prefetch.w_end = prefetch.w + (left < w_bytes ? left : w_bytes);
  } else {
    prefetch.w = block.next.w;
    prefetch.w_end = prefetch.w + block.next.bytes;
  }
  const int64_t lines = (prefetch.w_end - prefetch.w) / kLineBytes;
  const int64_t turns = num_tiles * Prefetch::turns_of(groups);
  prefetch.w_bytes = lines > 0 ? (lines + turns - 1) / turns * kLineBytes : 0;
  prefetch.y_stride = a.N * bytes, prefetch.residual_stride = a.residual_stride * bytes;
  prefetch.row_bytes = cols * bytes;
  for (int64_t tile = 0, m = 0; tile < num_tiles; ++tile) {
    // Tiles of nearly equal height: the last one is not left with a single row.
    const int height = static_cast<int>((rows - m + num_tiles - tile - 1) / (num_tiles - tile));
    prefetch.y = static_cast<const char*>(a.y) + ((m_begin + m) * a.N + n) * bytes;
    prefetch.residual = at_or_null(static_cast<const char*>(a.residual),
                                   ((m_begin + m) * a.residual_stride + n) * bytes);
    multiply<kCols>(height, x + m * stride, stride, w, groups, acc, prefetch);
    finish(a, {.m = m_begin + m, .n = n, .rows = height, .cols = cols, .acc = acc}, columns, 0,
           height);
    m += height;
  }
}

void int8_linear_at_level(const Args& a, const Int8LinearBlock& block, void* scratch) {
  auto* x = static_cast<Tile::X*>(scratch);
  const int64_t stride = scratch_stride(a.K), chunk = chunk_rows(a.K);
  const Epilogue<Tile::kCols> finish_tile = epilogue_for<Tile::kCols>(a);
  const Epilogue<Tile::kTailCols> finish_tail = epilogue_for<Tile::kTailCols>(a);
  for (int64_t m_begin = block.m_begin; m_begin < block.m_end; m_begin += chunk) {
    const int64_t m_end = m_begin + chunk < block.m_end ? m_begin + chunk : block.m_end;
    for (int64_t m = m_begin; m < m_end; ++m) {
      Tile::X* row = x + (m - m_begin) * stride;
      Tile::convert(a.x_q + m * a.x_stride, a.K, row);
      for (int64_t k = a.K; k < num_k_groups(a.K) * kGroupDepth; ++k) row[k] = 0;
    }
    int64_t n = block.n_begin;
    for (; n + Tile::kCols <= block.n_end; n += Tile::kCols)
      run_columns<Tile::kCols>(a, block, finish_tile, x, m_begin, m_end, n);
    for (; n < block.n_end; n += Tile::kTailCols)
      run_columns<Tile::kTailCols>(a, block, finish_tail, x, m_begin, m_end, n);
  }
}

}  // namespace
}  // namespace lraee::cpu
