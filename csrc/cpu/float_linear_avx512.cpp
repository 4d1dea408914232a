#include "cpu/float_linear.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")

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

#include "cpu/float_linear_blocks.h"

}  // namespace

void float_linear_avx512(const FloatLinear& block) { float_linear_block(block); }

}  // namespace lraee::cpu

#pragma GCC pop_options
#else
namespace lraee::cpu {
void float_linear_avx512(const FloatLinear& block) { float_linear_scalar(block); }
}  // namespace lraee::cpu
#endif
