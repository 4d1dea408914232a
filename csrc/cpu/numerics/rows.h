#pragma once

// Loops over one row: partial vectors and the fixed summation order. Included inside a target
// region, after a simd/<isa>.h.

namespace lraee::cpu {
namespace {

constexpr int kLanes = 64;  // width of the fixed summation order
constexpr int kGroups = kLanes / kWidth;

// The first n values at p; zero in the lanes beyond. n = kWidth is known at compile time where it
// is the rule.
template <class T>
LRAEE_INLINE Vf load_first(const T* p, int n) {
  if (n == kWidth) return load(p);
  if constexpr (kWidth == 16) {  // bytes and then a vector of them would wait for each other
    return load_masked(p, n);
  } else {
    T padded[kWidth] = {};
    std::memcpy(padded, p, static_cast<size_t>(n) * sizeof(T));
    return load(padded);
  }
}

template <class T>
LRAEE_INLINE void store_first(T* p, Vf a, int n) {
  if (n == kWidth) return store(p, a);
  if constexpr (kWidth == 16 && std::is_same_v<T, float>) {
    store_masked(p, a, n);
  } else {
    T padded[kWidth];
    store(padded, a);
    std::memcpy(p, padded, static_cast<size_t>(n) * sizeof(T));
  }
}

// a with zero in the lanes from n on.
template <class V = Vf>
LRAEE_INLINE V keep_first(V a, int n) {
  if (n == kWidth) return a;
  if constexpr (kWidth == 16) {
    return keep_masked(a, n);
  } else {
    float kept[kWidth];
    store(kept, a);
    return load_first(kept, n);
  }
}

// Calls body(k, n, slot) for n values from k on; slots 0..3 alternate, so that four chains can run
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

// Sum in the order of lraee.ops.reference.lane_sum; value(k, n) gives the n values from k on, zero
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

// Calls fn with a null pointer of the element type.
template <class Fn>
LRAEE_INLINE void with_type(FloatType type, Fn fn) {
  switch (type) {
    case FloatType::kF32:
      return fn(static_cast<const float*>(nullptr));
    case FloatType::kBf16:
      return fn(static_cast<const Bf16*>(nullptr));
    case FloatType::kF16:
      return fn(static_cast<const F16*>(nullptr));
  }
}

}  // namespace
}  // namespace lraee::cpu
