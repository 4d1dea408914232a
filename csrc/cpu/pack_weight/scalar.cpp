#include "cpu/pack_weight/pack_weight.h"

#include <cstring>

namespace lraee::cpu {
namespace {

int64_t line_offset(int64_t n, int64_t group, int64_t K) {
  return (n / kPanelWidth * num_k_groups(K) + group) * kLineBytes + n % kPanelWidth * kGroupDepth;
}

}  // namespace

void pack_weight(const int8_t* w_q, int64_t N, int64_t K, int8_t* w, int32_t* w_sum) {
  const int64_t groups = num_k_groups(K);
  std::memset(w, 0, static_cast<size_t>(num_panels(N) * groups * kLineBytes));
  for (int64_t n = 0; n < N; ++n) {
    const int8_t* row = w_q + n * K;
    int32_t sum = 0;
    for (int64_t k = 0; k < K; ++k) {
      w[line_offset(n, k / kGroupDepth, K) + k % kGroupDepth] = row[k];
      sum += row[k];
    }
    w_sum[n] = sum;
  }
}

void unpack_weight(const int8_t* w, int64_t N, int64_t K, int8_t* w_q) {
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t k = 0; k < K; ++k) {
      w_q[n * K + k] = w[line_offset(n, k / kGroupDepth, K) + k % kGroupDepth];
    }
  }
}

}  // namespace lraee::cpu
