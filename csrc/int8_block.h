#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <string_view>

#include "cpu/pack_weight/pack_weight.h"
#include "int8_linear.h"
#include "rows.h"

namespace lraee {

using OptionalTensors = c10::List<std::optional<at::Tensor>>;

// The operands of one block, by operator.
struct Linear {
  at::Tensor w, w_scale, w_sum;
  std::optional<at::Tensor> bias, layer_scale;
  bool symmetric;

  // [w, w_scale, w_sum, bias] and, where the output is scaled, layer_scale.
  Linear(const OptionalTensors& parts, bool is_symmetric)
      : w(required(parts, 0)),
        w_scale(required(parts, 1)),
        w_sum(required(parts, 2)),
        bias(contiguous(parts, 3)),
        layer_scale(contiguous(parts, 4)),
        symmetric(is_symmetric) {}

  int64_t N() const { return w_scale.numel(); }
  PackedWeight weight() const {
    return {w.const_data_ptr<int8_t>(), N(), w.size(1) * cpu::kGroupDepth};
  }

  static at::Tensor required(const OptionalTensors& parts, size_t i) {
    TORCH_CHECK_VALUE(i < parts.size() && parts.get(i).has_value(),
                      "int8_block: a linear must have w, w_scale and w_sum");
    return parts.get(i).value().contiguous();
  }
  static std::optional<at::Tensor> contiguous(const OptionalTensors& parts, size_t i) {
    if (i >= parts.size() || !parts.get(i).has_value()) return std::nullopt;
    return parts.get(i).value().contiguous();
  }
};

struct Norm {
  at::Tensor gamma;
  std::optional<at::Tensor> beta;  // none: RMSNorm
  double eps;

  // [gamma, beta], or [gamma] of an RMSNorm.
  Norm(at::TensorList parts, double epsilon) : eps(epsilon) {
    TORCH_CHECK_VALUE(parts.size() == 1 || parts.size() == 2,
                      "int8_block: a norm must have gamma and, unless it is an RMSNorm, beta");
    gamma = parts[0].contiguous();
    if (parts.size() == 2) beta = parts[1].contiguous();
  }

  const float* beta_ptr() const {
    return beta.has_value() ? beta->const_data_ptr<float>() : nullptr;
  }
};

struct Block {
  Norm norm_1, norm_2;
  Linear in_proj, out_proj, c_fc, c_proj;
  AttentionOperands attention;
  std::string_view activation_name;
  bool first_only;

  cpu::Activation activation() const { return activation_from_name(activation_name); }

  // Tokens of an image that are computed.
  int64_t num_queries(int64_t L) const { return first_only ? 1 : L; }
};

}  // namespace lraee
