// x [M, 2 H] -> v = act(x[:, :H]) * x[:, H:], normed where gamma is given, in two terms: x_q,
// x_scale, x_zero as of quantize_rows, and the rest r_q int8 [M, H], r_scale float32 [M].

#include "cpu/gated_quantize/gated_quantize.h"

#include <tuple>
#include <vector>

#include "box.h"
#include "levels.h"
#include "rows.h"

namespace lraee {

cpu::GatedQuantize* gated_quantize_kernel() {
  return by_level<cpu::GatedQuantize>(LRAEE_THREE_LEVELS(cpu::gated_quantize));
}

cpu::GateActivation gate_activation_from_name(std::string_view op, std::string_view name) {
  if (name == "none") return cpu::GateActivation::kNone;
  if (name == "silu") return cpu::GateActivation::kSilu;
  if (name == "gelu") return cpu::GateActivation::kGelu;
  if (name == "gelu_tanh") return cpu::GateActivation::kGeluTanh;
  if (name == "quick_gelu") return cpu::GateActivation::kQuickGelu;
  throw ValueError(
      text(op, ": activation must be none, silu, gelu, gelu_tanh or quick_gelu, got ", name));
}

GatedRows gated_quantize_of(const Matrix& x, cpu::GateActivation activation, const float* gamma,
                            const float* beta, double eps) {
  const int64_t M = x.M, H = x.K / 2;
  GatedRows y{.x_q = Tensor::empty({M, H}, kInt8),
              .x_scale = Tensor::empty({M}, kFloat32),
              .x_zero = Tensor::empty({M}, kInt32),
              .r_q = Tensor::empty({M, H}, kInt8),
              .r_scale = Tensor::empty({M}, kFloat32)};
  const cpu::GatedQuantizeArgs args{.x = x.values,
                                    .stride = x.stride,
                                    .type = x.type,
                                    .H = H,
                                    .activation = activation,
                                    .gamma = gamma,
                                    .beta = beta,
                                    .eps = static_cast<float>(eps),
                                    .x_q = y.x_q.mutable_data_ptr<int8_t>(),
                                    .x_scale = y.x_scale.mutable_data_ptr<float>(),
                                    .x_zero = y.x_zero.mutable_data_ptr<int32_t>(),
                                    .r_q = y.r_q.mutable_data_ptr<int8_t>(),
                                    .r_scale = y.r_scale.mutable_data_ptr<float>()};
  cpu::GatedQuantize* const run = gated_quantize_kernel();
  parallel_for(0, M, rows_per_task(4 * H), [&](int64_t begin, int64_t end) {
    std::vector<float> v(static_cast<size_t>(H));
    run(args, begin, end, v.data());
  });
  return y;
}

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_quantize(const Tensor& x,
                                                                  std::string_view activation,
                                                                  const OptionalTensor& gamma,
                                                                  const OptionalTensor& beta,
                                                                  double eps) {
  LRAEE_CHECK_VALUE(x.dim() == 2 && x.size(1) % 2 == 0,
                    "gated_quantize: x must have shape [M, 2 H], got ", x.sizes());
  const int64_t H = x.size(1) / 2;
  for (const auto* vector : {&gamma, &beta}) {
    LRAEE_CHECK_VALUE(!vector->has_value() || ((*vector)->dtype() == kFloat32 &&
                                               (*vector)->dim() == 1 && (*vector)->size(0) == H),
                      "gated_quantize: gamma and beta must be float32 [H] = [", H, "]");
  }
  const Tensor rows = with_contiguous_rows(x);
  const OptionalTensor gamma_row = contiguous(gamma), beta_row = contiguous(beta);
  GatedRows y =
      gated_quantize_of({.values = rows.const_data_ptr(),
                         .stride = rows.stride(0),
                         .M = x.size(0),
                         .K = x.size(1),
                         .type = float_type(x.dtype(), "gated_quantize", "x")},
                        gate_activation_from_name("gated_quantize", activation),
                        const_data_ptr<float>(gamma_row), const_data_ptr<float>(beta_row), eps);
  return {std::move(y.x_q), std::move(y.x_scale), std::move(y.x_zero), std::move(y.r_q),
          std::move(y.r_scale)};
}

const CpuOperators operators{LRAEE_OPERATOR(gated_quantize)};

}  // namespace
}  // namespace lraee
