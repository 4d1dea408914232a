// w_q int8 [N, K] <-> the CPU layout of int8_linear, int8 [ceil(N/16), ceil(K/4), 16, 4], and w_sum
// int32 [N].

#include "cpu/pack_weight/pack_weight.h"

#include <algorithm>
#include <tuple>

#include "box.h"
#include "int8_linear.h"

namespace lraee {
namespace {

std::tuple<Tensor, Tensor> pack_weight(const Tensor& w_q) {
  LRAEE_CHECK_VALUE(w_q.dim() == 2, "pack_weight: w_q must have shape [N, K], got ", w_q.sizes());
  LRAEE_CHECK_TYPE(w_q.dtype() == kInt8, "pack_weight: w_q must be int8, got ", w_q.dtype());
  const int64_t N = w_q.size(0), K = w_q.size(1);
  const Tensor source = w_q.contiguous();
  Tensor w = Tensor::empty(
      {cpu::num_panels(N), cpu::num_k_groups(K), cpu::kPanelWidth, cpu::kGroupDepth}, kInt8);
  Tensor w_sum = Tensor::empty({N}, kInt32);
  cpu::pack_weight(source.const_data_ptr<int8_t>(), N, K, w.mutable_data_ptr<int8_t>(),
                   w_sum.mutable_data_ptr<int32_t>());
  return {std::move(w), std::move(w_sum)};
}

Tensor unpack_weight(const Tensor& w, int64_t N, int64_t K) {
  LRAEE_CHECK_TYPE(w.dtype() == kInt8, "unpack_weight: w must be int8, got ", w.dtype());
  const auto layout = packed_layout(N, K);
  LRAEE_CHECK_VALUE(std::ranges::equal(w.sizes(), layout) && w.is_contiguous(),
                    "unpack_weight: w must be contiguous in the CPU layout ", Sizes(layout),
                    " of [N, K] = [", N, ", ", K, "], got ", w.sizes());
  Tensor w_q = Tensor::empty({N, K}, kInt8);
  cpu::unpack_weight(w.const_data_ptr<int8_t>(), N, K, w_q.mutable_data_ptr<int8_t>());
  return w_q;
}

const CpuOperators operators{LRAEE_OPERATOR(pack_weight), LRAEE_OPERATOR(unpack_weight)};

}  // namespace
}  // namespace lraee
