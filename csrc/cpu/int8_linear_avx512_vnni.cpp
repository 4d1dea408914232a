// int8_linear on 512-bit vpdpbusd (u8 x s8 -> s32, four products a lane).
//                      Zen 4           Zen 5       Ice Lake and later
//   vpdpbusd zmm       1 / cycle       2           1 (client) or 2
//   latency            4               4           5
// A tile of 6 rows and 64 columns keeps 24 sums in registers; 4 loads, 6 broadcasts, 24 dots.

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/activation_tables.h"
#include "cpu/int8_linear.h"
#include "cpu/int8_linear_blocking.h"
#include "cpu/pack_weight.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,prfchw")

namespace lraee::cpu {
namespace {

#include "cpu/vec_avx512.h"

struct Tile {
  static constexpr int kRows = 6, kCols = 64, kTailCols = 16;
  static constexpr int32_t kXOffset = 128;
  using X = uint8_t;

  static void convert(const int8_t* x_q, int64_t count, X* x) {
    const __m512i flip = _mm512_set1_epi8(-128);
    int64_t k = 0;
    for (; k + 64 <= count; k += 64) {
      _mm512_storeu_si512(x + k, _mm512_xor_si512(_mm512_loadu_si512(x_q + k), flip));
    }
    if (k == count) return;
    const __mmask64 rest = (1ull << (count - k)) - 1;
    _mm512_mask_storeu_epi8(x + k, rest,
                            _mm512_xor_si512(_mm512_maskz_loadu_epi8(rest, x_q + k), flip));
  }

  template <int R, int C>
  static void multiply(const X* x, int64_t stride, const int8_t* w, int64_t groups, int32_t* acc,
                       Ahead& ahead) {
    constexpr int P = C / kPanelWidth;
    __m512i sums[R][P];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) sums[r][p] = _mm512_setzero_si512();
    }
    const int64_t panel_bytes = groups * kLineBytes;
    int64_t turns_left = Ahead::turns_of(groups);
    for (int64_t g = 0; g < groups; --turns_left) {
      ahead.turn(turns_left, R);
      const int64_t stop = g + Ahead::kTurnGroups < groups ? g + Ahead::kTurnGroups : groups;
      for (; g < stop; ++g) {
        __m512i w_s8x64[P];
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) w_s8x64[p] = _mm512_loadu_si512(w + p * panel_bytes);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          int32_t four;
          std::memcpy(&four, x + r * stride, sizeof(four));
          const __m512i x_u8x64 = _mm512_set1_epi32(four);
#pragma GCC unroll 4
          for (int p = 0; p < P; ++p)
            sums[r][p] = _mm512_dpbusd_epi32(sums[r][p], x_u8x64, w_s8x64[p]);
        }
        w += kLineBytes;
        x += kGroupDepth;
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) _mm512_store_si512(acc + r * C + p * kPanelWidth, sums[r][p]);
    }
  }
};

#include "cpu/activation_body.h"
#include "cpu/int8_linear_epilogue.h"
#include "cpu/int8_linear_body.h"

}  // namespace

void int8_linear_avx512_vnni(const Int8LinearArgs& args, const Int8LinearBlock& block,
                             void* scratch) {
  run(args, block, scratch);
}

}  // namespace lraee::cpu

#pragma GCC pop_options

#endif  // __x86_64__
