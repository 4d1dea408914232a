#pragma once

#include "cpu/numerics/quantizer.h"

namespace lraee::cpu {
namespace {

template <bool kSymmetric, class T>
void quantize_rows_of(const QuantizeRowsArgs& args, int64_t begin, int64_t end) {
  const T* x = static_cast<const T*>(args.x);
  for (int64_t m = begin; m < end; ++m) {
    const Quantization q =
        quantize_row<kSymmetric>(x + m * args.stride, args.K, args.x_q + m * args.K);
    args.x_scale[m] = q.scale;
    args.x_zero[m] = q.zero_point;
  }
}

inline void quantize_rows_at_level(const QuantizeRowsArgs& args, int64_t begin, int64_t end) {
  with_type(args.type, [&]<class T>(const T*) {
    if (args.symmetric) {
      quantize_rows_of<true, T>(args, begin, end);
    } else {
      quantize_rows_of<false, T>(args, begin, end);
    }
  });
}

}  // namespace
}  // namespace lraee::cpu
