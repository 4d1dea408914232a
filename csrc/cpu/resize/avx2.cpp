#if defined(__x86_64__)

#include <algorithm>
#include <cstring>

#include "cpu/resize/resize.h"
#include "cpu/simd/avx2.h"

LRAEE_BEGIN_AVX2

namespace lraee::cpu {
namespace {

constexpr int64_t kRowsPerVector = 2;
constexpr int64_t kVectors = kResizeRows / kRowsPerVector;

__m256i pair(const int16_t* weights) {
  int32_t both;
  std::memcpy(&both, weights, sizeof both);
  return _mm256_set1_epi32(both);
}

// The sums of both digits as one, rounded and shifted; see [NOTE: two digits].
__m256i joined(__m256i low, __m256i high) {
  const __m256i half = _mm256_set1_epi32(1 << (kWeightBits - 1));
  const __m256i sum = _mm256_add_epi32(low, _mm256_slli_epi32(high, kDigitBits));
  return _mm256_srai_epi32(_mm256_add_epi32(sum, half), kWeightBits);
}

}  // namespace

// A lane of 128 bits is one row: R, G and B of two neighbouring pixels as pairs of 16 bits.
void resize_horizontal_avx2(const uint8_t* const* rows, const ResizeWeights& weights, int64_t count,
                            uint8_t* const* out) {
  const __m256i first = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1));
  const __m256i second = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1));
  for (int64_t i = 0; i < count; ++i) {
    const int64_t offset = 3 * int64_t{weights.start[i]};
    const int16_t* w_low = weights.low + i * weights.stride;
    const int16_t* w_high = weights.high + i * weights.stride;
    __m256i low[kVectors], high[kVectors];
    for (int64_t v = 0; v < kVectors; ++v) low[v] = high[v] = _mm256_setzero_si256();
    for (int64_t t = 0; t < weights.taps[i]; t += kTapsAtOnce) {
      const __m256i low_01 = pair(w_low + t), low_23 = pair(w_low + t + 2);
      const __m256i high_01 = pair(w_high + t), high_23 = pair(w_high + t + 2);
      for (int64_t v = 0; v < kVectors; ++v) {
        const uint8_t* a = rows[kRowsPerVector * v] + offset + 3 * t;
        const uint8_t* b = rows[kRowsPerVector * v + 1] + offset + 3 * t;
        const __m256i x = _mm256_inserti128_si256(
            _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(a))),
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(b)), 1);
        const __m256i x_01 = _mm256_shuffle_epi8(x, first);
        const __m256i x_23 = _mm256_shuffle_epi8(x, second);
        low[v] = _mm256_add_epi32(low[v], _mm256_add_epi32(_mm256_madd_epi16(x_01, low_01),
                                                           _mm256_madd_epi16(x_23, low_23)));
        high[v] = _mm256_add_epi32(high[v], _mm256_add_epi32(_mm256_madd_epi16(x_01, high_01),
                                                             _mm256_madd_epi16(x_23, high_23)));
      }
    }
    for (int64_t v = 0; v < kVectors; ++v) {
      const __m256i words = _mm256_packs_epi32(joined(low[v], high[v]), _mm256_setzero_si256());
      const __m256i bytes = _mm256_packus_epi16(words, words);
      const int32_t a = _mm256_extract_epi32(bytes, 0), b = _mm256_extract_epi32(bytes, 4);
      std::memcpy(out[kRowsPerVector * v] + 3 * i, &a, sizeof a);
      std::memcpy(out[kRowsPerVector * v + 1] + 3 * i, &b, sizeof b);
    }
  }
}

void resize_vertical_avx2(const uint8_t* rows, int64_t stride, int64_t taps, const int16_t* low,
                          const int16_t* high, int64_t bytes, uint8_t* out) {
  constexpr int64_t kColumns = 16;
  if (bytes < kColumns) {
    return resize_vertical_scalar(rows, stride, taps, low, high, bytes, out);
  }
  for (int64_t column = 0; column < bytes; column += kColumns) {
    // The last columns overlap those before them.
    const int64_t x = std::min(column, bytes - kColumns);
    __m256i low_a = _mm256_setzero_si256(), low_b = low_a, high_a = low_a, high_b = low_a;
    for (int64_t t = 0; t < taps; t += 2) {
      const uint8_t* p = rows + t * stride + x;
      // The weight of a row past the last is zero.
      const uint8_t* q = t + 1 < taps ? p + stride : p;
      const __m128i upper = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
      const __m128i lower = _mm_loadu_si128(reinterpret_cast<const __m128i*>(q));
      const __m256i a = _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(upper, lower));
      const __m256i b = _mm256_cvtepu8_epi16(_mm_unpackhi_epi8(upper, lower));
      const __m256i w_low = pair(low + t), w_high = pair(high + t);
      low_a = _mm256_add_epi32(low_a, _mm256_madd_epi16(a, w_low));
      low_b = _mm256_add_epi32(low_b, _mm256_madd_epi16(b, w_low));
      high_a = _mm256_add_epi32(high_a, _mm256_madd_epi16(a, w_high));
      high_b = _mm256_add_epi32(high_b, _mm256_madd_epi16(b, w_high));
    }
    // Packing works on lanes of 128 bits: 0-3, 8-11, 4-7, 12-15 are put in order.
    const __m256i words = _mm256_permute4x64_epi64(
        _mm256_packs_epi32(joined(low_a, high_a), joined(low_b, high_b)), 0xD8);
    const __m128i packed =
        _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + x), packed);
  }
}

}  // namespace lraee::cpu

LRAEE_END_TARGET

#endif  // __x86_64__
