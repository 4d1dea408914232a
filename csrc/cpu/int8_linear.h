#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "cpu/types.h"

namespace lraee::cpu {

enum class Activation : int { kNone, kGelu, kGeluTanh, kQuickGelu };

// y = act((x_q @ w_q.T - x_zero * w_sum) * (x_scale * w_scale) + bias) * layer_scale + residual.
// Vectors are contiguous, w has the layout of pack_weight.h, y is contiguous [M, N]. Null: absent.
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

// Weights that a thread reads after those of a block, to be asked for before they are needed.
struct WeightAfter {
  const int8_t* w = nullptr;
  int64_t bytes = 0;
};

// Part of y: rows [m_begin, m_end), columns [n_begin, n_end). n_begin is a multiple of kColumnStep,
// and so is n_end unless it is N.
struct Int8LinearBlock {
  int64_t m_begin, m_end, n_begin, n_end;
  WeightAfter after = {};
};
inline constexpr int64_t kColumnStep = 64;

// Bytes of scratch that one call needs: the rows at work, as the instruction set wants to read
// them.
int64_t int8_linear_scratch_bytes(int64_t K);

// Computes one block. scratch is 64-byte aligned and not shared between threads.
void int8_linear(Isa isa, const Int8LinearArgs& args, const Int8LinearBlock& block, void* scratch);

// One per file int8_linear_<isa>.cpp. avx_vnni has two encodings of the same instructions.
void int8_linear_scalar(const Int8LinearArgs& args, const Int8LinearBlock& block, void* scratch);
void int8_linear_avx2(const Int8LinearArgs& args, const Int8LinearBlock& block, void* scratch);
void int8_linear_avx_vnni(const Int8LinearArgs& args, const Int8LinearBlock& block, void* scratch);
void int8_linear_avx512vl_vnni(const Int8LinearArgs& args, const Int8LinearBlock& block,
                               void* scratch);
void int8_linear_avx512_vnni(const Int8LinearArgs& args, const Int8LinearBlock& block,
                             void* scratch);
void int8_linear_amx(const Int8LinearArgs& args, const Int8LinearBlock& block, void* scratch);

}  // namespace lraee::cpu
