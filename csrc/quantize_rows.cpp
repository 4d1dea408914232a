// x [M, K] -> x_q int8 [M, K], x_scale float32 [M], x_zero int32 [M]: one scale and zero point per
// row.

#include "cpu/quantize_rows/quantize_rows.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <tuple>

#include "levels.h"
#include "rows.h"

namespace lraee {

cpu::QuantizeRows* quantize_rows_kernel() {
  return by_level<cpu::QuantizeRows>(LRAEE_THREE_LEVELS(cpu::quantize_rows));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> quantize_rows(const at::Tensor& x, bool symmetric) {
  TORCH_CHECK_VALUE(x.dim() == 2, "quantize_rows: x must have shape [M, K], got ", x.sizes());
  const cpu::FloatType type = float_type(x.scalar_type(), "quantize_rows", "x");
  const int64_t M = x.size(0), K = x.size(1);
  const at::Tensor rows = with_contiguous_rows(x);
  at::Tensor x_q = at::empty({M, K}, x.options().dtype(at::kChar));
  at::Tensor x_scale = at::empty({M}, x.options().dtype(at::kFloat));
  at::Tensor x_zero = at::empty({M}, x.options().dtype(at::kInt));
  const cpu::QuantizeRowsArgs args{.x = rows.const_data_ptr(),
                                   .stride = rows.stride(0),
                                   .type = type,
                                   .K = K,
                                   .symmetric = symmetric,
                                   .x_q = x_q.mutable_data_ptr<int8_t>(),
                                   .x_scale = x_scale.mutable_data_ptr<float>(),
                                   .x_zero = x_zero.mutable_data_ptr<int32_t>()};
  cpu::QuantizeRows* const run = quantize_rows_kernel();
  at::parallel_for(0, M, rows_per_task(K),
                   [&](int64_t begin, int64_t end) { run(args, begin, end); });
  return {x_q, x_scale, x_zero};
}

}  // namespace lraee

TORCH_LIBRARY_IMPL(lraee, CPU, m) { m.impl("quantize_rows", &lraee::quantize_rows); }
