#pragma once

#include <cstdint>

#include "cpu/types.h"

namespace lraee::cpu {

struct Int8AttentionArgs {
  const void* qkv;  // [B, L, 3 H d], the values of a token side by side
  int64_t stride_b, stride_l;
  FloatType type;
  int64_t L, H, d;
  bool is_causal;
  float root;  // d^-1/2
  void* y;     // [B, i_end, H d], the tokens of an image side by side
  int64_t y_stride;
  const float* cos =
      nullptr;  // [L - prefix, d], and sin: rotates the tokens from prefix on; or null
  const float* sin = nullptr;
  int64_t prefix = 0;
  const bool* key_mask = nullptr;  // [B, L], contiguous: the tokens that are keys; or null: all

  // Whether keys are copied in float32 before they are quantized: rotated, or the valid ones alone.
  bool copies_keys() const { return cos != nullptr || key_mask != nullptr; }
};

// Queries i_begin..i_end - 1 of one head of one image.
struct Int8AttentionPart {
  int64_t b, h, i_begin, i_end;
};

using Int8Attention = void(const Int8AttentionArgs& args, const Int8AttentionPart& part,
                           void* scratch);
// avx_vnni has two encodings: avx512vl_vnni is the one for machines with AVX512VL but without
// AVX-VNNI.
Int8Attention int8_attention_scalar, int8_attention_avx2, int8_attention_avx_vnni,
    int8_attention_avx512vl_vnni, int8_attention_avx512_vnni;

}  // namespace lraee::cpu
