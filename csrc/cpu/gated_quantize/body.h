#pragma once

#include "cpu/numerics/exp.h"
#include "cpu/numerics/gated_activation.h"
#include "cpu/numerics/norm.h"
#include "cpu/numerics/quantizer.h"

namespace lraee::cpu {
namespace {

template <GateActivation kActivation>
LRAEE_INLINE Vf gate_value(Vf g) {
  if constexpr (kActivation == GateActivation::kSilu) {
    return g / (set1(1.0f) + exp_f32(set1(0.0f) - g));
  }
  if constexpr (kActivation == GateActivation::kGelu) return gated<kGeluGate>(g);
  if constexpr (kActivation == GateActivation::kGeluTanh) return gated<kGeluTanhGate>(g);
  if constexpr (kActivation == GateActivation::kQuickGelu) return gated<kQuickGeluGate>(g);
  return g;
}

// y = the norm of y, in place.
template <bool kRms>
LRAEE_INLINE void norm_row(const GatedQuantizeArgs& args, float* y) {
  const Vf mean = set1(kRms ? 0.0f : row_mean(y, args.H));
  const Vf rstd = set1(row_rstd(y, args.H, mean, args.eps));
  for_vectors(args.H, [&](int64_t k, int n, int) LRAEE_INLINE_LAMBDA {
    Vf value = ((load_first(y + k, n) - mean) * rstd) * load_first(args.gamma + k, n);
    if constexpr (!kRms) value = value + load_first(args.beta + k, n);
    store_first(y + k, value, n);
  });
}

// r_q = round((y - (x_q - x_zero) * x_scale) / r_scale), clamped to -127..127; returns r_scale, 254
// of which are x_scale: what the first term leaves is at most half of its scale.
LRAEE_INLINE float write_rest(const float* y, int64_t H, Quantization q, const int8_t* x_q,
                              int8_t* r_q) {
  if (std::isnan(q.scale)) {
    std::memset(r_q, 0, static_cast<size_t>(H));
    return q.scale;
  }
  float r_scale = q.scale / 254.0f;
  if (r_scale < std::numeric_limits<float>::min()) r_scale = 1.0f;
  const Vf step = set1(r_scale), scale = set1(q.scale),
           zero = set1(static_cast<float>(q.zero_point));
  for_vectors(H, [&](int64_t k, int n, int) LRAEE_INLINE_LAMBDA {
    float steps[kWidth];
    for (int i = 0; i < n; ++i) steps[i] = static_cast<float>(x_q[k + i]);
    const Vf rest = load_first(y + k, n) - (load_first(steps, n) - zero) * scale;
    const Vf quotient = min(set1(127.0f), max(set1(-127.0f), rest / step));
    store_first_i8<false>(r_q + k, round_i32(quotient), n);
  });
  return r_scale;
}

template <GateActivation kActivation, class T>
void gated_quantize_of(const GatedQuantizeArgs& args, int64_t begin, int64_t end, float* y) {
  const int64_t H = args.H;
  for (int64_t m = begin; m < end; ++m) {
    const T* const x = static_cast<const T*>(args.x) + m * args.stride;
    for_vectors(H, [&](int64_t k, int n, int) LRAEE_INLINE_LAMBDA {
      store_first(y + k, gate_value<kActivation>(load_first(x + k, n)) * load_first(x + H + k, n),
                  n);
    });
    if (args.gamma != nullptr) {
      args.beta == nullptr ? norm_row<true>(args, y) : norm_row<false>(args, y);
    }
    const Quantization q = quantize_row<false>(y, H, args.x_q + m * H);
    args.x_scale[m] = q.scale;
    args.x_zero[m] = q.zero_point;
    args.r_scale[m] = write_rest(y, H, q, args.x_q + m * H, args.r_q + m * H);
  }
}

inline void gated_quantize_at_level(const GatedQuantizeArgs& args, int64_t begin, int64_t end,
                                    float* y) {
  with_type(args.type, [&]<class T>(const T*) {
    switch (args.activation) {
      case GateActivation::kNone:
        return gated_quantize_of<GateActivation::kNone, T>(args, begin, end, y);
      case GateActivation::kSilu:
        return gated_quantize_of<GateActivation::kSilu, T>(args, begin, end, y);
      case GateActivation::kGelu:
        return gated_quantize_of<GateActivation::kGelu, T>(args, begin, end, y);
      case GateActivation::kGeluTanh:
        return gated_quantize_of<GateActivation::kGeluTanh, T>(args, begin, end, y);
      case GateActivation::kQuickGelu:
        return gated_quantize_of<GateActivation::kQuickGelu, T>(args, begin, end, y);
    }
  });
}

}  // namespace
}  // namespace lraee::cpu
