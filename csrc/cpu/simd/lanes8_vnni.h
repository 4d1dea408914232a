#pragma once

// lanes8.h and the products of 256-bit vpdpbusd and vpdpwssd, which have two encodings: included
// inside a target region after LRAEE_VNNI_PREFIX, what the assembler wants before one of them.

#include "cpu/simd/lanes8.h"

namespace lraee::cpu {
namespace {

constexpr int kLeftOffset = 128;
LRAEE_INLINE void store_left(int8_t* p, Vi a) {
  const __m256i u = _mm256_add_epi32(a.v, _mm256_set1_epi32(128));
  const __m128i u16 = _mm_packus_epi32(_mm256_castsi256_si128(u), _mm256_extracti128_si256(u, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(u16, u16));
}

LRAEE_INLINE void store_left(uint8_t* to, const int8_t* from, int64_t count) {
  const __m256i flip = _mm256_set1_epi8(-128);
  int64_t k = 0;
  for (; k + 32 <= count; k += 32) {
    const __m256i s8x32 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + k));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + k), _mm256_xor_si256(s8x32, flip));
  }
  for (; k < count; ++k) to[k] = static_cast<uint8_t>(from[k] + 128);
}

struct Left {
  __m256i v;
};

LRAEE_INLINE Left load_left(const void* p) {
  int32_t quad;
  std::memcpy(&quad, p, 4);
  return {_mm256_set1_epi32(quad)};
}

// In assembly: of the intrinsics GCC 12 copies each sum twice a step of a loop, and spills many.
LRAEE_INLINE Vi dot4(Vi acc, Left a, Right b) {
  asm(LRAEE_VNNI_PREFIX "vpdpbusd %2, %1, %0" : "+v"(acc.v) : "v"(a.v), "v"(b.v));
  return acc;
}
LRAEE_INLINE Vi dot2(Vi acc, Pairs a, Pairs b) {
  asm(LRAEE_VNNI_PREFIX "vpdpwssd %2, %1, %0" : "+v"(acc.v) : "v"(a.v), "v"(b.v));
  return acc;
}

}  // namespace
}  // namespace lraee::cpu
