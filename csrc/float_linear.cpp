// y = x @ w^T + bias in float32, each output summed in one fixed order; see
// cpu/float_linear/float_linear.h.

#include "cpu/float_linear/float_linear.h"

#include <algorithm>

#include "box.h"
#include "levels.h"

namespace lraee {
namespace {

// Splits the larger of rows and panels among the threads: rows share the weights, panels share the
// rows.
void run_blocks(const cpu::FloatLinear& whole) {
  auto* const kernel = by_level<cpu::FloatLinearKernel>(LRAEE_THREE_LEVELS(cpu::float_linear));
  const int64_t panels = whole.last_panel;
  const int64_t threads = num_threads();
  // Rows first only where every thread gets at least eight full tiles of them.
  constexpr int64_t kRowsWorthAThread = 96;
  if (whole.rows >= threads * kRowsWorthAThread) {
    parallel_for(0, whole.rows, (whole.rows + threads - 1) / threads,
                 [&](int64_t begin, int64_t end) {
                   cpu::FloatLinear block = whole;
                   block.x += begin * block.x_stride;
                   block.y += begin * block.y_stride;
                   block.rows = end - begin;
                   kernel(block);
                 });
  } else {
    parallel_for(0, panels, std::max<int64_t>(2, (panels + threads - 1) / threads),
                 [&](int64_t begin, int64_t end) {
                   cpu::FloatLinear block = whole;
                   block.first_panel = begin;
                   block.last_panel = end;
                   kernel(block);
                 });
  }
}

Tensor float_linear(const Tensor& x, const Tensor& w, const OptionalTensor& bias) {
  LRAEE_CHECK_VALUE(x.dim() == 2 && x.dtype() == kFloat32,
                    "float_linear: x must be float32 [M, K], got ", x.sizes());
  const int64_t M = x.size(0), K = x.size(1), N = w.size(0);
  LRAEE_CHECK_VALUE(w.dim() == 2 && w.size(1) == K && w.dtype() == kFloat32,
                    "float_linear: w must be float32 [N, K] with K = ", K, ", got ", w.sizes());
  LRAEE_CHECK_VALUE(!bias || (bias->numel() == N && bias->dtype() == kFloat32),
                    "float_linear: bias must be float32 [N] = [", N, "]");
  const Tensor rows = K <= 1 || x.stride(1) == 1 ? x.borrowed() : x.contiguous();
  const bool has_columns = N <= 1 || w.stride(0) == 1;
  const Tensor columns = has_columns ? w.borrowed() : w.transposed();
  const OptionalTensor bias_row = contiguous(bias);
  Tensor y = Tensor::empty({M, N}, kFloat32);
  if (M == 0 || N == 0) return y;
  run_blocks({.x = rows.const_data_ptr<float>(),
              .x_stride = rows.stride(0),
              .w = columns.const_data_ptr<float>(),
              .w_stride = columns.stride(has_columns ? 1 : 0),
              .bias = const_data_ptr<float>(bias_row),
              .y = y.mutable_data_ptr<float>(),
              .y_stride = N,
              .rows = M,
              .N = N,
              .K = K,
              .first_panel = 0,
              .last_panel = cpu::num_float_panels(N)});
  return y;
}

const CpuOperators operators{LRAEE_OPERATOR(float_linear)};

}  // namespace
}  // namespace lraee
