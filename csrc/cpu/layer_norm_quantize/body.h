#pragma once

#include "cpu/numerics/quantizer.h"

namespace lraee::cpu {
namespace {

template <bool kSymmetric, class T>
LRAEE_INLINE Quantization layer_norm_quantize_row(const LayerNormQuantizeArgs& args, const T* x,
                                                  float* y, int8_t* x_q) {
  const int64_t D = args.D;
  const float size = static_cast<float>(D);
  const float mean =
      lane_sum(D, [&](int64_t k, int n) LRAEE_INLINE_LAMBDA { return load_first(x + k, n); }) /
      size;
  const Vf mean_f32 = set1(mean);
  const float variance = lane_sum(D,
                                  [&](int64_t k, int n) LRAEE_INLINE_LAMBDA {
                                    const Vf d = keep_first(load_first(x + k, n) - mean_f32, n);
                                    return d * d;
                                  }) /
                         size;
  const Vf rstd = set1(1.0f / std::sqrt(variance + args.eps));
  Range range;
  for_vectors(D, [&](int64_t k, int n, int slot) LRAEE_INLINE_LAMBDA {
    const Vf d = load_first(x + k, n) - mean_f32;
    const Vf value =
        keep_first((d * rstd) * load_first(args.gamma + k, n) + load_first(args.beta + k, n), n);
    range.add<kSymmetric>(value, slot);
    store_first(y + k, value, n);
  });
  const Quantization q = quantization_of<kSymmetric>(range);
  write_quantized(y, D, q, x_q);
  return q;
}

template <bool kSymmetric, class T>
void layer_norm_quantize_of(const LayerNormQuantizeArgs& args, int64_t begin, int64_t end,
                            float* y) {
  const T* x = static_cast<const T*>(args.x);
  for (int64_t m = begin; m < end; ++m) {
    const Quantization q =
        layer_norm_quantize_row<kSymmetric>(args, x + m * args.stride, y, args.x_q + m * args.D);
    args.x_scale[m] = q.scale;
    args.x_zero[m] = q.zero_point;
  }
}

inline void layer_norm_quantize_at_level(const LayerNormQuantizeArgs& args, int64_t begin,
                                         int64_t end, float* y) {
  with_type(args.type, [&]<class T>(const T*) {
    if (args.symmetric) {
      layer_norm_quantize_of<true, T>(args, begin, end, y);
    } else {
      layer_norm_quantize_of<false, T>(args, begin, end, y);
    }
  });
}

}  // namespace
}  // namespace lraee::cpu
