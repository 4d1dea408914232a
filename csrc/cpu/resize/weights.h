#pragma once

// Weights of a resize, in the arithmetic of Pillow's Resample.c: doubles from single-precision
// bounds, summed in order, then rounded half away from zero to 22 fractional bits.

#include <algorithm>
#include <cmath>

#include "cpu/resize/resize.h"

namespace lraee::cpu {
namespace resize_detail {

inline double box(double x) { return x > -0.5 && x <= 0.5 ? 1.0 : 0.0; }

inline double bilinear(double x) {
  x = std::fabs(x);
  return x < 1.0 ? 1.0 - x : 0.0;
}

inline double hamming(double x) {
  x = std::fabs(x);
  if (x == 0.0) return 1.0;
  if (x >= 1.0) return 0.0;
  x *= M_PI;
  // The constants are single-precision in Pillow.
  return std::sin(x) / x * (0.54f + 0.46f * std::cos(x));
}

inline double bicubic(double x) {
  constexpr double a = -0.5;
  x = std::fabs(x);
  if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
  if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
  return 0.0;
}

inline double sinc(double x) {
  if (x == 0.0) return 1.0;
  x *= M_PI;
  return std::sin(x) / x;
}

inline double lanczos(double x) { return -3.0 <= x && x < 3.0 ? sinc(x) * sinc(x / 3) : 0.0; }

struct Kernel {
  double (*value)(double x);
  double support;
};

inline Kernel kernel_of(ResizeFilter filter) {
  switch (filter) {
    case ResizeFilter::kBox:
      return {box, 0.5};
    case ResizeFilter::kBilinear:
      return {bilinear, 1.0};
    case ResizeFilter::kHamming:
      return {hamming, 1.0};
    case ResizeFilter::kBicubic:
      return {bicubic, 2.0};
    case ResizeFilter::kLanczos:
      return {lanczos, 3.0};
  }
  return {box, 0.5};
}

inline double scale_of(const ResizeAxis& axis) {
  return static_cast<double>(axis.end - axis.begin) / static_cast<double>(axis.output);
}

inline double support_of(const ResizeAxis& axis) {
  return kernel_of(axis.filter).support * std::max(scale_of(axis), 1.0);
}

}  // namespace resize_detail

// Weights that one output may have, padding included: the stride of ResizeWeights.
inline int64_t resize_weight_stride(const ResizeAxis& axis) {
  const int64_t taps = static_cast<int64_t>(std::ceil(resize_detail::support_of(axis))) * 2 + 1;
  return (taps + kTapsAtOnce - 1) / kTapsAtOnce * kTapsAtOnce;
}

// Fills the weights of outputs first..first + count - 1; `real` has room for one stride.
// False if a weight does not fit into two digits.
inline bool resize_weights(const ResizeAxis& axis, int64_t first, int64_t count, double* real,
                           int32_t* start, int32_t* taps, int16_t* low, int16_t* high) {
  const resize_detail::Kernel kernel = resize_detail::kernel_of(axis.filter);
  const double scale = resize_detail::scale_of(axis), support = resize_detail::support_of(axis);
  const double inverse = 1.0 / std::max(scale, 1.0);
  const int64_t stride = resize_weight_stride(axis);
  bool fits = true;
  for (int64_t i = 0; i < count; ++i) {
    const double center = axis.begin + (static_cast<double>(first + i) + 0.5) * scale;
    const int64_t left = std::max<int64_t>(static_cast<int64_t>(center - support + 0.5), 0);
    const int64_t right =
        std::min<int64_t>(static_cast<int64_t>(center + support + 0.5), axis.input);
    const int64_t n = std::clamp<int64_t>(right - left, 0, stride);
    double sum = 0.0;
    for (int64_t t = 0; t < n; ++t) {
      real[t] = kernel.value((static_cast<double>(t + left) - center + 0.5) * inverse);
      sum += real[t];
    }
    for (int64_t t = 0; t < stride; ++t) {
      const double weight = t < n ? (sum != 0.0 ? real[t] / sum : real[t]) : 0.0;
      const double rounded = weight * (1 << kWeightBits) + (weight < 0 ? -0.5 : 0.5);
      fits = fits && std::fabs(rounded) < (1 << (kDigitBits + 15));
      const int32_t fixed = fits ? static_cast<int32_t>(rounded) : 0;
      high[i * stride + t] = static_cast<int16_t>(fixed >> kDigitBits);
      low[i * stride + t] = static_cast<int16_t>(fixed & ((1 << kDigitBits) - 1));
    }
    start[i] = static_cast<int32_t>(std::min(left, axis.input));
    taps[i] = static_cast<int32_t>(n);
  }
  return fits;
}

}  // namespace lraee::cpu
