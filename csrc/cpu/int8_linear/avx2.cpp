// int8_linear on AVX2 without VNNI. vpmaddubsw would saturate (255 * 128 * 2 > 32,767), so both
// operands are widened to int16, and vpmaddwd adds products of two in int32. A tile of 4 rows and 8
// columns keeps 8 registers of half sums: columns side by side, even and odd pairs of k in
// neighbouring lanes, folded at the end.

#if defined(__x86_64__)

#include "cpu/int8_linear/blocking.h"
#include "cpu/int8_linear/int8_linear.h"
#include "cpu/int8_linear/prefetch.h"
#include "cpu/numerics/gates.h"
#include "cpu/pack_weight/pack_weight.h"
#include "cpu/simd/avx2.h"

LRAEE_BEGIN_AVX2

namespace lraee::cpu {
namespace {

struct Tile {
  static constexpr int kRows = 4, kCols = 8, kTailCols = 8;
  static constexpr int32_t kXOffset = 0;
  using X = int16_t;

  static void convert(const int8_t* x_q, int64_t count, X* x) {
    int64_t k = 0;
    for (; k + 16 <= count; k += 16) {
      const __m128i x_s8x16 = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x_q + k));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(x + k), _mm256_cvtepi8_epi16(x_s8x16));
    }
    for (; k < count; ++k) x[k] = x_q[k];
  }

  template <int R, int C>
  static void multiply(const X* x, int64_t stride, const int8_t* w, int64_t groups, int32_t* acc,
                       Prefetch&) {
    constexpr int kColsPerVector = 4, P = C / kColsPerVector;
    __m256i sums[R][P];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) sums[r][p] = _mm256_setzero_si256();
    }
    for (int64_t g = 0; g < groups; ++g) {
      __m256i w_s16x16[P];
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) {
        w_s16x16[p] =
            _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w) + p));
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        int64_t four;
        std::memcpy(&four, x + r * stride, sizeof(four));
        const __m256i x_s16x16 = _mm256_set1_epi64x(four);
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p) {
          sums[r][p] = _mm256_add_epi32(sums[r][p], _mm256_madd_epi16(x_s16x16, w_s16x16[p]));
        }
      }
      w += kLineBytes;
      x += kGroupDepth;
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      // hadd leaves columns 0 1 4 5 | 2 3 6 7: swap the middle quadwords.
      const __m256i folded = _mm256_hadd_epi32(sums[r][0], sums[r][1]);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(acc + r * C),
                          _mm256_permute4x64_epi64(folded, 0xD8));
    }
  }
};

}  // namespace
}  // namespace lraee::cpu

#include "cpu/int8_linear/body.h"

namespace lraee::cpu {

void int8_linear_avx2(const Int8LinearArgs& args, const Int8LinearBlock& block, void* scratch) {
  int8_linear_at_level(args, block, scratch);
}

}  // namespace lraee::cpu

LRAEE_END_TARGET

#endif  // __x86_64__
