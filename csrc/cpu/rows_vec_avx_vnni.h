#pragma once

#include "cpu/rows_vec_256.h"

// Level avx_vnni: rows_vec_256.h and 256-bit vpdpbusd, in the encoding that the file names: LRAEE_EVEX_VNNI for AVX512VL.

namespace lraee::cpu {
namespace {

constexpr int kQueryBias = 128;

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
