#pragma once

// From the int32 sums of a tile to y, the same roundings on every instruction set. Included inside
// a target region, after a simd/<isa>.h and a Tile with
//   kXOffset   the sums are those of x_q + kXOffset, see [NOTE: u8s8 compensation]. So
//                sum_k (x_q - x_zero) w = acc - (kXOffset + x_zero) w_sum,
//              and the shift to unsigned costs nothing that an asymmetric x_zero does not cost.

#include "cpu/numerics/gated_activation.h"

namespace lraee::cpu {
namespace {

using Args = Int8LinearArgs;

// A tile of y that lies at (m, n), with its int32 sums [rows][kCols].
struct TileOut {
  int64_t m, n;
  int rows, cols;
  const int32_t* acc;
};

// Operands of one vector of columns. Absent ones change nothing: v + -0.0 = v and v * 1 = v.
struct ColumnVector {
  Vf w_scale, bias, layer_scale;
  Vi w_sum;
};

template <class T>
inline const T* at_or_null(const T* p, int64_t i) {
  return p == nullptr ? nullptr : p + i;
}

// The first count values, and zeros.
template <class T>
inline const T* padded(const T* from, int count, T* buffer) {
  for (int i = 0; i < kWidth; ++i) buffer[i] = i < count ? from[i] : T(0);
  return buffer;
}

inline ColumnVector load_columns(const Args& a, int64_t n, int count) {
  const auto column = [n, count](const auto* from, auto absent) {
    decltype(absent) buffer[kWidth];
    if (from == nullptr) return set1(absent);
    from += n;
    return load(count == kWidth ? from : padded(from, count, buffer));
  };
  return {.w_scale = column(a.w_scale, 0.0f),
          .bias = column(a.bias, -0.0f),
          .layer_scale = column(a.layer_scale, 1.0f),
          .w_sum = column(a.w_sum, 0)};
}

// Operands of one row.
struct RowScalars {
  Vf x_scale;
  Vi x_offset;  // of the sums' x from x_q, and x_zero

  RowScalars(const Args& a, int64_t m)
      : x_scale(set1(a.x_scale[m])),
        x_offset(set1(Tile::kXOffset + (a.x_zero == nullptr ? 0 : a.x_zero[m]))) {}
};

template <Activation kActivation>
inline Vf activate(Vf y) {
  if constexpr (kActivation == Activation::kGelu) return gated<kGeluGate>(y);
  if constexpr (kActivation == Activation::kGeluTanh) return gated<kGeluTanhGate>(y);
  if constexpr (kActivation == Activation::kQuickGelu) return gated<kQuickGeluGate>(y);
  return y;
}

// What a vector of sums becomes, before layer_scale and residual.
template <Activation kActivation>
inline Vf activated(Vi acc, const RowScalars& row, const ColumnVector& columns) {
  const Vf scale = row.x_scale * columns.w_scale;
  const Vi sum = acc - row.x_offset * columns.w_sum;
  return activate<kActivation>(to_f32(sum) * scale + columns.bias);
}

// The first count values of one vector of row m, from column n on.
template <Activation kActivation, class T>
inline void finish_vector(const Args& a, const int32_t* acc, int64_t m, int64_t n, int count,
                          const ColumnVector& columns) {
  Vf v = activated<kActivation>(load(acc), RowScalars(a, m), columns) * columns.layer_scale;
  const size_t bytes = sizeof(T) * static_cast<size_t>(count);
  T part[kWidth] = {};
  if (a.residual != nullptr) {
    std::memcpy(part, static_cast<const T*>(a.residual) + m * a.residual_stride + n, bytes);
    v = v + load(part);
  }
  store(part, v);
  std::memcpy(static_cast<T*>(a.y) + m * a.N + n, part, bytes);
}

// What follows the activation. A residual takes layer_scale along, which is 1 where there is none.
enum class After { kNothing, kScale, kScaleAndResidual };

// Rows [begin, end) of a tile with all its columns.
template <Activation kActivation, class T, int kCols, After kAfter>
inline void finish_whole_rows(const Args& args, const TileOut& out, const ColumnVector* columns_of,
                              int begin, int end) {
  constexpr int kVectors = kCols / kWidth;
  // Copies stay in registers; the originals would be read again after every store, which might
  // alias them.
  const Args a = args;
  ColumnVector columns[kVectors];
#pragma GCC unroll 4
  for (int p = 0; p < kVectors; ++p) columns[p] = columns_of[p];
  int64_t m = out.m + begin;
  const int64_t last = out.m + end;
  const int32_t* acc = out.acc + begin * kCols;
  T* y = static_cast<T*>(a.y) + m * a.N + out.n;
  const T* residual = at_or_null(static_cast<const T*>(a.residual), m * a.residual_stride + out.n);
  for (; m < last; ++m, acc += kCols, y += a.N) {
    const RowScalars row(a, m);
#pragma GCC unroll 4
    for (int p = 0; p < kVectors; ++p) {
      Vf v = activated<kActivation>(load(acc + p * kWidth), row, columns[p]);
      if constexpr (kAfter != After::kNothing) v = v * columns[p].layer_scale;
      if constexpr (kAfter == After::kScaleAndResidual) v = v + load(residual + p * kWidth);
      store(y + p * kWidth, v);
    }
    if constexpr (kAfter == After::kScaleAndResidual) residual += a.residual_stride;
  }
}

// Operands of all columns of a tile.
template <int kCols>
struct TileColumns {
  static constexpr int kVectors = kCols / kWidth;
  ColumnVector vectors[kVectors];
  int counts[kVectors];

  // cols of them from column n on.
  void load(const Args& a, int64_t n, int cols) {
    for (int p = 0; p < kVectors; ++p) {
      const int left = cols - p * kWidth;
      counts[p] = left < 0 ? 0 : left < kWidth ? left : kWidth;
      vectors[p] = load_columns(a, n + p * kWidth, counts[p]);
    }
  }
};

// Rows [begin, end) of a tile.
template <Activation kActivation, class T, int kCols>
inline void finish_rows(const Args& a, const TileOut& out, const TileColumns<kCols>& columns,
                        int begin, int end) {
  if (out.cols == kCols) {
    const auto finish = [&]<After kAfter>() {
      finish_whole_rows<kActivation, T, kCols, kAfter>(a, out, columns.vectors, begin, end);
    };
    if (a.residual != nullptr) return finish.template operator()<After::kScaleAndResidual>();
    if (a.layer_scale != nullptr) return finish.template operator()<After::kScale>();
    return finish.template operator()<After::kNothing>();
  }
  for (int p = 0; p < columns.kVectors && columns.counts[p] > 0; ++p) {
    for (int r = begin; r < end; ++r) {
      finish_vector<kActivation, T>(a, out.acc + r * kCols + p * kWidth, out.m + r,
                                    out.n + p * kWidth, columns.counts[p], columns.vectors[p]);
    }
  }
}

template <int kCols>
using Epilogue = void (*)(const Args&, const TileOut&, const TileColumns<kCols>&, int, int);

// Calls fn.template operator()<activation, type of y>().
template <class Fn>
auto with_epilogue(const Args& a, Fn fn) {
  const auto with_type = [&]<Activation kActivation>() {
    switch (a.out_type) {
      case FloatType::kBf16:
        return fn.template operator()<kActivation, Bf16>();
      case FloatType::kF16:
        return fn.template operator()<kActivation, F16>();
      default:
        return fn.template operator()<kActivation, float>();
    }
  };
  switch (a.activation) {
    case Activation::kGelu:
      return with_type.template operator()<Activation::kGelu>();
    case Activation::kGeluTanh:
      return with_type.template operator()<Activation::kGeluTanh>();
    case Activation::kQuickGelu:
      return with_type.template operator()<Activation::kQuickGelu>();
    default:
      return with_type.template operator()<Activation::kNone>();
  }
}

template <int kCols>
Epilogue<kCols> epilogue_for(const Args& a) {
  return with_epilogue(a, []<Activation kActivation, class T>() -> Epilogue<kCols> {
    return finish_rows<kActivation, T, kCols>;
  });
}

}  // namespace
}  // namespace lraee::cpu
