// x [M, D] -> quantize_rows(LayerNorm(x) * gamma + beta), or RMSNorm where beta is absent: x_q int8
// [M, D], x_scale float32 [M], x_zero int32 [M].

#include "cpu/layer_norm_quantize/layer_norm_quantize.h"

#include <tuple>
#include <vector>

#include "box.h"
#include "levels.h"
#include "rows.h"

namespace lraee {

cpu::LayerNormQuantize* layer_norm_quantize_kernel() {
  return by_level<cpu::LayerNormQuantize>(LRAEE_THREE_LEVELS(cpu::layer_norm_quantize));
}

Quantized layer_norm_quantize_of(const Matrix& x, const float* gamma, const float* beta, double eps,
                                 bool symmetric) {
  Quantized y{Tensor::empty({x.M, x.K}, kInt8), Tensor::empty({x.M}, kFloat32),
              Tensor::empty({x.M}, kInt32)};
  const auto& [x_q, x_scale, x_zero] = y;
  const cpu::LayerNormQuantizeArgs args{.x = x.values,
                                        .stride = x.stride,
                                        .type = x.type,
                                        .D = x.K,
                                        .gamma = gamma,
                                        .beta = beta,
                                        .eps = static_cast<float>(eps),
                                        .symmetric = symmetric,
                                        .x_q = x_q.mutable_data_ptr<int8_t>(),
                                        .x_scale = x_scale.mutable_data_ptr<float>(),
                                        .x_zero = x_zero.mutable_data_ptr<int32_t>()};
  cpu::LayerNormQuantize* const run = layer_norm_quantize_kernel();
  parallel_for(0, x.M, rows_per_task(x.K), [&](int64_t begin, int64_t end) {
    std::vector<float> row(static_cast<size_t>(x.K));
    run(args, begin, end, row.data());
  });
  return y;
}

namespace {

void check(const Tensor& x, const Tensor& vector, const char* argument) {
  LRAEE_CHECK_TYPE(vector.dtype() == kFloat32, "layer_norm_quantize: ", argument,
                   " must be float32, got ", vector.dtype());
  LRAEE_CHECK_VALUE(vector.dim() == 1 && vector.size(0) == x.size(1),
                    "layer_norm_quantize: ", argument, " must have shape [D] = [", x.size(1),
                    "], got ", vector.sizes());
}

}  // namespace

Quantized layer_norm_quantize(const Tensor& x, const Tensor& gamma, const OptionalTensor& beta,
                              double eps, bool symmetric) {
  LRAEE_CHECK_VALUE(x.dim() == 2, "layer_norm_quantize: x must have shape [M, D], got ", x.sizes());
  const cpu::FloatType type = float_type(x.dtype(), "layer_norm_quantize", "x");
  check(x, gamma, "gamma");
  if (beta.has_value()) check(x, *beta, "beta");
  const Tensor rows = with_contiguous_rows(x), gamma_row = gamma.contiguous();
  const OptionalTensor beta_row = contiguous(beta);
  return layer_norm_quantize_of({.values = rows.const_data_ptr(),
                                 .stride = rows.stride(0),
                                 .M = x.size(0),
                                 .K = x.size(1),
                                 .type = type},
                                gamma_row.const_data_ptr<float>(), const_data_ptr<float>(beta_row),
                                eps, symmetric);
}

namespace {

const CpuOperators operators{LRAEE_OPERATOR(layer_norm_quantize)};

}  // namespace
}  // namespace lraee
