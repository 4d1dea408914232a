#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <optional>
#include <string_view>
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
std::tuple<at::Tensor, at::Tensor, at::Tensor> layer_norm_quantize(
    const at::Tensor& x, const at::Tensor& gamma, const std::optional<at::Tensor>& beta, double eps,
    bool symmetric);

// What attention is given beside qkv. rope: float32 [2, R, d], cos and sin of the last R tokens;
// key_mask: bool [B, L].
struct AttentionOperands {
  int64_t num_heads;
  bool causal;
  std::optional<at::Tensor> rope, key_mask;

  // Raises ValueError or TypeError unless they fit an image of L tokens; and contiguous.
  AttentionOperands(std::string_view op, int64_t B, int64_t L, int64_t d, int64_t heads,
                    bool is_causal, const std::optional<at::Tensor>& rope_of,
                    const std::optional<at::Tensor>& mask);

  bool copies_keys() const { return rope.has_value() || key_mask.has_value(); }
  // Fills cos, sin, prefix and key_mask, those of image b on.
  void fill(cpu::Int8AttentionArgs& args, int64_t b) const;
};

// Queries are the first num_queries tokens alone: [B, num_queries, D].
at::Tensor int8_attention_of(const at::Tensor& qkv, const AttentionOperands& operands,
                             int64_t num_queries);

}  // namespace lraee
