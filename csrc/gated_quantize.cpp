// x [M, 2 H] -> v = act(x[:, :H]) * x[:, H:], normed where gamma is given, in two terms: x_q,
// x_scale, x_zero as of quantize_rows, and the rest r_q int8 [M, H], r_scale float32 [M].

#include "cpu/gated_quantize/gated_quantize.h"

#include <tuple>
#include <vector>

#include "box.h"
#include "levels.h"
#include "rows.h"

namespace lraee {

namespace {

cpu::GateActivation gate_activation_from_name(std::string_view name) {
  if (name == "none") return cpu::GateActivation::kNone;
  if (name == "silu") return cpu::GateActivation::kSilu;
  if (name == "gelu") return cpu::GateActivation::kGelu;
  if (name == "gelu_tanh") return cpu::GateActivation::kGeluTanh;
  if (name == "quick_gelu") return cpu::GateActivation::kQuickGelu;
  throw ValueError(text(
      "gated_quantize: activation must be none, silu, gelu, gelu_tanh or quick_gelu, got ", name));
}

using GatedRows = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

GatedRows gated_quantize(const Tensor& x, std::string_view activation, const OptionalTensor& gamma,
                         const OptionalTensor& beta, double eps) {
  LRAEE_CHECK_VALUE(x.dim() == 2 && x.size(1) % 2 == 0,
                    "gated_quantize: x must have shape [M, 2 H], got ", x.sizes());
  const int64_t M = x.size(0), H = x.size(1) / 2;
  for (const auto* vector : {&gamma, &beta}) {
    LRAEE_CHECK_VALUE(!vector->has_value() || ((*vector)->dtype() == kFloat32 &&
                                               (*vector)->dim() == 1 && (*vector)->size(0) == H),
                      "gated_quantize: gamma and beta must be float32 [H] = [", H, "]");
  }
  const Tensor rows = with_contiguous_rows(x);
  const OptionalTensor gamma_row = contiguous(gamma), beta_row = contiguous(beta);
  GatedRows y{Tensor::empty({M, H}, kInt8), Tensor::empty({M}, kFloat32),
              Tensor::empty({M}, kInt32), Tensor::empty({M, H}, kInt8),
              Tensor::empty({M}, kFloat32)};
  const auto& [x_q, x_scale, x_zero, r_q, r_scale] = y;
  const cpu::GatedQuantizeArgs args{.x = rows.const_data_ptr(),
                                    .stride = rows.stride(0),
                                    .type = float_type(x.dtype(), "gated_quantize", "x"),
                                    .H = H,
                                    .activation = gate_activation_from_name(activation),
                                    .gamma = const_data_ptr<float>(gamma_row),
                                    .beta = const_data_ptr<float>(beta_row),
                                    .eps = static_cast<float>(eps),
                                    .x_q = x_q.mutable_data_ptr<int8_t>(),
                                    .x_scale = x_scale.mutable_data_ptr<float>(),
                                    .x_zero = x_zero.mutable_data_ptr<int32_t>(),
                                    .r_q = r_q.mutable_data_ptr<int8_t>(),
                                    .r_scale = r_scale.mutable_data_ptr<float>()};
  cpu::GatedQuantize* const run =
      by_level<cpu::GatedQuantize>(LRAEE_THREE_LEVELS(cpu::gated_quantize));
  parallel_for(0, M, rows_per_task(4 * H), [&](int64_t begin, int64_t end) {
    std::vector<float> v(static_cast<size_t>(H));
    run(args, begin, end, v.data());
  });
  return y;
}

const CpuOperators operators{LRAEE_OPERATOR(gated_quantize)};

}  // namespace
}  // namespace lraee
