// The tile of int8_linear on 256-bit vpdpbusd (u8 x s8 -> s32), 6 rows by 16 columns: 12 sums, 2
// weights and a broadcast fit the 16 registers of the VEX encoding. Included inside a target region
// after vec_avx2.h and a `dpbusd(sum, x, w)` of that encoding.

struct Tile {
  static constexpr int kRows = 6, kCols = 16, kTailCols = 16;
  static constexpr int32_t kXOffset = 128;
  using X = uint8_t;

  static void convert(const int8_t* x_q, int64_t count, X* x) {
    const __m256i flip = _mm256_set1_epi8(-128);
    int64_t k = 0;
    for (; k + 32 <= count; k += 32) {
      const __m256i x_s8x32 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x_q + k));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(x + k), _mm256_xor_si256(x_s8x32, flip));
    }
    for (; k < count; ++k) x[k] = static_cast<X>(x_q[k] + 128);
  }

  template <int R, int C>
  static void multiply(const X* x, int64_t stride, const int8_t* w, int64_t groups, int32_t* acc,
                       Ahead& ahead) {
    constexpr int P = C / V::kWidth;
    __m256i sums[R][P];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) sums[r][p] = _mm256_setzero_si256();
    }
    int64_t turns_left = Ahead::turns_of(groups);
    for (int64_t g = 0; g < groups; --turns_left) {
      ahead.turn(turns_left, R);
      const int64_t stop = g + Ahead::kTurnGroups < groups ? g + Ahead::kTurnGroups : groups;
      for (; g < stop; ++g) {
        __m256i w_s8x32[P];
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p)
          w_s8x32[p] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w) + p);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          int32_t four;
          std::memcpy(&four, x + r * stride, sizeof(four));
          const __m256i x_u8x32 = _mm256_set1_epi32(four);
#pragma GCC unroll 2
          for (int p = 0; p < P; ++p) sums[r][p] = dpbusd(sums[r][p], x_u8x32, w_s8x32[p]);
        }
        w += kLineBytes;
        x += kGroupDepth;
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(acc + r * C + p * V::kWidth), sums[r][p]);
      }
    }
  }
};
