#if defined(__x86_64__)

#include "cpu/float_linear/float_linear.h"
#include "cpu/simd/avx2.h"

LRAEE_BEGIN_AVX2

namespace lraee::cpu {
namespace {

// 6 rows x 2 registers of sums, 2 of weights, 1 broadcast: 15 of 16 registers.
constexpr int kMaxRows = 6;
constexpr int kPanelsPerTile = 1;
constexpr int kPanelsPerRow = 4;

__m256i lane_mask(int64_t lanes) {
  const __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(lanes)), index);
}

struct Panel {
  __m256 low_f32x8, high_f32x8;

  static Panel zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static Panel load(const float* from, int64_t lanes) {
    if (lanes == kFloatPanel) return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)};
    return {_mm256_maskload_ps(from, lane_mask(lanes)),
            _mm256_maskload_ps(from + 8, lane_mask(lanes - 8))};
  }
  void store(float* to, int64_t lanes) const {
    if (lanes == kFloatPanel) {
      _mm256_storeu_ps(to, low_f32x8);
      _mm256_storeu_ps(to + 8, high_f32x8);
    } else {
      _mm256_maskstore_ps(to, lane_mask(lanes), low_f32x8);
      _mm256_maskstore_ps(to + 8, lane_mask(lanes - 8), high_f32x8);
    }
  }
  void add_product(float x, const Panel& w) {
    const __m256 x_f32x8 = _mm256_set1_ps(x);
    low_f32x8 = _mm256_fmadd_ps(x_f32x8, w.low_f32x8, low_f32x8);
    high_f32x8 = _mm256_fmadd_ps(x_f32x8, w.high_f32x8, high_f32x8);
  }
};

}  // namespace
}  // namespace lraee::cpu

#include "cpu/float_linear/body.h"

namespace lraee::cpu {

void float_linear_avx2(const FloatLinear& block) { float_linear_at_level(block); }

}  // namespace lraee::cpu

LRAEE_END_TARGET

#endif  // __x86_64__
