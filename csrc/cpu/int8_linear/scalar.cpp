// int8_linear in plain C++: for machines without AVX2, and the level that all others must equal bit
// for bit.

#include "cpu/int8_linear/blocking.h"
#include "cpu/int8_linear/int8_linear.h"
#include "cpu/int8_linear/prefetch.h"
#include "cpu/numerics/gates.h"
#include "cpu/pack_weight/pack_weight.h"
#include "cpu/simd/scalar.h"

namespace lraee::cpu {
namespace {

struct Tile {
  static constexpr int kRows = 4, kCols = 16, kTailCols = 16;
  static constexpr int32_t kXOffset = 0;
  using X = int16_t;

  static void convert(const int8_t* x_q, int64_t count, X* x) {
    for (int64_t k = 0; k < count; ++k) x[k] = x_q[k];
  }

  template <int R, int C>
  static void multiply(const X* x, int64_t stride, const int8_t* w, int64_t groups, int32_t* acc,
                       Prefetch&) {
    for (int r = 0; r < R; ++r) {
      int32_t* sums = acc + r * C;
      for (int c = 0; c < C; ++c) sums[c] = 0;
      for (int64_t g = 0; g < groups; ++g) {
        const X* xs = x + r * stride + g * kGroupDepth;
        const int8_t* ws = w + g * kLineBytes;
        for (int c = 0; c < C; ++c) {
          for (int k = 0; k < kGroupDepth; ++k) sums[c] += xs[k] * ws[c * kGroupDepth + k];
        }
      }
    }
  }
};

}  // namespace
}  // namespace lraee::cpu

#include "cpu/int8_linear/body.h"

namespace lraee::cpu {

void int8_linear_scalar(const Int8LinearArgs& args, const Int8LinearBlock& block, void* scratch) {
  int8_linear_at_level(args, block, scratch);
}

}  // namespace lraee::cpu
