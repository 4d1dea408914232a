#pragma once

// Level avx512_vnni: 512-bit vectors of AVX512 F, BW, DQ, VL and VNNI.

#include "cpu/simd/vectors.h"

// prfchw: every processor with AVX512-VNNI has prefetchw, the software prefetch of lines that will
// be written.
#define LRAEE_BEGIN_AVX512_VNNI        \
  _Pragma("GCC push_options") _Pragma( \
      "GCC target(\"avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,prfchw\")")

LRAEE_BEGIN_AVX512_VNNI

namespace lraee::cpu {
namespace {

constexpr int kWidth = 16;

struct Vf {
  __m512 v;
};
struct Vi {
  __m512i v;
};

LRAEE_INLINE Vf set1(float a) { return {_mm512_set1_ps(a)}; }
LRAEE_INLINE Vi set1(int32_t a) { return {_mm512_set1_epi32(a)}; }
LRAEE_INLINE Vf first_lanes() {
  return {_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)};
}
LRAEE_INLINE Vi bits(Vf a) { return {_mm512_castps_si512(a.v)}; }
LRAEE_INLINE Vf from_bits(Vi a) { return {_mm512_castsi512_ps(a.v)}; }

LRAEE_INLINE Vf operator+(Vf a, Vf b) { return {_mm512_add_ps(a.v, b.v)}; }
LRAEE_INLINE Vf operator-(Vf a, Vf b) { return {_mm512_sub_ps(a.v, b.v)}; }
LRAEE_INLINE Vf operator*(Vf a, Vf b) { return {_mm512_mul_ps(a.v, b.v)}; }
LRAEE_INLINE Vf operator/(Vf a, Vf b) { return {_mm512_div_ps(a.v, b.v)}; }
LRAEE_INLINE Vf fma(Vf a, Vf b, Vf c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
LRAEE_INLINE Vf fnma(Vf a, Vf b, Vf c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
LRAEE_INLINE Vf min(Vf a, Vf b) { return {_mm512_min_ps(a.v, b.v)}; }
LRAEE_INLINE Vf max(Vf a, Vf b) { return {_mm512_max_ps(a.v, b.v)}; }
LRAEE_INLINE Vf abs(Vf a) { return {_mm512_abs_ps(a.v)}; }
LRAEE_INLINE Vf select_lt(Vf a, Vf b, Vf x, Vf y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
}

LRAEE_INLINE Vi operator+(Vi a, Vi b) { return {_mm512_add_epi32(a.v, b.v)}; }
LRAEE_INLINE Vi operator-(Vi a, Vi b) { return {_mm512_sub_epi32(a.v, b.v)}; }
LRAEE_INLINE Vi operator*(Vi a, Vi b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
LRAEE_INLINE Vi operator&(Vi a, Vi b) { return {_mm512_and_si512(a.v, b.v)}; }
LRAEE_INLINE Vi max(Vi a, Vi b) { return {_mm512_max_epi32(a.v, b.v)}; }
template <int kShift>
LRAEE_INLINE Vi shift_left(Vi a) {
  return {_mm512_slli_epi32(a.v, kShift)};
}

template <int kShift>
LRAEE_INLINE Vi shift_right(Vi a) {
  return {_mm512_srli_epi32(a.v, kShift)};
}

LRAEE_INLINE Vf to_f32(Vi a) { return {_mm512_cvtepi32_ps(a.v)}; }
LRAEE_INLINE Vi round_i32(Vf a) { return {_mm512_cvtps_epi32(a.v)}; }

LRAEE_INLINE Vf load(const float* p) { return {_mm512_loadu_ps(p)}; }
LRAEE_INLINE Vf load(const Bf16* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
LRAEE_INLINE Vf load(const F16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}

LRAEE_INLINE uint16_t first_bits(int n) { return static_cast<uint16_t>((1u << n) - 1); }
LRAEE_INLINE Vf load_masked(const float* p, int n) {
  return {_mm512_maskz_loadu_ps(first_bits(n), p)};
}
LRAEE_INLINE Vf load_masked(const Bf16* p, int n) {
  const __m256i half = _mm256_maskz_loadu_epi16(first_bits(n), p);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
LRAEE_INLINE Vf load_masked(const F16* p, int n) {
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_bits(n), p))};
}
LRAEE_INLINE Vf keep_masked(Vf a, int n) { return {_mm512_maskz_mov_ps(first_bits(n), a.v)}; }
LRAEE_INLINE void store_masked(float* p, Vf a, int n) {
  _mm512_mask_storeu_ps(p, first_bits(n), a.v);
}

LRAEE_INLINE Vi load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }

LRAEE_INLINE void store(float* p, Vf a) { _mm512_storeu_ps(p, a.v); }
LRAEE_INLINE void store(Bf16* p, Vf a) {
  const __m512i u = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const __m512i r = _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q),
                                            _mm512_srli_epi32(sum, 16), _mm512_set1_epi32(0x7FC0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(r));
}
LRAEE_INLINE void store(F16* p, Vf a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
LRAEE_INLINE void store(int32_t* p, Vi a) { _mm512_storeu_si512(p, a.v); }
LRAEE_INLINE void store_i8(int8_t* p, Vi a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(a.v));
}

LRAEE_INLINE float fold(Vf a) {
  const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  __m128 r = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  r = _mm_add_ps(r, _mm_movehl_ps(r, r));
  return _mm_cvtss_f32(_mm_add_ss(r, _mm_movehdup_ps(r)));
}
LRAEE_INLINE float max_of(Vf a) { return _mm512_reduce_max_ps(a.v); }
LRAEE_INLINE float min_of(Vf a) { return _mm512_reduce_min_ps(a.v); }
LRAEE_INLINE int32_t max_of(Vi a) { return _mm512_reduce_max_epi32(a.v); }

constexpr int kLeftOffset = 128;
LRAEE_INLINE void store_left(int8_t* p, Vi a) {
  const __m512i u = _mm512_add_epi32(a.v, _mm512_set1_epi32(128));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtusepi32_epi8(u));
}
LRAEE_INLINE void store_left(uint8_t* to, const int8_t* from, int64_t count) {
  const __m512i flip = _mm512_set1_epi8(-128);
  int64_t k = 0;
  for (; k + 64 <= count; k += 64) {
    _mm512_storeu_si512(to + k, _mm512_xor_si512(_mm512_loadu_si512(from + k), flip));
  }
  if (k == count) return;
  const __mmask64 rest = (1ull << (count - k)) - 1;
  _mm512_mask_storeu_epi8(to + k, rest,
                          _mm512_xor_si512(_mm512_maskz_loadu_epi8(rest, from + k), flip));
}

struct Right {
  __m512i v;
};
using Left = Right;

LRAEE_INLINE Right load_right(const int8_t* p) { return {_mm512_loadu_si512(p)}; }
LRAEE_INLINE Left load_left(const void* p) {
  int32_t quad;
  std::memcpy(&quad, p, 4);
  return {_mm512_set1_epi32(quad)};
}
// In assembly: of the intrinsics GCC 12 copies each sum twice a step of a loop, and spills many.
LRAEE_INLINE Vi dot4(Vi acc, Left a, Right b) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc.v) : "v"(a.v), "v"(b.v));
  return acc;
}

using Pairs = Vi;
LRAEE_INLINE Pairs load_pairs(const int16_t* p) { return {_mm512_loadu_si512(p)}; }
LRAEE_INLINE Pairs set_pairs(const int16_t* p) {
  int32_t pair;
  std::memcpy(&pair, p, 4);
  return {_mm512_set1_epi32(pair)};
}
LRAEE_INLINE Vi dot2(Vi acc, Pairs a, Pairs b) {
  asm("vpdpwssd %2, %1, %0" : "+v"(acc.v) : "v"(a.v), "v"(b.v));
  return acc;
}
LRAEE_INLINE void store_pairs(int16_t* p, Vi first, Vi second) {
  _mm512_storeu_si512(
      p, _mm512_mask_blend_epi16(0xAAAAAAAA, first.v, _mm512_slli_epi32(second.v, 16)));
}
LRAEE_INLINE void store_i16(int16_t* p, Vi a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(a.v));
}

}  // namespace
}  // namespace lraee::cpu

LRAEE_END_TARGET
