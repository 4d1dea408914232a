// A vector of one float32, in plain C++. Included in an unnamed namespace, after <cmath> and
// types.h.

inline uint32_t bits_of(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof(bits));
  return bits;
}

inline float float_of(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, sizeof(v));
  return v;
}

inline float from_f16(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, magnitude = half & 0x7FFFu;
  if (magnitude >= 0x7C00u) return float_of(sign | 0x7F800000u | (magnitude & 0x3FFu) << 13);
  // Exact: a product with a power of two, which also brings subnormals in place.
  const float shifted = float_of(magnitude << 13) * 0x1p112f;
  return float_of(sign | bits_of(shifted));
}

inline uint16_t to_f16(float v) {
  const uint32_t sign = bits_of(v) >> 16 & 0x8000u, magnitude = bits_of(v) & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return static_cast<uint16_t>(sign | 0x7E00u);
  if (magnitude >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00u);
  if (magnitude < 0x38800000u) {
    // Subnormal result: one addition rounds it to a multiple of 2^-24, half to even.
    return static_cast<uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f)));
  }
  const uint32_t rounded = magnitude + 0xFFFu + (magnitude >> 13 & 1u);
  return static_cast<uint16_t>(sign | ((rounded >> 13) - (112u << 10)));
}

struct V {
  static constexpr int kWidth = 1;
  using F = float;
  using I = int32_t;

  static F set1(float v) { return v; }
  static I set1(int32_t v) { return v; }
  static I load(const int32_t* p) { return *p; }
  static F load(F32, const float* p) { return *p; }
  static F load(Bf16, const uint16_t* p) { return float_of(static_cast<uint32_t>(*p) << 16); }
  static F load(F16, const uint16_t* p) { return from_f16(*p); }
  static void store(F32, float* p, F v) { *p = v; }
  // Half to even; NaN becomes the quiet NaN 0x7FC0, as in torch.
  static void store(Bf16, uint16_t* p, F v) {
    const uint32_t bits = bits_of(v);
    *p = static_cast<uint16_t>(v != v ? 0x7FC0u : (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
  }
  static void store(F16, uint16_t* p, F v) { *p = to_f16(v); }
  static F to_float(I v) { return static_cast<float>(v); }
  static I sub(I a, I b) { return a - b; }
  static I mul(I a, I b) { return a * b; }
  static F add(F a, F b) { return a + b; }
  static F mul(F a, F b) { return a * b; }
  // a * b + c and c - a * b, rounded once.
  static F fma(F a, F b, F c) { return std::fma(a, b, c); }
  static F fnma(F a, F b, F c) { return std::fma(-a, b, c); }
  // Both return b if either is NaN.
  static F max(F a, F b) { return a > b ? a : b; }
  static F min(F a, F b) { return a < b ? a : b; }
  static F abs(F a) { return float_of(bits_of(a) & 0x7FFFFFFFu); }
};
