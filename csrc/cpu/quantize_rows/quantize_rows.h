#pragma once

#include <cstdint>

#include "cpu/types.h"

namespace lraee::cpu {

struct QuantizeRowsArgs {
  const void* x;  // [M, K], values of a row side by side
  int64_t stride;
  FloatType type;
  int64_t K;
  bool symmetric;
  int8_t* x_q;  // [M, K] contiguous
  float* x_scale;
  int32_t* x_zero;
};

// Rows begin..end - 1. avx_vnni adds nothing where no integers are multiplied: that level runs
// avx2.
using QuantizeRows = void(const QuantizeRowsArgs& args, int64_t begin, int64_t end);
QuantizeRows quantize_rows_scalar, quantize_rows_avx2, quantize_rows_avx512_vnni;

}  // namespace lraee::cpu
