// x [M, 2 H] -> v = act(x[:, :H]) * x[:, H:], normed where gamma is given, in two terms: x_q,
// x_scale, x_zero as of quantize_rows, and the rest r_q int8 [M, H], r_scale float32 [M].

#include "cpu/gated_quantize/gated_quantize.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

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
  TORCH_CHECK_VALUE(
      false, "gated_quantize: activation must be none, silu, gelu, gelu_tanh or quick_gelu, got ",
      name);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> gated_quantize(
    const at::Tensor& x, std::string_view activation, const std::optional<at::Tensor>& gamma,
    const std::optional<at::Tensor>& beta, double eps) {
  TORCH_CHECK_VALUE(x.dim() == 2 && x.size(1) % 2 == 0,
                    "gated_quantize: x must have shape [M, 2 H], got ", x.sizes());
  const int64_t M = x.size(0), H = x.size(1) / 2;
  for (const auto* vector : {&gamma, &beta}) {
    TORCH_CHECK_VALUE(!vector->has_value() || ((*vector)->scalar_type() == at::kFloat &&
                                               (*vector)->dim() == 1 && (*vector)->size(0) == H),
                      "gated_quantize: gamma and beta must be float32 [H] = [", H, "]");
  }
  const at::Tensor rows = with_contiguous_rows(x);
  const at::Tensor gamma_row = gamma.has_value() ? gamma->contiguous() : at::Tensor();
  const at::Tensor beta_row = beta.has_value() ? beta->contiguous() : at::Tensor();
  const at::Tensor x_q = at::empty({M, H}, x.options().dtype(at::kChar));
  const at::Tensor x_scale = at::empty({M}, x.options().dtype(at::kFloat));
  const at::Tensor x_zero = at::empty({M}, x.options().dtype(at::kInt));
  const at::Tensor r_q = at::empty_like(x_q), r_scale = at::empty_like(x_scale);
  const cpu::GatedQuantizeArgs args{
      .x = rows.const_data_ptr(),
      .stride = rows.stride(0),
      .type = float_type(x.scalar_type(), "gated_quantize", "x"),
      .H = H,
      .activation = gate_activation_from_name(activation),
      .gamma = gamma.has_value() ? gamma_row.const_data_ptr<float>() : nullptr,
      .beta = beta.has_value() ? beta_row.const_data_ptr<float>() : nullptr,
      .eps = static_cast<float>(eps),
      .x_q = x_q.mutable_data_ptr<int8_t>(),
      .x_scale = x_scale.mutable_data_ptr<float>(),
      .x_zero = x_zero.mutable_data_ptr<int32_t>(),
      .r_q = r_q.mutable_data_ptr<int8_t>(),
      .r_scale = r_scale.mutable_data_ptr<float>()};
  cpu::GatedQuantize* const run =
      by_level<cpu::GatedQuantize>(LRAEE_THREE_LEVELS(cpu::gated_quantize));
  at::parallel_for(0, M, rows_per_task(4 * H), [&](int64_t begin, int64_t end) {
    std::vector<float> v(static_cast<size_t>(H));
    run(args, begin, end, v.data());
  });
  return {x_q, x_scale, x_zero, r_q, r_scale};
}

}  // namespace
}  // namespace lraee

TORCH_LIBRARY_IMPL(lraee, CPU, m) { m.impl("gated_quantize", &lraee::gated_quantize); }
