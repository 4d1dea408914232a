// x [M, K] -> x_q int8 [M, K], x_scale float32 [M], x_zero int32 [M]: one scale and zero point per
// row.

#include "cpu/quantize_rows/quantize_rows.h"

#include <tuple>

#include "box.h"
#include "levels.h"
#include "rows.h"

namespace lraee {

cpu::QuantizeRows* quantize_rows_kernel() {
  return by_level<cpu::QuantizeRows>(LRAEE_THREE_LEVELS(cpu::quantize_rows));
}

Quantized quantize_rows_of(const Matrix& x, bool symmetric) {
  Quantized y{Tensor::empty({x.M, x.K}, kInt8), Tensor::empty({x.M}, kFloat32),
              Tensor::empty({x.M}, kInt32)};
  const auto& [x_q, x_scale, x_zero] = y;
  const cpu::QuantizeRowsArgs args{.x = x.values,
                                   .stride = x.stride,
                                   .type = x.type,
                                   .K = x.K,
                                   .symmetric = symmetric,
                                   .x_q = x_q.mutable_data_ptr<int8_t>(),
                                   .x_scale = x_scale.mutable_data_ptr<float>(),
                                   .x_zero = x_zero.mutable_data_ptr<int32_t>()};
  cpu::QuantizeRows* const run = quantize_rows_kernel();
  parallel_for(0, x.M, rows_per_task(x.K),
               [&](int64_t begin, int64_t end) { run(args, begin, end); });
  return y;
}

Quantized quantize_rows(const Tensor& x, bool symmetric) {
  LRAEE_CHECK_VALUE(x.dim() == 2, "quantize_rows: x must have shape [M, K], got ", x.sizes());
  const cpu::FloatType type = float_type(x.dtype(), "quantize_rows", "x");
  const Tensor rows = with_contiguous_rows(x);
  return quantize_rows_of({.values = rows.const_data_ptr(),
                           .stride = rows.stride(0),
                           .M = x.size(0),
                           .K = x.size(1),
                           .type = type},
                          symmetric);
}

namespace {

const CpuOperators operators{LRAEE_OPERATOR(quantize_rows)};

}  // namespace
}  // namespace lraee
