#pragma once

// exp on vectors, the same fma sequence at every level, so the same bits. Included inside a target
// region, after a simd/<isa>.h.

namespace lraee::cpu {
namespace {

constexpr float kLog2E = 0x1.715476p+0f;
constexpr float kLn2High = 0x1.62e400p-1f;  // 14 bits: n * kLn2High is exact for |n| < 512
constexpr float kLn2Low = 0x1.7f7d1cp-20f;
constexpr float kRoundingMagic = 0x1.8p+23f;  // a sum with it is an integer, rounded half to even

// 2^n exp(r) = exp(x) with |r| <= ln2 / 2 (1 + 2^-20): shifted holds n in its low bits, power is
// exp(r).
struct ExpParts {
  Vf shifted, power;
};

// The minimax polynomial of degree 6 is within 2e-9 of exp relatively and exp(0) is 1; with its
// coefficients and each step rounded the result is within 2^-23 (tests/csrc/test_exp.py).
LRAEE_INLINE ExpParts exp_parts(Vf x) {
  const Vf shifted = fma(x, set1(kLog2E), set1(kRoundingMagic));
  const Vf n = shifted - set1(kRoundingMagic);
  const Vf r = fma(n, set1(-kLn2Low), fma(n, set1(-kLn2High), x));
  Vf power = fma(set1(0x1.6ab956p-10f), r, set1(0x1.126d38p-7f));
  power = fma(power, r, set1(0x1.55589cp-5f));
  power = fma(power, r, set1(0x1.55540ap-3f));
  power = fma(power, r, set1(0x1.fffffap-2f));
  power = fma(power, r, set1(1.0f));
  return {shifted, fma(power, r, set1(1.0f))};
}

// 2^n from the low bits of shifted. Anything for NaN: a product with it is NaN all the same, which
// an addition to the exponent of power would not be.
LRAEE_INLINE Vf power_of_two(Vi shifted) {
  return from_bits(shift_left<23>(shifted) + set1(0x3F800000));
}

// exp(x) for x <= 0 or NaN; 0 below -86, which is off by less than 5e-38.
LRAEE_INLINE Vf exp_nonpositive(Vf x) {
  const ExpParts e = exp_parts(x);
  return select_lt(x, set1(-86.0f), set1(0.0f), e.power * power_of_two(bits(e.shifted)));
}

// exp(x) for any x; 0 below -86 and infinity above 88.8.
LRAEE_INLINE Vf exp_f32(Vf x) {
  const ExpParts e = exp_parts(min(set1(88.8f), x));
  // 2^128 is no float32: its half, and twice the power.
  const Vf half = power_of_two(bits(e.shifted) - set1(1));
  return select_lt(x, set1(-86.0f), set1(0.0f), (e.power + e.power) * half);
}

LRAEE_INLINE Vf sigmoid(Vf x) { return set1(1.0f) / (set1(1.0f) + exp_f32(set1(0.0f) - x)); }

}  // namespace
}  // namespace lraee::cpu
