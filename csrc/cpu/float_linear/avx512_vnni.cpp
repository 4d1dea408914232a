#if defined(__x86_64__)

#include "cpu/float_linear/float_linear.h"
#include "cpu/simd/avx512_vnni.h"

LRAEE_BEGIN_AVX512_VNNI

namespace lraee::cpu {
namespace {

// 12 rows x 2 panels of sums, 2 registers of weights: 26 of 32; each broadcast feeds two fmas.
constexpr int kMaxRows = 12;
constexpr int kPanelsPerTile = 2;
constexpr int kPanelsPerRow = 16;

struct Panel {
  __m512 lanes_f32x16;

  static __mmask16 mask(int64_t lanes) { return static_cast<__mmask16>((1u << lanes) - 1); }
  static Panel zero() { return {_mm512_setzero_ps()}; }
  static Panel load(const float* from, int64_t lanes) {
    if (lanes == kFloatPanel) return {_mm512_loadu_ps(from)};
    return {_mm512_maskz_loadu_ps(mask(lanes), from)};
  }
  void store(float* to, int64_t lanes) const {
    _mm512_mask_storeu_ps(to, mask(lanes), lanes_f32x16);
  }
  void add_product(float x, const Panel& w) {
    lanes_f32x16 = _mm512_fmadd_ps(_mm512_set1_ps(x), w.lanes_f32x16, lanes_f32x16);
  }
};

}  // namespace
}  // namespace lraee::cpu

#include "cpu/float_linear/body.h"

namespace lraee::cpu {

void float_linear_avx512_vnni(const FloatLinear& block) { float_linear_at_level(block); }

}  // namespace lraee::cpu

LRAEE_END_TARGET

#endif  // __x86_64__
