#pragma once

#include "cpu/numerics/norm.h"
#include "cpu/numerics/quantizer.h"

namespace lraee::cpu {
namespace {

// kRms: RMSNorm, for which the mean counts as 0 and beta is left out.
template <bool kSymmetric, bool kRms, class T>
LRAEE_INLINE Quantization layer_norm_quantize_row(const LayerNormQuantizeArgs& args, const T* x,
                                                  float* y, int8_t* x_q) {
  const Vf mean = set1(kRms ? 0.0f : row_mean(x, args.D));
  const Vf rstd = set1(row_rstd(x, args.D, mean, args.eps));
  Range range;
  for_vectors(args.D, [&](int64_t k, int n, int slot) LRAEE_INLINE_LAMBDA {
    Vf value = ((load_first(x + k, n) - mean) * rstd) * load_first(args.gamma + k, n);
    if constexpr (!kRms) value = value + load_first(args.beta + k, n);
    value = keep_first(value, n);
    range.add<kSymmetric>(value, slot);
    store_first(y + k, value, n);
  });
  const Quantization q = quantization_of<kSymmetric>(range);
  write_quantized(y, args.D, q, x_q);
  return q;
}

template <bool kSymmetric, bool kRms, class T>
void layer_norm_quantize_of(const LayerNormQuantizeArgs& args, int64_t begin, int64_t end,
                            float* y) {
  const T* x = static_cast<const T*>(args.x);
  for (int64_t m = begin; m < end; ++m) {
    const Quantization q = layer_norm_quantize_row<kSymmetric, kRms>(args, x + m * args.stride, y,
                                                                     args.x_q + m * args.D);
    args.x_scale[m] = q.scale;
    args.x_zero[m] = q.zero_point;
  }
}

inline void layer_norm_quantize_at_level(const LayerNormQuantizeArgs& args, int64_t begin,
                                         int64_t end, float* y) {
  with_type(args.type, [&]<class T>(const T*) {
    const auto run = [&]<bool kSymmetric>() {
      if (args.beta == nullptr) {
        layer_norm_quantize_of<kSymmetric, true, T>(args, begin, end, y);
      } else {
        layer_norm_quantize_of<kSymmetric, false, T>(args, begin, end, y);
      }
    };
    args.symmetric ? run.template operator()<true>() : run.template operator()<false>();
  });
}

}  // namespace
}  // namespace lraee::cpu
