#pragma once

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
inline Tensor with_contiguous_rows(const Tensor& x) {
  return x.stride(-1) == 1 || x.size(-1) <= 1 ? x.borrowed() : x.contiguous();
}

// Float values [M, K] in memory, rows at any distance.
struct Matrix {
  const void* values;
  int64_t stride, M, K;
  cpu::FloatType type;
};

// Rows of K values that make a task worth its dispatch.
inline int64_t rows_per_task(int64_t K) {
  constexpr int64_t kValuesPerTask = 32768;
  return std::max<int64_t>(1, kValuesPerTask / std::max<int64_t>(1, K));
}

// Kernels of the active level, and the operators, for those that are built of others.
cpu::QuantizeRows* quantize_rows_kernel();
cpu::LayerNormQuantize* layer_norm_quantize_kernel();
cpu::Int8Attention* int8_attention_kernel();
using Quantized = std::tuple<Tensor, Tensor, Tensor>;  // x_q, x_scale, x_zero
Quantized quantize_rows(const Tensor& x, bool symmetric);
Quantized quantize_rows_of(const Matrix& x, bool symmetric);
Quantized layer_norm_quantize(const Tensor& x, const Tensor& gamma, const OptionalTensor& beta,
                              double eps, bool symmetric);
// gamma and beta, where it is given, are K values.
Quantized layer_norm_quantize_of(const Matrix& x, const float* gamma, const float* beta, double eps,
                                 bool symmetric);

// What attention is given beside qkv. rope: float32 [2, R, d], cos and sin of the last R tokens;
// key_mask: bool [B, L].
struct AttentionOperands {
  int64_t num_heads;
  bool causal;
  OptionalTensor rope, key_mask;

  // Raises ValueError or TypeError unless they fit an image of L tokens; and contiguous.
  AttentionOperands(std::string_view op, int64_t B, int64_t L, int64_t d, int64_t heads,
                    bool is_causal, const OptionalTensor& rope_of, const OptionalTensor& mask);

  bool copies_keys() const { return rope.has_value() || key_mask.has_value(); }
  // Fills cos, sin, prefix and key_mask, those of image b on.
  void fill(cpu::Int8AttentionArgs& args, int64_t b) const;
};

// Queries are the first num_queries tokens alone: [B, num_queries, D].
Tensor int8_attention_of(const Tensor& qkv, const AttentionOperands& operands, int64_t num_queries);

}  // namespace lraee
