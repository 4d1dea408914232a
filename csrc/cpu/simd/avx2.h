#pragma once

// Level avx2: 256-bit vectors, and an int8 product without VNNI.

#include "cpu/simd/vectors.h"

#define LRAEE_BEGIN_AVX2 _Pragma("GCC push_options") _Pragma("GCC target(\"avx2,fma,f16c\")")

LRAEE_BEGIN_AVX2

#include "cpu/simd/lanes8.h"

namespace lraee::cpu {
namespace {

constexpr int kLeftOffset = 0;
LRAEE_INLINE void store_left(int8_t* p, Vi a) { store_i8(p, a); }

struct Left {
  __m256i v, magnitude;
};

LRAEE_INLINE Left load_left(const int8_t* p) {
  int32_t quad;
  std::memcpy(&quad, p, 4);
  const __m256i v = _mm256_set1_epi32(quad);
  return {v, _mm256_abs_epi8(v)};
}

// vpmaddubsw saturates beyond int16: |a| <= 127 and |b| <= 127 keep its pairs within 2 * 127 * 127
// = 32258.
LRAEE_INLINE Vi dot4(Vi acc, Left a, Right b) {
  const __m256i pairs = _mm256_maddubs_epi16(a.magnitude, _mm256_sign_epi8(b.v, a.v));
  return {_mm256_add_epi32(acc.v, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))};
}

LRAEE_INLINE Vi dot2(Vi acc, Pairs a, Pairs b) {
  return {_mm256_add_epi32(acc.v, _mm256_madd_epi16(a.v, b.v))};
}

}  // namespace
}  // namespace lraee::cpu

LRAEE_END_TARGET
