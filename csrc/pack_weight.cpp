// w_q int8 [N, K] <-> the CPU layout of int8_linear, int8 [ceil(N/16), ceil(K/4), 16, 4], and w_sum
// int32 [N].

#include "cpu/pack_weight/pack_weight.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include <tuple>

namespace lraee {
namespace {

std::tuple<at::Tensor, at::Tensor> pack_weight(const at::Tensor& w_q) {
  TORCH_CHECK_VALUE(w_q.dim() == 2, "pack_weight: w_q must have shape [N, K], got ", w_q.sizes());
  TORCH_CHECK_TYPE(w_q.scalar_type() == at::kChar, "pack_weight: w_q must be int8, got ",
                   w_q.scalar_type());
  const int64_t N = w_q.size(0), K = w_q.size(1);
  const at::Tensor source = w_q.contiguous();
  at::Tensor w =
      at::empty({cpu::num_panels(N), cpu::num_k_groups(K), cpu::kPanelWidth, cpu::kGroupDepth},
                w_q.options());
  at::Tensor w_sum = at::empty({N}, w_q.options().dtype(at::kInt));
  cpu::pack_weight(source.const_data_ptr<int8_t>(), N, K, w.mutable_data_ptr<int8_t>(),
                   w_sum.mutable_data_ptr<int32_t>());
  return {w, w_sum};
}

at::Tensor unpack_weight(const at::Tensor& w, int64_t N, int64_t K) {
  TORCH_CHECK_TYPE(w.scalar_type() == at::kChar, "unpack_weight: w must be int8, got ",
                   w.scalar_type());
  const std::vector<int64_t> expected{cpu::num_panels(N), cpu::num_k_groups(K), cpu::kPanelWidth,
                                      cpu::kGroupDepth};
  TORCH_CHECK_VALUE(w.sizes() == at::IntArrayRef(expected) && w.is_contiguous(),
                    "unpack_weight: w must be contiguous in the CPU layout ",
                    at::IntArrayRef(expected), " of [N, K] = [", N, ", ", K, "], got ", w.sizes());
  at::Tensor w_q = at::empty({N, K}, w.options());
  cpu::unpack_weight(w.const_data_ptr<int8_t>(), N, K, w_q.mutable_data_ptr<int8_t>());
  return w_q;
}

}  // namespace
}  // namespace lraee

TORCH_LIBRARY_IMPL(lraee, CPU, m) {
  m.impl("pack_weight", &lraee::pack_weight);
  m.impl("unpack_weight", &lraee::unpack_weight);
}
