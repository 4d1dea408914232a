#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <string_view>

#include "cpu/int8_linear/int8_linear.h"

namespace lraee {

// Raises ValueError on an unknown name.
cpu::Activation activation_from_name(std::string_view name);

// A packed weight [N, K].
struct PackedWeight {
  const int8_t* w = nullptr;
  int64_t N = 0, K = 0;

  // What a thread reads of it first, from column n on.
  cpu::NextWeight from(int64_t n) const;
};

// The kernel of the active level.
cpu::Int8Linear* int8_linear_kernel();

// next: the weight of the next operator, prefetched while the last columns are at work.
at::Tensor int8_linear(const at::Tensor& x_q, const at::Tensor& x_scale,
                       const std::optional<at::Tensor>& x_zero, const at::Tensor& w,
                       const at::Tensor& w_scale, const at::Tensor& w_sum,
                       const std::optional<at::Tensor>& bias,
                       const std::optional<at::Tensor>& residual,
                       const std::optional<at::Tensor>& layer_scale, std::string_view activation,
                       at::ScalarType out_dtype, const PackedWeight& next = {});

}  // namespace lraee
