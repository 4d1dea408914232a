#pragma once

#include "cpu/numerics/rows.h"

// P V in fixed point, for rows of many keys: e = exp(logit - largest) and V in int16, exact int32
// sums, so the same bits at every level. See is_fixed_point. Included inside a target region, after
// a simd/<isa>.h.

namespace lraee::cpu {
namespace {

// Channel scales of the values of all keys: NaN where one is NaN or Inf. value(l) is row l.
template <class T, class Value>
LRAEE_INLINE void scales_of_values(int64_t d, Value value, AttentionScratch& s) {
  const auto channels = [&]<int kVectors>(int64_t c, int n) LRAEE_INLINE_LAMBDA {
    Vi magnitude[kVectors];
    for (Vi& lane : magnitude) lane = set1(0);
    for (int64_t l = 0; l < s.L; ++l) {
      const T* const row = value(l) + c;
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const Vf x = load_first(row + v * kWidth, n);
        magnitude[v] = max(magnitude[v], bits(x) & set1(0x7FFFFFFF));
      }
    }
    for (int v = 0; v < kVectors; ++v) store(s.v_scale + c + v * kWidth, from_bits(magnitude[v]));
  };
  constexpr int kSideBySide = kWidth == 1 ? 1 : 4;
  int64_t c = 0;
  for (; c + kSideBySide * kWidth <= d; c += kSideBySide * kWidth) {
    channels.template operator()<kSideBySide>(c, kWidth);
  }
  for (; c < d; c += kWidth) {
    channels.template operator()<1>(c, static_cast<int>(std::min<int64_t>(kWidth, d - c)));
  }
  for (; c < s.d_pad; ++c) s.v_scale[c] = 0.0f;
  for (c = 0; c < s.d_pad; ++c) {
    const float magnitude = s.v_scale[c];
    const float scale = magnitude / static_cast<float>(kLargestValue);
    const bool is_finite = magnitude < std::numeric_limits<float>::infinity();
    s.v_scale[c] = !is_finite ? std::numeric_limits<float>::quiet_NaN()
                   : scale < std::numeric_limits<float>::min() ? 1.0f
                                                               : scale;
  }
}

// value(l): row l of the values.
template <class T, class Value>
LRAEE_INLINE void pack_fixed_values(int64_t d, Value value, AttentionScratch& s) {
  scales_of_values<T>(d, value, s);
  float* const reciprocal = s.row;
  for (int64_t c = 0; c < s.d_pad; ++c) reciprocal[c] = 1.0f / s.v_scale[c];
  std::fill(s.v_q, s.v_q + round_up(s.L, 2) * s.d_pad, int16_t{0});
  for (int64_t l = 0; l < s.L; l += 2) {
    const bool is_pair = l + 1 < s.L;
    const T* const first = value(l);
    const T* const second = value(is_pair ? l + 1 : l);
    int16_t* const row = s.v_q + l * s.d_pad;
    for_vectors(d, [&](int64_t c, int n, int) LRAEE_INLINE_LAMBDA {
      const Vf times = load(reciprocal + c);
      const Vi a = round_i32(load_first(first + c, n) * times);
      const Vi b = is_pair ? round_i32(load_first(second + c, n) * times) : set1(0);
      store_pairs(row + 2 * c, a, b);
    });
  }
}

// e of a row and its sum -> p_q = round(e * step) of row i of the block, of which no value and no
// sum is too large.
LRAEE_INLINE void store_fixed_row(const float* row, float sum, int64_t i, AttentionScratch& s) {
  int16_t* const p_q = s.p_q + i * s.L_pad;
  const float step =
      std::min(static_cast<float>(kLargestWeight), static_cast<float>(kLargestSum) / sum);
  s.p_scale[i] = 1.0f / (step * sum);
  if (std::isnan(sum)) {
    std::fill(p_q, p_q + s.L_pad, int16_t{0});
    return;
  }
  const Vf times = set1(step);
  for_vectors(s.L_pad, [&](int64_t j, int, int) LRAEE_INLINE_LAMBDA {
    store_i16(p_q + j, round_i32(load(row + j) * times));
  });
}

// sums[q][c..] = sum over j of p_q[q, j] v_q[j, c..]; a function of its own, as GCC 12 spills the
// sums where it is inlined.
template <int kQueries, int kVectors>
__attribute__((noinline)) void fixed_products(const int16_t* p, int64_t p_stride,
                                              const int16_t* v_row, int64_t v_stride, int64_t pairs,
                                              int32_t* sums) {
  Vi acc[kQueries][kVectors];
#pragma GCC unroll 8
  for (int q = 0; q < kQueries; ++q) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) acc[q][v] = set1(0);
  }
  do {
    Pairs value[kVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) value[v] = load_pairs(v_row + 2 * v * kWidth);
#pragma GCC unroll 8
    for (int q = 0; q < kQueries; ++q) {
      const Pairs weight = set_pairs(p + q * p_stride);
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) acc[q][v] = dot2(acc[q][v], weight, value[v]);
    }
    p += 2;
    v_row += v_stride;
  } while (--pairs != 0);
#pragma GCC unroll 8
  for (int q = 0; q < kQueries; ++q) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) store(sums + (q * kVectors + v) * kWidth, acc[q][v]);
  }
}

// value_tile with p_q and v_q.
template <int kQueries, int kUnits, class T>
LRAEE_INLINE void fixed_value_tile(const Int8AttentionArgs& args, const AttentionScratch& s,
                                   int64_t query, int64_t c, T* y) {
  constexpr int kVectors = kUnits * (16 / kWidth);
  int32_t sums[kQueries * kVectors * kWidth];
  fixed_products<kQueries, kVectors>(s.p_q + query * s.L_pad, s.L_pad, s.v_q + 2 * c, 2 * s.d_pad,
                                     (s.L + 1) / 2, sums);
  for (int q = 0; q < kQueries; ++q) {
    T* const row = y + q * args.H * args.d + c;
    const Vf p_scale = set1(s.p_scale[query + q]);
    for_vectors(std::min<int64_t>(kUnits * 16, args.d - c),
                [&](int64_t k, int n, int) LRAEE_INLINE_LAMBDA {
                  const Vf sum = to_f32(load(sums + q * kVectors * kWidth + k));
                  store_first(row + k, sum * (p_scale * load(s.v_scale + c + k)), n);
                });
  }
}

}  // namespace
}  // namespace lraee::cpu
