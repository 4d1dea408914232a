// int8_linear in plain C++: for machines without AVX2, and the level that all others must equal bit
// for bit.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/activation_tables.h"
#include "cpu/int8_linear.h"
#include "cpu/int8_linear_blocking.h"
#include "cpu/pack_weight.h"

namespace lraee::cpu {
namespace {

#include "cpu/vec_scalar.h"

struct Tile {
  static constexpr int kRows = 4, kCols = 16, kTailCols = 16;
  static constexpr int32_t kXOffset = 0;
  using X = int16_t;

  static void convert(const int8_t* x_q, int64_t count, X* x) {
    for (int64_t k = 0; k < count; ++k) x[k] = x_q[k];
  }

  template <int R, int C>
  static void multiply(const X* x, int64_t stride, const int8_t* w, int64_t groups, int32_t* acc,
                       Ahead&) {
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

#include "cpu/activation_body.h"
#include "cpu/int8_linear_epilogue.h"
#include "cpu/int8_linear_body.h"

}  // namespace

void int8_linear_scalar(const Int8LinearArgs& args, const Int8LinearBlock& block, void* scratch) {
  run(args, block, scratch);
}

}  // namespace lraee::cpu
