#pragma once

#include "cpu/rows_vec_256.h"

// Level avx2: rows_vec_256.h and an int8 product without VNNI.

namespace lraee::cpu {
namespace {

constexpr int kQueryBias = 0;
LRAEE_INLINE void store_query(int8_t* p, Vi a) { store_i8(p, a); }

struct Query {
  __m256i q, magnitude;
};

LRAEE_INLINE Query load_query(const int8_t* p) {
  int32_t quad;
  std::memcpy(&quad, p, 4);
  const __m256i q = _mm256_set1_epi32(quad);
  return {q, _mm256_abs_epi8(q)};
}

// vpmaddubsw saturates beyond int16: |q| <= 127 and |k| <= 127 keep its pairs within 2 * 127 * 127
// = 32258.
LRAEE_INLINE Vi dot4(Vi acc, Query q, Quads k) {
  const __m256i pairs = _mm256_maddubs_epi16(q.magnitude, _mm256_sign_epi8(k.v, q.q));
  return {_mm256_add_epi32(acc.v, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))};
}

}  // namespace
}  // namespace lraee::cpu
