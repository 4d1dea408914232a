#pragma once

// Mean and deviation of a row in the fixed summation order. Included inside a target region, after
// a simd/<isa>.h.

#include "cpu/numerics/rows.h"

namespace lraee::cpu {
namespace {

template <class T>
LRAEE_INLINE float row_mean(const T* x, int64_t D) {
  return lane_sum(D, [&](int64_t k, int n) LRAEE_INLINE_LAMBDA { return load_first(x + k, n); }) /
         static_cast<float>(D);
}

// 1 / sqrt(mean of (x - mean)^2 + eps)
template <class T>
LRAEE_INLINE float row_rstd(const T* x, int64_t D, Vf mean, float eps) {
  const float variance = lane_sum(D,
                                  [&](int64_t k, int n) LRAEE_INLINE_LAMBDA {
                                    const Vf d = keep_first(load_first(x + k, n) - mean, n);
                                    return d * d;
                                  }) /
                         static_cast<float>(D);
  return 1.0f / std::sqrt(variance + eps);
}

}  // namespace
}  // namespace lraee::cpu
