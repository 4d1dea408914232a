#pragma once

#include <array>
#include <string_view>

#include "common.h"
#include "cpu/int8_linear/int8_linear.h"
#include "cpu/pack_weight/pack_weight.h"

namespace lraee {

// The sizes of a packed weight [N, K].
inline std::array<int64_t, 4> packed_layout(int64_t N, int64_t K) {
  return {cpu::num_panels(N), cpu::num_k_groups(K), cpu::kPanelWidth, cpu::kGroupDepth};
}

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

Tensor int8_linear(const Tensor& x_q, const Tensor& x_scale, const OptionalTensor& x_zero,
                   const Tensor& w, const Tensor& w_scale, const Tensor& w_sum,
                   const OptionalTensor& bias, const OptionalTensor& residual,
                   const OptionalTensor& layer_scale, std::string_view activation, Dtype out_dtype);

// The product alone, of operands that were checked. next: the weight of the next operator,
// prefetched while the last columns are at work.
void int8_linear_of(const cpu::Int8LinearArgs& args, const PackedWeight& next);

}  // namespace lraee
