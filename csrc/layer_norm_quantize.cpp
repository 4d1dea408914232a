// x [M, D] -> quantize_rows(LayerNorm(x) * gamma + beta), or RMSNorm where beta is absent: x_q int8
// [M, D], x_scale float32 [M], x_zero int32 [M].

#include "cpu/layer_norm_quantize/layer_norm_quantize.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "levels.h"
#include "rows.h"

namespace lraee {

cpu::LayerNormQuantize* layer_norm_quantize_kernel() {
  return by_level<cpu::LayerNormQuantize>(LRAEE_THREE_LEVELS(cpu::layer_norm_quantize));
}

namespace {

void check(const at::Tensor& x, const at::Tensor& vector, const char* argument) {
  TORCH_CHECK_TYPE(vector.scalar_type() == at::kFloat, "layer_norm_quantize: ", argument,
                   " must be float32, got ", vector.scalar_type());
  TORCH_CHECK_VALUE(vector.dim() == 1 && vector.size(0) == x.size(1),
                    "layer_norm_quantize: ", argument, " must have shape [D] = [", x.size(1),
                    "], got ", vector.sizes());
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> layer_norm_quantize(
    const at::Tensor& x, const at::Tensor& gamma, const std::optional<at::Tensor>& beta, double eps,
    bool symmetric) {
  TORCH_CHECK_VALUE(x.dim() == 2, "layer_norm_quantize: x must have shape [M, D], got ", x.sizes());
  const cpu::FloatType type = float_type(x.scalar_type(), "layer_norm_quantize", "x");
  check(x, gamma, "gamma");
  if (beta.has_value()) check(x, *beta, "beta");
  const int64_t M = x.size(0), D = x.size(1);
  const at::Tensor rows = with_contiguous_rows(x);
  const at::Tensor gamma_row = gamma.contiguous();
  const at::Tensor beta_row = beta.has_value() ? beta->contiguous() : at::Tensor();
  at::Tensor x_q = at::empty({M, D}, x.options().dtype(at::kChar));
  at::Tensor x_scale = at::empty({M}, x.options().dtype(at::kFloat));
  at::Tensor x_zero = at::empty({M}, x.options().dtype(at::kInt));
  const cpu::LayerNormQuantizeArgs args{
      .x = rows.const_data_ptr(),
      .stride = rows.stride(0),
      .type = type,
      .D = D,
      .gamma = gamma_row.const_data_ptr<float>(),
      .beta = beta.has_value() ? beta_row.const_data_ptr<float>() : nullptr,
      .eps = static_cast<float>(eps),
      .symmetric = symmetric,
      .x_q = x_q.mutable_data_ptr<int8_t>(),
      .x_scale = x_scale.mutable_data_ptr<float>(),
      .x_zero = x_zero.mutable_data_ptr<int32_t>()};
  cpu::LayerNormQuantize* const run = layer_norm_quantize_kernel();
  at::parallel_for(0, M, rows_per_task(D), [&](int64_t begin, int64_t end) {
    std::vector<float> y(static_cast<size_t>(D));
    run(args, begin, end, y.data());
  });
  return {x_q, x_scale, x_zero};
}

}  // namespace lraee

TORCH_LIBRARY_IMPL(lraee, CPU, m) { m.impl("layer_norm_quantize", &lraee::layer_norm_quantize); }
