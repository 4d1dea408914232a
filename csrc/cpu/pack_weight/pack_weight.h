#pragma once

#include <cstdint>

namespace lraee::cpu {

// The CPU layout of a weight: panels of 16 outputs, in each groups of 4 reduction steps, so that
// one 64-byte line is one operand of 512-bit vpdpbusd: w[n / 16][k / 4][n % 16][k % 4]. Missing
// outputs and steps are zero.
inline constexpr int64_t kPanelWidth = 16;
inline constexpr int64_t kGroupDepth = 4;
inline constexpr int64_t kLineBytes = kPanelWidth * kGroupDepth;

inline int64_t num_panels(int64_t N) { return (N + kPanelWidth - 1) / kPanelWidth; }
inline int64_t num_k_groups(int64_t K) { return (K + kGroupDepth - 1) / kGroupDepth; }

// w_q [N, K] contiguous -> w, and w_sum[n] = sum over k of w_q[n, k].
void pack_weight(const int8_t* w_q, int64_t N, int64_t K, int8_t* w, int32_t* w_sum);

void unpack_weight(const int8_t* w, int64_t N, int64_t K, int8_t* w_q);

}  // namespace lraee::cpu
