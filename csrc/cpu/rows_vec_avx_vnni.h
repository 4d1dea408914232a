#pragma once

#include "cpu/rows_vec_256.h"

// Level avx_vnni: rows_vec_256.h and 256-bit vpdpbusd, in the encoding that the file names:
// LRAEE_EVEX_VNNI for AVX512VL.

namespace lraee::cpu {
namespace {

constexpr int kQueryBias = 128;
LRAEE_INLINE void store_query(int8_t* p, Vi a) {
  const __m256i u = _mm256_add_epi32(a.v, _mm256_set1_epi32(128));
  const __m128i u16 = _mm_packus_epi32(_mm256_castsi256_si128(u), _mm256_extracti128_si256(u, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(u16, u16));
}

struct Query {
  __m256i v;
};

LRAEE_INLINE Query load_query(const int8_t* p) {
  int32_t quad;
  std::memcpy(&quad, p, 4);
  return {_mm256_set1_epi32(quad)};
}

LRAEE_INLINE Vi dot4(Vi acc, Query q, Quads k) {
#if defined(LRAEE_EVEX_VNNI)
  return {_mm256_dpbusd_epi32(acc.v, q.v, k.v)};
#else
  return {_mm256_dpbusd_avx_epi32(acc.v, q.v, k.v)};
#endif
}

}  // namespace
}  // namespace lraee::cpu
