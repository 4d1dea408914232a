#pragma once

// Level scalar: vectors of one lane in plain C++, for any processor: no target region.

#include "cpu/simd/vectors.h"

namespace lraee::cpu {
namespace {

constexpr int kWidth = 1;

struct Vf {
  float v;
};
struct Vi {
  int32_t v;
};

LRAEE_INLINE Vf set1(float a) { return {a}; }
LRAEE_INLINE Vi set1(int32_t a) { return {a}; }
LRAEE_INLINE Vf first_lanes() { return {0.0f}; }
LRAEE_INLINE Vi bits(Vf a) {
  Vi r;
  std::memcpy(&r.v, &a.v, 4);
  return r;
}
LRAEE_INLINE Vf from_bits(Vi a) {
  Vf r;
  std::memcpy(&r.v, &a.v, 4);
  return r;
}

LRAEE_INLINE Vf operator+(Vf a, Vf b) { return {a.v + b.v}; }
LRAEE_INLINE Vf operator-(Vf a, Vf b) { return {a.v - b.v}; }
LRAEE_INLINE Vf operator*(Vf a, Vf b) { return {a.v * b.v}; }
LRAEE_INLINE Vf operator/(Vf a, Vf b) { return {a.v / b.v}; }
LRAEE_INLINE Vf fma(Vf a, Vf b, Vf c) { return {std::fma(a.v, b.v, c.v)}; }
LRAEE_INLINE Vf fnma(Vf a, Vf b, Vf c) { return {std::fma(-a.v, b.v, c.v)}; }
LRAEE_INLINE Vf min(Vf a, Vf b) { return {a.v < b.v ? a.v : b.v}; }
LRAEE_INLINE Vf max(Vf a, Vf b) { return {a.v > b.v ? a.v : b.v}; }
LRAEE_INLINE Vf abs(Vf a) { return {std::fabs(a.v)}; }
LRAEE_INLINE Vf select_lt(Vf a, Vf b, Vf x, Vf y) { return a.v < b.v ? x : y; }

LRAEE_INLINE uint32_t wrap(int32_t a) { return static_cast<uint32_t>(a); }
LRAEE_INLINE Vi operator+(Vi a, Vi b) { return {static_cast<int32_t>(wrap(a.v) + wrap(b.v))}; }
LRAEE_INLINE Vi operator-(Vi a, Vi b) { return {static_cast<int32_t>(wrap(a.v) - wrap(b.v))}; }
LRAEE_INLINE Vi operator*(Vi a, Vi b) { return {static_cast<int32_t>(wrap(a.v) * wrap(b.v))}; }
LRAEE_INLINE Vi operator&(Vi a, Vi b) { return {a.v & b.v}; }
LRAEE_INLINE Vi max(Vi a, Vi b) { return {a.v > b.v ? a.v : b.v}; }
template <int kShift>
LRAEE_INLINE Vi shift_left(Vi a) {
  return {static_cast<int32_t>(wrap(a.v) << kShift)};
}

template <int kShift>
LRAEE_INLINE Vi shift_right(Vi a) {
  return {static_cast<int32_t>(wrap(a.v) >> kShift)};
}

LRAEE_INLINE Vf to_f32(Vi a) { return {static_cast<float>(a.v)}; }
// Adding 1.5 * 2^23 leaves the rounded integer in the low bits.
LRAEE_INLINE Vi round_i32(Vf a) { return bits({a.v + 12582912.0f}) - Vi{0x4B400000}; }

LRAEE_INLINE Vf load(const float* p) { return {*p}; }
LRAEE_INLINE Vf load(const Bf16* p) {
  return from_bits({static_cast<int32_t>(uint32_t{p->bits} << 16)});
}
LRAEE_INLINE Vf load(const F16* p) {
  const uint32_t sign = (p->bits & 0x8000u) << 16, rest = p->bits & 0x7FFFu;
  // Exponent and mantissa moved into place lack 112 in the exponent: a product restores it, for
  // subnormals too.
  if (rest >= 0x7C00u) return from_bits({static_cast<int32_t>(sign | 0x7F800000u | rest << 13)});
  const Vf magnitude = from_bits({static_cast<int32_t>(rest << 13)}) * Vf{0x1p112f};
  return from_bits({bits(magnitude).v | static_cast<int32_t>(sign)});
}

LRAEE_INLINE Vi load(const int32_t* p) { return {*p}; }

LRAEE_INLINE void store(float* p, Vf a) { *p = a.v; }
LRAEE_INLINE void store(Bf16* p, Vf a) {
  const uint32_t u = wrap(bits(a).v);
  p->bits = a.v != a.v ? 0x7FC0 : static_cast<uint16_t>((u + 0x7FFFu + (u >> 16 & 1u)) >> 16);
}
LRAEE_INLINE void store(F16* p, Vf a) {
  const uint32_t u = wrap(bits(a).v), sign = u >> 16 & 0x8000u, rest = u & 0x7FFFFFFFu;
  uint32_t half;
  if (rest > 0x7F800000u) {
    half = 0x7E00u;
  } else if (rest >= 0x477FF000u) {  // 65520: rounds to infinity
    half = 0x7C00u;
  } else if (rest < 0x38800000u) {  // below 2^-14: adding 0.5 leaves multiples of 2^-24
    half = wrap(bits(Vf{std::fabs(a.v) + 0.5f}).v) - 0x3F000000u;
  } else {
    half = (rest - 0x38000000u + 0xFFFu + (rest >> 13 & 1u)) >> 13;
  }
  p->bits = static_cast<uint16_t>(sign | half);
}
LRAEE_INLINE void store(int32_t* p, Vi a) { *p = a.v; }
LRAEE_INLINE void store_i8(int8_t* p, Vi a) {
  *p = static_cast<int8_t>(std::min(127, std::max(-128, a.v)));
}

LRAEE_INLINE float fold(Vf a) { return a.v; }
LRAEE_INLINE float max_of(Vf a) { return a.v; }
LRAEE_INLINE float min_of(Vf a) { return a.v; }
LRAEE_INLINE int32_t max_of(Vi a) { return a.v; }

constexpr int kLeftOffset = 0;
LRAEE_INLINE void store_left(int8_t* p, Vi a) { store_i8(p, a); }
struct Right {
  int8_t v[4];
};
using Left = Right;

LRAEE_INLINE Right load_right(const int8_t* p) {
  Right r;
  std::memcpy(r.v, p, 4);
  return r;
}
LRAEE_INLINE Left load_left(const int8_t* p) { return load_right(p); }
LRAEE_INLINE Vi dot4(Vi acc, Left a, Right b) {
  return {acc.v + a.v[0] * b.v[0] + a.v[1] * b.v[1] + a.v[2] * b.v[2] + a.v[3] * b.v[3]};
}

struct Pairs {
  int16_t v[2];
};
LRAEE_INLINE Pairs load_pairs(const int16_t* p) { return {{p[0], p[1]}}; }
LRAEE_INLINE Pairs set_pairs(const int16_t* p) { return load_pairs(p); }
LRAEE_INLINE Vi dot2(Vi acc, Pairs a, Pairs b) {
  return acc + Vi{a.v[0] * b.v[0]} + Vi{a.v[1] * b.v[1]};
}
LRAEE_INLINE void store_pairs(int16_t* p, Vi first, Vi second) {
  p[0] = static_cast<int16_t>(first.v);
  p[1] = static_cast<int16_t>(second.v);
}
LRAEE_INLINE void store_i16(int16_t* p, Vi a) { *p = static_cast<int16_t>(a.v); }

}  // namespace
}  // namespace lraee::cpu
