#pragma once

#include <cstdint>

#include "cpu/types.h"

namespace lraee::cpu {

enum class Activation : int { kNone, kGelu, kGeluTanh, kQuickGelu };

// y = act((x_q @ w_q.T - x_zero * w_sum) * (x_scale * w_scale) + bias) * layer_scale + residual.
// Vectors are contiguous, w has the layout of pack_weight/pack_weight.h, y is contiguous [M, N].
// Null: absent.
struct Int8LinearArgs {
  int64_t M, N, K;
  const int8_t* x_q;
  int64_t x_stride;
  const float* x_scale;
  const int32_t* x_zero;
  const int8_t* w;
  const float* w_scale;
  const int32_t* w_sum;
  const float* bias;
  const float* layer_scale;
  const void* residual;
  int64_t residual_stride;
  void* y;
  FloatType out_type;
  Activation activation;
};

// Weights that a thread reads after those of a block: the target of a software prefetch.
struct NextWeight {
  const int8_t* w = nullptr;
  int64_t bytes = 0;
};

// Part of y: rows [m_begin, m_end), columns [n_begin, n_end). n_begin is a multiple of kColumnStep,
// and so is n_end unless it is N.
struct Int8LinearBlock {
  int64_t m_begin, m_end, n_begin, n_end;
  NextWeight next = {};
};
inline constexpr int64_t kColumnStep = 64;

// Computes one block. scratch has int8_linear_scratch_bytes(K) bytes, is 64-byte aligned and not
// shared between threads.
using Int8Linear = void(const Int8LinearArgs& args, const Int8LinearBlock& block, void* scratch);
// avx_vnni has two encodings: avx512vl_vnni is the one for machines with AVX512VL but without
// AVX-VNNI.
Int8Linear int8_linear_scalar, int8_linear_avx2, int8_linear_avx_vnni, int8_linear_avx512vl_vnni,
    int8_linear_avx512_vnni, int8_linear_amx;

}  // namespace lraee::cpu
