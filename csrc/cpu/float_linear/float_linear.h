#pragma once

#include <cstdint>

namespace lraee::cpu {

// Outputs are computed in panels of 16.
inline constexpr int64_t kFloatPanel = 16;

inline int64_t num_float_panels(int64_t N) { return (N + kFloatPanel - 1) / kFloatPanel; }

// One block of y = x @ w^T + bias: rows of x and y, and the panels [first_panel, last_panel) of w.
//
// [NOTE: fixed summation order] Each y[m, n] starts at bias[n] (or 0) and adds x[m, k] * w[n, k]
// for k = 0, 1, 2, … with one fma each, whatever the tile it falls in: the reduction is never split
// and never reordered, so a row's bits depend neither on the other rows nor on the number of
// threads.
struct FloatLinear {
  const float* x;
  int64_t x_stride;
  const float* w;  // w[k * w_stride + n]: the outputs of one step lie side by side
  int64_t w_stride;
  const float* bias;  // null for none
  float* y;
  int64_t y_stride;
  int64_t rows;
  int64_t N;
  int64_t K;
  int64_t first_panel;
  int64_t last_panel;
};

// avx_vnni runs avx2: it adds int8 products only.
using FloatLinearKernel = void(const FloatLinear& block);
FloatLinearKernel float_linear_scalar, float_linear_avx2, float_linear_avx512_vnni;

}  // namespace lraee::cpu
