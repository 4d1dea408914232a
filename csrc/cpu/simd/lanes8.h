#pragma once

// 256-bit vectors of AVX2, FMA and F16C. avx2.h, avx_vnni.h and avx512vl_vnni.h include them inside
// their target regions and add the int8 product.

namespace lraee::cpu {
namespace {

constexpr int kWidth = 8;

struct Vf {
  __m256 v;
};
struct Vi {
  __m256i v;
};

LRAEE_INLINE Vf set1(float a) { return {_mm256_set1_ps(a)}; }
LRAEE_INLINE Vi set1(int32_t a) { return {_mm256_set1_epi32(a)}; }
LRAEE_INLINE Vf first_lanes() { return {_mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7)}; }
LRAEE_INLINE Vi bits(Vf a) { return {_mm256_castps_si256(a.v)}; }
LRAEE_INLINE Vf from_bits(Vi a) { return {_mm256_castsi256_ps(a.v)}; }

LRAEE_INLINE Vf operator+(Vf a, Vf b) { return {_mm256_add_ps(a.v, b.v)}; }
LRAEE_INLINE Vf operator-(Vf a, Vf b) { return {_mm256_sub_ps(a.v, b.v)}; }
LRAEE_INLINE Vf operator*(Vf a, Vf b) { return {_mm256_mul_ps(a.v, b.v)}; }
LRAEE_INLINE Vf operator/(Vf a, Vf b) { return {_mm256_div_ps(a.v, b.v)}; }
LRAEE_INLINE Vf fma(Vf a, Vf b, Vf c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
LRAEE_INLINE Vf fnma(Vf a, Vf b, Vf c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }
LRAEE_INLINE Vf min(Vf a, Vf b) { return {_mm256_min_ps(a.v, b.v)}; }
LRAEE_INLINE Vf max(Vf a, Vf b) { return {_mm256_max_ps(a.v, b.v)}; }
LRAEE_INLINE Vf abs(Vf a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
LRAEE_INLINE Vf select_lt(Vf a, Vf b, Vf x, Vf y) {
  return {_mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
}

LRAEE_INLINE Vi operator+(Vi a, Vi b) { return {_mm256_add_epi32(a.v, b.v)}; }
LRAEE_INLINE Vi operator-(Vi a, Vi b) { return {_mm256_sub_epi32(a.v, b.v)}; }
LRAEE_INLINE Vi operator*(Vi a, Vi b) { return {_mm256_mullo_epi32(a.v, b.v)}; }
LRAEE_INLINE Vi operator&(Vi a, Vi b) { return {_mm256_and_si256(a.v, b.v)}; }
LRAEE_INLINE Vi max(Vi a, Vi b) { return {_mm256_max_epi32(a.v, b.v)}; }
template <int kShift>
LRAEE_INLINE Vi shift_left(Vi a) {
  return {_mm256_slli_epi32(a.v, kShift)};
}

template <int kShift>
LRAEE_INLINE Vi shift_right(Vi a) {
  return {_mm256_srli_epi32(a.v, kShift)};
}

LRAEE_INLINE Vf to_f32(Vi a) { return {_mm256_cvtepi32_ps(a.v)}; }
LRAEE_INLINE Vi round_i32(Vf a) { return {_mm256_cvtps_epi32(a.v)}; }

LRAEE_INLINE Vf load(const float* p) { return {_mm256_loadu_ps(p)}; }
LRAEE_INLINE Vf load(const Bf16* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))};
}
LRAEE_INLINE Vf load(const F16* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}

LRAEE_INLINE Vi load(const int32_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
}

LRAEE_INLINE void store(float* p, Vf a) { _mm256_storeu_ps(p, a.v); }
LRAEE_INLINE void store(Bf16* p, Vf a) {
  const __m256i u = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i r =
      _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), _mm256_set1_epi32(0x7FC0), is_nan);
  const __m128i half = _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half);
}
LRAEE_INLINE void store(F16* p, Vf a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
LRAEE_INLINE void store(int32_t* p, Vi a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.v);
}
LRAEE_INLINE void store_i8(int8_t* p, Vi a) {
  const __m128i i16 =
      _mm_packs_epi32(_mm256_castsi256_si128(a.v), _mm256_extracti128_si256(a.v, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(i16, i16));
}

LRAEE_INLINE float fold(Vf a) {
  __m128 r = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  r = _mm_add_ps(r, _mm_movehl_ps(r, r));
  return _mm_cvtss_f32(_mm_add_ss(r, _mm_movehdup_ps(r)));
}
LRAEE_INLINE float max_of(Vf a) {
  __m128 r = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  r = _mm_max_ps(r, _mm_movehl_ps(r, r));
  return _mm_cvtss_f32(_mm_max_ss(r, _mm_movehdup_ps(r)));
}
LRAEE_INLINE float min_of(Vf a) { return -max_of(Vf{_mm256_sub_ps(_mm256_setzero_ps(), a.v)}); }
LRAEE_INLINE int32_t max_of(Vi a) {
  __m128i r = _mm_max_epi32(_mm256_castsi256_si128(a.v), _mm256_extracti128_si256(a.v, 1));
  r = _mm_max_epi32(r, _mm_shuffle_epi32(r, 0x4E));
  return _mm_cvtsi128_si32(_mm_max_epi32(r, _mm_shuffle_epi32(r, 0xB1)));
}

using Pairs = Vi;
LRAEE_INLINE Pairs load_pairs(const int16_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
}
LRAEE_INLINE Pairs set_pairs(const int16_t* p) {
  int32_t pair;
  std::memcpy(&pair, p, 4);
  return {_mm256_set1_epi32(pair)};
}
LRAEE_INLINE void store_pairs(int16_t* p, Vi first, Vi second) {
  const __m256i pairs = _mm256_blend_epi16(first.v, _mm256_slli_epi32(second.v, 16), 0xAA);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), pairs);
}
LRAEE_INLINE void store_i16(int16_t* p, Vi a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packs_epi32(_mm256_castsi256_si128(a.v), _mm256_extracti128_si256(a.v, 1)));
}

struct Right {
  __m256i v;
};
LRAEE_INLINE Right load_right(const int8_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
}

}  // namespace
}  // namespace lraee::cpu
