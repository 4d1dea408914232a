#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <tuple>

#include "common.h"
#include "cpu/int8_attention/int8_attention.h"
#include "cpu/layer_norm_quantize/layer_norm_quantize.h"
#include "cpu/quantize_rows/quantize_rows.h"

namespace lraee {

// x itself where the values of a row lie side by side, at any distance between rows; else a copy.
inline at::Tensor with_contiguous_rows(const at::Tensor& x) {
  return x.stride(-1) == 1 || x.size(-1) <= 1 ? x : x.contiguous();
}

// Rows of K values that make a task worth its dispatch.
inline int64_t rows_per_task(int64_t K) {
  constexpr int64_t kValuesPerTask = 32768;
  return std::max<int64_t>(1, kValuesPerTask / std::max<int64_t>(1, K));
}

// Kernels of the active level, and the operators, for those that are built of others.
cpu::QuantizeRows* quantize_rows_kernel();
cpu::LayerNormQuantize* layer_norm_quantize_kernel();
cpu::Int8Attention* int8_attention_kernel();
std::tuple<at::Tensor, at::Tensor, at::Tensor> quantize_rows(const at::Tensor& x, bool symmetric);
std::tuple<at::Tensor, at::Tensor, at::Tensor> layer_norm_quantize(const at::Tensor& x,
                                                                   const at::Tensor& gamma,
                                                                   const at::Tensor& beta,
                                                                   double eps, bool symmetric);
// Queries are the first num_queries tokens alone: [B, num_queries, D].
at::Tensor int8_attention_of(const at::Tensor& qkv, int64_t num_heads, bool causal,
                             int64_t num_queries);

}  // namespace lraee
