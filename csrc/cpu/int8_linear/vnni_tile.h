#pragma once

// The tile of int8_linear on vpdpbusd (u8 x s8 -> s32, four products a lane). Included inside a
// target region, after a simd/<isa>.h with VNNI.

namespace lraee::cpu {
namespace {

// 512 bits: 6 rows by 64 columns keep 24 sums in 32 registers; 4 loads, 6 broadcasts, 24 dots.
// 256 bits: 6 rows by 16 columns; 12 sums, 2 weights and a broadcast fit the 16 registers of the
// VEX encoding.
struct Tile {
  static constexpr int kRows = 6, kCols = kWidth == 16 ? 64 : 16, kTailCols = 16;
  static constexpr int32_t kXOffset = kLeftOffset;
  using X = uint8_t;

  static void convert(const int8_t* x_q, int64_t count, X* x) { store_left(x, x_q, count); }

  template <int R, int C>
  static void multiply(const X* x, int64_t stride, const int8_t* w, int64_t groups, int32_t* acc,
                       Prefetch& prefetch) {
    constexpr int P = C / kWidth, kPanelVectors = kPanelWidth / kWidth;
    Vi sums[R][P];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) sums[r][p] = set1(0);
    }
    const int64_t panel_bytes = groups * kLineBytes;
    int64_t turns_left = Prefetch::turns_of(groups);
    for (int64_t g = 0; g < groups; --turns_left) {
      prefetch.turn(turns_left, R);
      const int64_t stop = g + Prefetch::kTurnGroups < groups ? g + Prefetch::kTurnGroups : groups;
      for (; g < stop; ++g) {
        Right columns[P];
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) {
          columns[p] = load_right(w + p / kPanelVectors * panel_bytes +
                                  p % kPanelVectors * kWidth * kGroupDepth);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const Left four = load_left(x + r * stride);
#pragma GCC unroll 4
          for (int p = 0; p < P; ++p) sums[r][p] = dot4(sums[r][p], four, columns[p]);
        }
        w += kLineBytes;
        x += kGroupDepth;
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) store(acc + r * C + p * kWidth, sums[r][p]);
    }
  }
};

}  // namespace
}  // namespace lraee::cpu
