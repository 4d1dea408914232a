#pragma once

#include <cstdint>

#include "cpu/types.h"

namespace lraee::cpu {

enum class GateActivation : int { kNone, kSilu, kGelu, kGeluTanh, kQuickGelu };

// v = act(x[:, :H]) * x[:, H:], through LayerNorm or RMSNorm where gamma is given, in two terms:
// v ~ (x_q - x_zero) * x_scale + r_q * r_scale.
struct GatedQuantizeArgs {
  const void* x;  // [M, 2 H], values of a row side by side
  int64_t stride;
  FloatType type;
  int64_t H;
  GateActivation activation;
  const float* gamma;  // null: no norm
  const float* beta;   // null: RMSNorm
  float eps;
  int8_t* x_q;  // [M, H] contiguous
  float* x_scale;
  int32_t* x_zero;
  int8_t* r_q;  // [M, H] contiguous
  float* r_scale;
};

// Rows begin..end - 1; y is scratch for H floats. avx_vnni runs avx2, as in quantize_rows.h.
using GatedQuantize = void(const GatedQuantizeArgs& args, int64_t begin, int64_t end, float* y);
GatedQuantize gated_quantize_scalar, gated_quantize_avx2, gated_quantize_avx512_vnni;

}  // namespace lraee::cpu
