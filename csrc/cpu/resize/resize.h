#pragma once

#include <cstdint>

namespace lraee::cpu {

enum class ResizeFilter : int { kBox, kBilinear, kHamming, kBicubic, kLanczos };

// One axis of a resize: the interval [begin, end) of `input` pixels becomes `output` pixels.
struct ResizeAxis {
  int64_t input;
  float begin, end;
  int64_t output;
  ResizeFilter filter;
};

// [NOTE: two digits] A weight is an integer of 22 fractional bits, w = round(w_real * 2^22), too
// wide for the 16-bit multipliers of SIMD. It is kept as two digits, w = high * 2^12 + low with
// 0 <= low < 2^12, and sum(w * x) = (sum(high * x) << 12) + sum(low * x), both sums modulo 2^32:
// the same 32 bits as one product of 32 bits per tap, in half the instructions.
inline constexpr int kWeightBits = 22;
inline constexpr int kDigitBits = 12;
// Weights per output are padded with zeros to a multiple of this many.
inline constexpr int64_t kTapsAtOnce = 4;

// Weights of consecutive outputs of one axis. Output i is
//   clip((2^21 + sum over t < taps of w[i, t] * x[start[i] + t]) >> 22).
struct ResizeWeights {
  const int32_t* start;
  const int32_t* taps;  // true ones; the rest of a row of weights is zero
  const int16_t* low;   // [outputs, stride]
  const int16_t* high;  // [outputs, stride]
  int64_t stride;       // a multiple of kTapsAtOnce
};

// A row may be read this many bytes past the last pixel that has a weight.
inline constexpr int64_t kResizeReadSlack = 32;
// Rows that resize_horizontal works on together.
inline constexpr int64_t kResizeRows = 8;

// Outputs 0..count - 1 of kResizeRows rows of RGB bytes; output pixel i of a row goes to bytes
// 3 i .. 3 i + 2 of out[row], and one byte more may be overwritten. Rows may repeat.
using ResizeHorizontal = void(const uint8_t* const* rows, const ResizeWeights& weights,
                              int64_t count, uint8_t* const* out);
ResizeHorizontal resize_horizontal_scalar, resize_horizontal_avx2, resize_horizontal_avx512_vnni;

// One output row of the vertical pass: `bytes` bytes from `taps` rows, `stride` bytes apart.
// Nothing past the `bytes` bytes of a row is read or written.
using ResizeVertical = void(const uint8_t* rows, int64_t stride, int64_t taps, const int16_t* low,
                            const int16_t* high, int64_t bytes, uint8_t* out);
ResizeVertical resize_vertical_scalar, resize_vertical_avx2, resize_vertical_avx512_vnni;

}  // namespace lraee::cpu
