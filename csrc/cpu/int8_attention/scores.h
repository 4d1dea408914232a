#pragma once

#include "cpu/numerics/rows.h"

// Q K^T of a block of queries, in tiles that stay in registers. Included inside a target region,
// after a simd/<isa>.h.

namespace lraee::cpu {
namespace {

constexpr int kPanelVectors = static_cast<int>(kKeysPerPanel) / kWidth;
constexpr int kTileQueries = kWidth == 1 ? 1 : 6;
constexpr int kTilePanels = kWidth == 16 ? 2 : 1;

// Logits of kQueries queries from `query` on against kPanels panels from `panel` on.
template <int kQueries, int kPanels>
void score_tile(const AttentionScratch& s, int64_t query, int64_t panel) {
  constexpr int kVectors = kPanels * kPanelVectors;
  Vi acc[kQueries][kVectors];
#pragma GCC unroll 8
  for (int q = 0; q < kQueries; ++q) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) acc[q][v] = set1(0);
  }
  const int64_t depth = s.groups * 4;
  const int8_t* const q_q = s.q_q + query * depth;
  const int8_t* const k_q = s.k_q + panel * kKeysPerPanel * depth;
  int64_t g = 0;
  do {  // where the loop may be empty GCC 12 copies and spills its sums
    Right k[kVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      const int64_t line = v / kPanelVectors * kKeysPerPanel * depth + g * kKeysPerPanel * 4;
      k[v] = load_right(k_q + line + v % kPanelVectors * kWidth * 4);
    }
#pragma GCC unroll 8
    for (int q = 0; q < kQueries; ++q) {
      const Left four = load_left(q_q + q * depth + g * 4);
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) acc[q][v] = dot4(acc[q][v], four, k[v]);
    }
  } while (++g < s.groups);
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) {
    const int64_t j = panel * kKeysPerPanel + v * kWidth;
    const Vi offset = load(s.k_offset + j);
    const Vf k_scale = load(s.k_scale + j);
#pragma GCC unroll 8
    for (int q = 0; q < kQueries; ++q) {
      const Vf scale = set1(s.q_scale[query + q]) * k_scale;
      store(s.score + (query + q) * s.L_pad + j, to_f32(acc[q][v] - offset) * scale);
    }
  }
}

// Calls fn.template operator()<n>(), 1 <= n <= kMost.
template <int kMost, class Fn>
LRAEE_INLINE void with_count(int64_t n, Fn fn) {
  if constexpr (kMost > 1) {
    if (n < kMost) return with_count<kMost - 1>(n, fn);
  }
  fn.template operator()<kMost>();
}

LRAEE_INLINE void score_block(const AttentionScratch& s, int64_t queries) {
  const int64_t panels = s.L_pad / kKeysPerPanel;
  for (int64_t query = 0; query < queries; query += kTileQueries) {
    with_count<kTileQueries>(queries - query, [&]<int kQueries>() {
      int64_t panel = 0;
      for (; panel + kTilePanels <= panels; panel += kTilePanels) {
        score_tile<kQueries, kTilePanels>(s, query, panel);
      }
      for (; panel < panels; ++panel) score_tile<kQueries, 1>(s, query, panel);
    });
  }
}

}  // namespace
}  // namespace lraee::cpu
