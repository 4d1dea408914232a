#pragma once

// The quantizer of one row: its range, its scale and zero point, and the quotients. Included inside
// a target region, after a simd/<isa>.h.

#include "cpu/numerics/rows.h"

namespace lraee::cpu {
namespace {

// kAsLeft: in the form that dot4 wants on its left, see [NOTE: u8s8 compensation].
template <bool kAsLeft>
LRAEE_INLINE void store_first_i8(int8_t* p, Vi a, int n) {
  int8_t padded[kWidth];
  int8_t* const target = n == kWidth ? p : padded;
  if (kAsLeft) {
    store_left(target, a);
  } else {
    store_i8(target, a);
  }
  if (n < kWidth) std::memcpy(p, padded, static_cast<size_t>(n));
}

// The range of a row, widened to hold 0. The largest |x| is kept as bits: they order like the
// values, and those of NaN and Inf are above all others, which min and max would lose.
class Range {
 public:
  LRAEE_INLINE Range() {
    for (int slot = 0; slot < 4; ++slot) {
      lo_[slot] = hi_[slot] = set1(0.0f);
      magnitude_[slot] = set1(0);
    }
  }

  template <bool kSymmetric>
  LRAEE_INLINE void add(Vf x, int slot) {
    magnitude_[slot] = max(magnitude_[slot], bits(x) & set1(0x7FFFFFFF));
    if (!kSymmetric) {
      lo_[slot] = min(lo_[slot], x);
      hi_[slot] = max(hi_[slot], x);
    }
  }

  LRAEE_INLINE float lo() const { return min_of(min(min(lo_[0], lo_[1]), min(lo_[2], lo_[3]))); }
  LRAEE_INLINE float hi() const { return max_of(max(max(hi_[0], hi_[1]), max(hi_[2], hi_[3]))); }
  LRAEE_INLINE float magnitude() const {
    const int32_t largest =
        max_of(max(max(magnitude_[0], magnitude_[1]), max(magnitude_[2], magnitude_[3])));
    float value;
    std::memcpy(&value, &largest, 4);
    return value;
  }

 private:
  Vf lo_[4], hi_[4];
  Vi magnitude_[4];
};

// scale is NaN for a row that has none: one with NaN or Inf, or whose range overflows.
struct Quantization {
  float scale;
  int32_t zero_point;
};

template <bool kSymmetric>
LRAEE_INLINE Quantization quantization_of(const Range& range) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const float magnitude = range.magnitude();
  if (!(magnitude < kInfinity)) return {std::numeric_limits<float>::quiet_NaN(), 0};
  const float lo = kSymmetric ? 0.0f : range.lo();
  float scale = kSymmetric ? magnitude / 127.0f : (range.hi() - lo) / 255.0f;
  if (!(scale < kInfinity)) return {std::numeric_limits<float>::quiet_NaN(), 0};
  if (scale < std::numeric_limits<float>::min()) scale = 1.0f;
  if (kSymmetric) return {scale, 0};
  const float zero = (-128.0f - lo / scale) + 12582912.0f - 12582912.0f;
  return {scale, static_cast<int32_t>(std::min(127.0f, std::max(-128.0f, zero)))};
}

// [NOTE: division without the divider] A 512-bit division takes 16 cycles, five multiply-adds take
// 2.5. With r = 1 / b correctly rounded, q0 = a r lies within 2 ulp of a / b; q1 = q0 + (a - b q0)
// r within 1; and then q2 = q1 + (a - b q1) r is a / b correctly rounded (Markstein; Handbook of
// Floating-Point Arithmetic, section 4.7). The remainders are exact while nothing underflows: with
// b as in fit() that holds for |a / b| >= 1/4, and below it every quotient rounds to 0.
class Quotients {
 public:
  LRAEE_INLINE explicit Quotients(float scale)
      : scale_(set1(scale)), minus_scale_(set1(-scale)), reciprocal_(set1(1.0f / scale)) {}

  // Without vectors a fused multiply-add may be a call, and a division is cheap.
  LRAEE_INLINE static bool fit(float scale) {
    return kWidth > 1 && scale >= 0x1p-60f && scale <= 0x1p60f;
  }

  template <bool kFit>
  LRAEE_INLINE Vf of(Vf x) const {
    if (!kFit) return x / scale_;
    const Vf q0 = x * reciprocal_;
    const Vf q1 = fma(fma(q0, minus_scale_, x), reciprocal_, q0);
    return fma(fma(q1, minus_scale_, x), reciprocal_, q1);
  }

 private:
  Vf scale_, minus_scale_, reciprocal_;
};

template <bool kAsLeft, bool kFit, class T>
LRAEE_INLINE void write_quotients(const T* x, int64_t K, Quantization q, int8_t* x_q) {
  const Quotients quotients(q.scale);
  const Vi zero = set1(q.zero_point);
  for_vectors(K, [&](int64_t k, int n, int) LRAEE_INLINE_LAMBDA {
    const Vf quotient = quotients.of<kFit>(load_first(x + k, n));
    store_first_i8<kAsLeft>(x_q + k, round_i32(quotient) + zero, n);
  });
}

// x_q = round(x / scale) + zero_point, clamped to -128..127; |x| <= 127 scale (1 + 2^-23) keeps
// symmetric rows above -128.
template <bool kAsLeft = false, class T>
LRAEE_INLINE void write_quantized(const T* x, int64_t K, Quantization q, int8_t* x_q) {
  if (std::isnan(q.scale)) {
    std::memset(x_q, 0, static_cast<size_t>(K));
  } else if (Quotients::fit(q.scale)) {
    write_quotients<kAsLeft, true>(x, K, q, x_q);
  } else {
    write_quotients<kAsLeft, false>(x, K, q, x_q);
  }
}

template <bool kSymmetric, class T>
LRAEE_INLINE Quantization quantization_of_row(const T* x, int64_t K) {
  Range range;
  for_vectors(K, [&](int64_t k, int n, int slot)
                     LRAEE_INLINE_LAMBDA { range.add<kSymmetric>(load_first(x + k, n), slot); });
  return quantization_of<kSymmetric>(range);
}

template <bool kSymmetric, class T>
LRAEE_INLINE Quantization quantize_row(const T* x, int64_t K, int8_t* x_q) {
  const Quantization q = quantization_of_row<kSymmetric>(x, K);
  write_quantized(x, K, q, x_q);
  return q;
}

}  // namespace
}  // namespace lraee::cpu
