// Activations of the form y * G(y) with G(y) = 1 - G(-y), for any vector V. Included inside a
// target region after vec_<isa>.h.

// [NOTE: gated activations]
// gelu, its tanh form and quick_gelu are y * G(y) with a gate G that rises from 0 to 1 and G(-y) =
// 1 - G(y). So
//   y * G(y) = max(y, 0) - t * G(-t),  t = |y|,
// and t * G(-t) is a small bump that is zero to float32 beyond t = clamp. G(-t) itself would need a
// long polynomial, but its root r = G(-t)^(1/2^s) is nearly straight: a polynomial of degree 7 to
// 10 and s squarings give the activation within the bound of its table, without exp or division.
// The sequence of roundings is the same at every level, so all levels agree bit for bit.
template <const auto& kGate>
inline V::F gated(V::F y) {
  const V::F t = V::min(V::set1(kGate.clamp), V::abs(y));
  V::F root = V::set1(kGate.coefficients[kGate.kDegree]);
#pragma GCC unroll 16
  for (int i = kGate.kDegree - 1; i >= 0; --i)
    root = V::fma(root, t, V::set1(kGate.coefficients[i]));
#pragma GCC unroll 8
  for (int i = 0; i < kGate.kSquarings; ++i) root = V::mul(root, root);
  return V::fnma(t, root, V::max(V::set1(0.0f), y));
}
