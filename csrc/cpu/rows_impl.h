#pragma once

// Loops over one row: partial vectors, the fixed summation order, the quantizer. Included inside a
// target region, after a rows_vec_<isa>.h.

namespace lraee::cpu {
namespace {

constexpr int kLanes = 64;  // width of the fixed summation order
constexpr int kGroups = kLanes / kWidth;

// The first n values at p; zero in the lanes beyond. n = kWidth is known at compile time where it
// is the rule.
template <class T>
LRAEE_INLINE Vf load_first(const T* p, int n) {
  if (n == kWidth) return load(p);
  T padded[kWidth] = {};
  std::memcpy(padded, p, static_cast<size_t>(n) * sizeof(T));
  return load(padded);
}

template <class T>
LRAEE_INLINE void store_first(T* p, Vf a, int n) {
  if (n == kWidth) return store(p, a);
  T padded[kWidth];
  store(padded, a);
  std::memcpy(p, padded, static_cast<size_t>(n) * sizeof(T));
}

// kAsQuery: in the form that dot4 wants on its left, see [NOTE: query bias].
template <bool kAsQuery>
LRAEE_INLINE void store_first_i8(int8_t* p, Vi a, int n) {
  int8_t padded[kWidth];
  int8_t* const target = n == kWidth ? p : padded;
  if (kAsQuery) {
    store_query(target, a);
  } else {
    store_i8(target, a);
  }
  if (n < kWidth) std::memcpy(p, padded, static_cast<size_t>(n));
}

// a with zero in the lanes from n on.
LRAEE_INLINE Vf keep_first(Vf a, int n) {
  if (n == kWidth) return a;
  float kept[kWidth];
  store(kept, a);
  return load_first(kept, n);
}

// Calls body(k, n, slot) for n values from k on; slots 0..3 take turns, so that four chains can run
// side by side.
template <class Body>
LRAEE_INLINE void for_vectors(int64_t K, Body body) {
  int64_t k = 0;
  for (; k + 4 * kWidth <= K; k += 4 * kWidth) {
    body(k, kWidth, 0);
    body(k + kWidth, kWidth, 1);
    body(k + 2 * kWidth, kWidth, 2);
    body(k + 3 * kWidth, kWidth, 3);
  }
  for (; k + kWidth <= K; k += kWidth) body(k, kWidth, 0);
  if (k < K) body(k, static_cast<int>(K - k), 0);
}

// Folds the 64 lanes held by kGroups vectors: 64 -> 32 -> ... -> 1, lane[i] += lane[i + half].
LRAEE_INLINE float fold_lanes(Vf (&lanes)[kGroups]) {
#pragma GCC unroll 8
  for (int half = kGroups / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int g = 0; g < half; ++g) lanes[g] = lanes[g] + lanes[g + half];
  }
  return fold(lanes[0]);
}

// Sum in the order of lraee.reference.lane_sum; value(k, n) gives the n values from k on, zero
// beyond.
template <class Value>
LRAEE_INLINE float lane_sum(int64_t K, Value value) {
  Vf lanes[kGroups];
  for (Vf& lane : lanes) lane = set1(0.0f);
  int64_t k = 0;
  for (; k + kLanes <= K; k += kLanes) {
#pragma GCC unroll 8
    for (int g = 0; g < kGroups; ++g) lanes[g] = lanes[g] + value(k + g * kWidth, kWidth);
  }
#pragma GCC unroll 8
  for (int g = 0; g < kGroups; ++g) {
    const int64_t left = K - k - g * kWidth;
    if (left >= kWidth) {
      lanes[g] = lanes[g] + value(k + g * kWidth, kWidth);
    } else if (left > 0) {
      lanes[g] = lanes[g] + value(k + g * kWidth, static_cast<int>(left));
    }
  }
  return fold_lanes(lanes);
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

// One step and the step that stands for 0. scale is NaN for a row that has none.
struct Steps {
  float scale;
  int32_t zero;
};

template <bool kSymmetric>
LRAEE_INLINE Steps steps_of(const Range& range) {
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

template <bool kAsQuery, bool kFit, class T>
LRAEE_INLINE void write_quotients(const T* x, int64_t K, Steps steps, int8_t* x_q) {
  const Quotients quotients(steps.scale);
  const Vi zero = set1(steps.zero);
  for_vectors(K, [&](int64_t k, int n, int) LRAEE_INLINE_LAMBDA {
    const Vf quotient = quotients.of<kFit>(load_first(x + k, n));
    store_first_i8<kAsQuery>(x_q + k, round_i32(quotient) + zero, n);
  });
}

// x_q = round(x / scale) + zero, clamped to -128..127; |x| <= 127 scale (1 + 2^-23) keeps symmetric
// rows above -128.
template <bool kAsQuery = false, class T>
LRAEE_INLINE void write_steps(const T* x, int64_t K, Steps steps, int8_t* x_q) {
  if (std::isnan(steps.scale)) {
    std::memset(x_q, 0, static_cast<size_t>(K));
  } else if (Quotients::fit(steps.scale)) {
    write_quotients<kAsQuery, true>(x, K, steps, x_q);
  } else {
    write_quotients<kAsQuery, false>(x, K, steps, x_q);
  }
}

template <bool kSymmetric, class T>
LRAEE_INLINE Steps steps_of_row(const T* x, int64_t K) {
  Range range;
  for_vectors(K, [&](int64_t k, int n, int slot)
                     LRAEE_INLINE_LAMBDA { range.add<kSymmetric>(load_first(x + k, n), slot); });
  return steps_of<kSymmetric>(range);
}

template <bool kSymmetric, class T>
LRAEE_INLINE Steps quantize_row(const T* x, int64_t K, int8_t* x_q) {
  const Steps steps = steps_of_row<kSymmetric>(x, K);
  write_steps(x, K, steps, x_q);
  return steps;
}

// Calls fn with a null pointer of the element type.
template <class Fn>
LRAEE_INLINE void with_type(FloatType type, Fn fn) {
  switch (type) {
    case FloatType::kF32:
      return fn(static_cast<const float*>(nullptr));
    case FloatType::kBf16:
      return fn(static_cast<const Bf16Value*>(nullptr));
    case FloatType::kF16:
      return fn(static_cast<const F16Value*>(nullptr));
  }
}

}  // namespace
}  // namespace lraee::cpu
