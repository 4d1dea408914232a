#if defined(__x86_64__)

#include <algorithm>
#include <cstring>

#include "cpu/resize/resize.h"
#include "cpu/simd/avx512_vnni.h"

LRAEE_BEGIN_AVX512_VNNI

namespace lraee::cpu {
namespace {

constexpr int64_t kRowsPerVector = 4;
constexpr int64_t kVectors = kResizeRows / kRowsPerVector;

__m512i pair(const int16_t* weights) {
  int32_t both;
  std::memcpy(&both, weights, sizeof both);
  return _mm512_set1_epi32(both);
}

__m128i pixels(const uint8_t* x) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(x)); }

// The sums of both digits as one, rounded, shifted and clipped; see [NOTE: two digits].
__m512i joined(__m512i low, __m512i high) {
  const __m512i half = _mm512_set1_epi32(1 << (kWeightBits - 1));
  const __m512i sum = _mm512_add_epi32(low, _mm512_slli_epi32(high, kDigitBits));
  return _mm512_max_epi32(_mm512_srai_epi32(_mm512_add_epi32(sum, half), kWeightBits),
                          _mm512_setzero_si512());
}

}  // namespace

// A lane of 128 bits is one row: R, G and B of two neighbouring pixels as pairs of 16 bits.
void resize_horizontal_avx512_vnni(const uint8_t* const* rows, const ResizeWeights& weights,
                                   int64_t count, uint8_t* const* out) {
  const __m512i first = _mm512_broadcast_i32x4(
      _mm_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1));
  const __m512i second = _mm512_broadcast_i32x4(
      _mm_setr_epi8(6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1));
  for (int64_t i = 0; i < count; ++i) {
    const int64_t offset = 3 * int64_t{weights.start[i]};
    const int16_t* w_low = weights.low + i * weights.stride;
    const int16_t* w_high = weights.high + i * weights.stride;
    __m512i low[kVectors], high[kVectors];
    for (int64_t v = 0; v < kVectors; ++v) low[v] = high[v] = _mm512_setzero_si512();
    for (int64_t t = 0; t < weights.taps[i]; t += kTapsAtOnce) {
      const __m512i low_01 = pair(w_low + t), low_23 = pair(w_low + t + 2);
      const __m512i high_01 = pair(w_high + t), high_23 = pair(w_high + t + 2);
      for (int64_t v = 0; v < kVectors; ++v) {
        const uint8_t* const* four = rows + kRowsPerVector * v;
        const int64_t at = offset + 3 * t;
        __m512i x = _mm512_castsi128_si512(pixels(four[0] + at));
        x = _mm512_inserti32x4(x, pixels(four[1] + at), 1);
        x = _mm512_inserti32x4(x, pixels(four[2] + at), 2);
        x = _mm512_inserti32x4(x, pixels(four[3] + at), 3);
        const __m512i x_01 = _mm512_shuffle_epi8(x, first);
        const __m512i x_23 = _mm512_shuffle_epi8(x, second);
        low[v] = _mm512_add_epi32(low[v], _mm512_add_epi32(_mm512_madd_epi16(x_01, low_01),
                                                           _mm512_madd_epi16(x_23, low_23)));
        high[v] = _mm512_add_epi32(high[v], _mm512_add_epi32(_mm512_madd_epi16(x_01, high_01),
                                                             _mm512_madd_epi16(x_23, high_23)));
      }
    }
    for (int64_t v = 0; v < kVectors; ++v) {
      alignas(16) int32_t packed[kRowsPerVector];
      _mm_store_si128(reinterpret_cast<__m128i*>(packed),
                      _mm512_cvtusepi32_epi8(joined(low[v], high[v])));
      for (int64_t row = 0; row < kRowsPerVector; ++row) {
        std::memcpy(out[kRowsPerVector * v + row] + 3 * i, &packed[row], sizeof packed[row]);
      }
    }
  }
}

void resize_vertical_avx512_vnni(const uint8_t* rows, int64_t stride, int64_t taps,
                                 const int16_t* low, const int16_t* high, int64_t bytes,
                                 uint8_t* out) {
  constexpr int64_t kColumns = 32;
  if (bytes < kColumns) {
    return resize_vertical_scalar(rows, stride, taps, low, high, bytes, out);
  }
  for (int64_t column = 0; column < bytes; column += kColumns) {
    // The last columns overlap those before them.
    const int64_t x = std::min(column, bytes - kColumns);
    __m512i low_a = _mm512_setzero_si512(), low_b = low_a, high_a = low_a, high_b = low_a;
    for (int64_t t = 0; t < taps; t += 2) {
      const uint8_t* p = rows + t * stride + x;
      // The weight of a row past the last is zero.
      const uint8_t* q = t + 1 < taps ? p + stride : p;
      const __m256i upper = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
      const __m256i lower = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q));
      const __m512i a = _mm512_cvtepu8_epi16(_mm256_unpacklo_epi8(upper, lower));
      const __m512i b = _mm512_cvtepu8_epi16(_mm256_unpackhi_epi8(upper, lower));
      const __m512i w_low = pair(low + t), w_high = pair(high + t);
      low_a = _mm512_add_epi32(low_a, _mm512_madd_epi16(a, w_low));
      low_b = _mm512_add_epi32(low_b, _mm512_madd_epi16(b, w_low));
      high_a = _mm512_add_epi32(high_a, _mm512_madd_epi16(a, w_high));
      high_b = _mm512_add_epi32(high_b, _mm512_madd_epi16(b, w_high));
    }
    // Interleaving worked on lanes of 128 bits: a has columns 0-7 and 16-23, b 8-15 and 24-31.
    const __m128i packed_a = _mm512_cvtusepi32_epi8(joined(low_a, high_a));
    const __m128i packed_b = _mm512_cvtusepi32_epi8(joined(low_b, high_b));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + x), _mm_unpacklo_epi64(packed_a, packed_b));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + x + 16),
                     _mm_unpackhi_epi64(packed_a, packed_b));
  }
}

}  // namespace lraee::cpu

LRAEE_END_TARGET

#endif  // __x86_64__
