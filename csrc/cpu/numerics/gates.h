#pragma once

namespace lraee::cpu {

// A gate as [NOTE: gated activations] in gated_activation.h uses it. bench/fit_activations.py makes
// the tables; |error| is that of the activation y * G(y), absolute, all y, every rounding counted,
// for the part below zero and so for max(y, 0) minus it.
template <int kDegreeOfRoot, int kSquaringsOfRoot>
struct Gate {
  static constexpr int kDegree = kDegreeOfRoot, kSquarings = kSquaringsOfRoot;
  float clamp;
  float coefficients[kDegreeOfRoot + 1];
};

// |error| < 2.6e-07
inline constexpr Gate<7, 3> kGeluGate{
    5.5f,
    {0x1.d581b40000000p-1f, -0x1.76ab6e0000000p-4f, -0x1.050cce0000000p-5f, -0x1.9f86d20000000p-11f,
     0x1.ab66320000000p-10f, -0x1.4efab00000000p-15f, -0x1.2b68080000000p-15f,
     0x1.b2a3540000000p-19f}};
// |error| < 3.9e-07
inline constexpr Gate<8, 3> kGeluTanhGate{
    5.5f,
    {0x1.d581dc0000000p-1f, -0x1.76ba760000000p-4f, -0x1.04a4740000000p-5f, -0x1.92e2e20000000p-11f,
     0x1.ac923c0000000p-10f, 0x1.97e6aa0000000p-14f, -0x1.7542a80000000p-13f,
     0x1.5f70500000000p-15f, -0x1.b5eb840000000p-19f}};
// |error| < 1.6e-06
inline constexpr Gate<10, 4> kQuickGeluGate{
    9.0f,
    {0x1.ea4c2c0000000p-1f, -0x1.a28bde0000000p-5f, -0x1.3d9c340000000p-6f, -0x1.7f868e0000000p-10f,
     0x1.bbcd940000000p-8f, -0x1.d379120000000p-9f, 0x1.06c1a80000000p-10f, -0x1.662e760000000p-13f,
     0x1.275d240000000p-16f, -0x1.0eac920000000p-20f, 0x1.a652d40000000p-26f}};

}  // namespace lraee::cpu
