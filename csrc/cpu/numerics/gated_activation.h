#pragma once

// Activations of the form y * G(y) with G(y) = 1 - G(-y). Included inside a target region, after
// gates.h and a simd/<isa>.h.

namespace lraee::cpu {
namespace {

// [NOTE: gated activations]
// gelu, its tanh form and quick_gelu are y * G(y) with a gate G that rises from 0 to 1 and G(-y) =
// 1 - G(y). So
//   y * G(y) = max(y, 0) - t * G(-t),  t = |y|,
// and t * G(-t) is a small bump that is zero to float32 beyond t = clamp. G(-t) itself would need a
// long polynomial, but its root r = G(-t)^(1/2^s) is nearly straight: a polynomial of degree 7 to
// 10 and s squarings give the activation within the bound of its table, without exp or division.
// The sequence of roundings is the same at every level, so all levels agree bit for bit.
template <const auto& kGate>
LRAEE_INLINE Vf gated(Vf y) {
  const Vf t = min(set1(kGate.clamp), abs(y));
  Vf root = set1(kGate.coefficients[kGate.kDegree]);
#pragma GCC unroll 16
  for (int i = kGate.kDegree - 1; i >= 0; --i) root = fma(root, t, set1(kGate.coefficients[i]));
#pragma GCC unroll 8
  for (int i = 0; i < kGate.kSquarings; ++i) root = root * root;
  return fnma(t, root, max(set1(0.0f), y));
}

}  // namespace
}  // namespace lraee::cpu
