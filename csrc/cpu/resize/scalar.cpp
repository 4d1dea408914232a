#include "cpu/resize/resize.h"

#include <algorithm>

namespace lraee::cpu {
namespace {

constexpr uint32_t kHalf = 1u << (kWeightBits - 1);

uint32_t weight(int16_t low, int16_t high) {
  return (static_cast<uint32_t>(static_cast<int32_t>(high)) << kDigitBits) +
         static_cast<uint32_t>(low);
}

uint8_t clip(uint32_t sum) {
  return static_cast<uint8_t>(std::clamp(static_cast<int32_t>(sum) >> kWeightBits, 0, 255));
}

}  // namespace

void resize_horizontal_scalar(const uint8_t* const* rows, const ResizeWeights& weights,
                              int64_t count, uint8_t* const* out) {
  for (int64_t row = 0; row < kResizeRows; ++row) {
    if (row > 0 && rows[row] == rows[row - 1]) continue;
    for (int64_t i = 0; i < count; ++i) {
      const uint8_t* x = rows[row] + 3 * int64_t{weights.start[i]};
      const int16_t* low = weights.low + i * weights.stride;
      const int16_t* high = weights.high + i * weights.stride;
      uint32_t sum[3] = {kHalf, kHalf, kHalf};
      for (int64_t t = 0; t < weights.taps[i]; ++t) {
        const uint32_t w = weight(low[t], high[t]);
        for (int c = 0; c < 3; ++c) sum[c] += w * x[3 * t + c];
      }
      for (int c = 0; c < 3; ++c) out[row][3 * i + c] = clip(sum[c]);
    }
  }
}

void resize_vertical_scalar(const uint8_t* rows, int64_t stride, int64_t taps, const int16_t* low,
                            const int16_t* high, int64_t bytes, uint8_t* out) {
  for (int64_t x = 0; x < bytes; ++x) {
    uint32_t sum = kHalf;
    for (int64_t t = 0; t < taps; ++t) sum += weight(low[t], high[t]) * rows[t * stride + x];
    out[x] = clip(sum);
  }
}

}  // namespace lraee::cpu
