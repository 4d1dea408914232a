#pragma once

#include <cstdint>

#include "cpu/types.h"

namespace lraee::cpu {

struct LayerNormQuantizeArgs {
  const void* x;  // [M, D], values of a row side by side
  int64_t stride;
  FloatType type;
  int64_t D;
  const float* gamma;
  const float* beta;  // null: RMSNorm, without mean and beta
  float eps;
  bool symmetric;
  int8_t* x_q;  // [M, D] contiguous
  float* x_scale;
  int32_t* x_zero;
};

// Rows begin..end - 1; y is scratch for D floats. avx_vnni runs avx2, as in quantize_rows.h.
using LayerNormQuantize = void(const LayerNormQuantizeArgs& args, int64_t begin, int64_t end,
                               float* y);
LayerNormQuantize layer_norm_quantize_scalar, layer_norm_quantize_avx2,
    layer_norm_quantize_avx512_vnni;

}  // namespace lraee::cpu
