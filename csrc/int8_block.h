#pragma once

#include <optional>
#include <string_view>
#include <vector>

#include "cpu/pack_weight/pack_weight.h"
#include "int8_linear.h"
#include "rows.h"

namespace lraee {

// The operands of one block, by operator.
struct Linear {
  Tensor w, w_scale, w_sum;
  OptionalTensor bias, layer_scale;
  bool symmetric;
  // Their values: each question to a tensor is a call of libtorch.
  struct Values {
    const int8_t* w;
    const float* w_scale;
    const int32_t* w_sum;
    const float *bias, *layer_scale;
  } values;
  int64_t N;

  // [w, w_scale, w_sum, bias] and, where the output is scaled, layer_scale; borrowed.
  Linear(const std::vector<OptionalTensor>& parts, bool is_symmetric)
      : w(required(parts, 0)),
        w_scale(required(parts, 1)),
        w_sum(required(parts, 2)),
        bias(parts.size() > 3 ? contiguous(parts[3]) : std::nullopt),
        layer_scale(parts.size() > 4 ? contiguous(parts[4]) : std::nullopt),
        symmetric(is_symmetric),
        values{w.const_data_ptr<int8_t>(), w_scale.const_data_ptr<float>(),
               w_sum.const_data_ptr<int32_t>(), const_data_ptr<float>(bias),
               const_data_ptr<float>(layer_scale)},
        N(w_scale.numel()) {}

  PackedWeight weight() const { return {values.w, N, w.size(1) * cpu::kGroupDepth}; }

  static Tensor required(const std::vector<OptionalTensor>& parts, size_t i) {
    LRAEE_CHECK_VALUE(i < parts.size() && parts[i].has_value(),
                      "int8_block: a linear must have w, w_scale and w_sum");
    return parts[i]->contiguous();
  }
};

struct Norm {
  Tensor gamma;
  OptionalTensor beta;  // none: RMSNorm
  double eps;

  // [gamma, beta], or [gamma] of an RMSNorm; borrowed.
  Norm(const std::vector<Tensor>& parts, double epsilon)
      : gamma(checked(parts)[0].contiguous()), eps(epsilon) {
    if (parts.size() == 2) beta = parts[1].contiguous();
  }

  const float* gamma_ptr() const { return gamma.const_data_ptr<float>(); }
  const float* beta_ptr() const { return const_data_ptr<float>(beta); }

  static const std::vector<Tensor>& checked(const std::vector<Tensor>& parts) {
    LRAEE_CHECK_VALUE(parts.size() == 1 || parts.size() == 2,
                      "int8_block: a norm must have gamma and, unless it is an RMSNorm, beta");
    return parts;
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
