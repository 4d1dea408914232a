// From the int32 sums of a tile to y, the same roundings on every instruction set. Each
// int8_linear_<isa>.cpp includes it inside its target region, after defining in the same unnamed
// namespace
//   V     vectors of float32 (vec_<isa>.h)
//   Tile  with kXOffset: the sums are those of x_q + kXOffset
// No includes here: they would be compiled for the target.

// [NOTE: u8s8 compensation]
// vpdpbusd multiplies unsigned by signed bytes. With u = x_q + 128 in [0, 255],
//   sum_k (x_q - x_zero) w = sum_k u w - (128 + x_zero) sum_k w = acc - (kXOffset + x_zero) w_sum,
// so the shift to unsigned costs nothing that an asymmetric x_zero does not cost already. Exact in
// int32: acc <= 255 * 128 * K < 2^31 for K <= 65,793, and the result is a sum of products of at
// most 255 * 128 as well.

using Args = Int8LinearArgs;

// A tile of y that lies at (m, n), with its int32 sums [rows][kCols].
struct TileOut {
  int64_t m, n;
  int rows, cols;
  const int32_t* acc;
};

// Operands of one vector of columns. bias and layer_scale count only where the arguments have them.
struct ColumnVector {
  V::F w_scale, bias, layer_scale;
  V::I w_sum;
};

template <class T>
inline const T* at_or_null(const T* p, int64_t i) {
  return p == nullptr ? nullptr : p + i;
}

// The first count values, and zeros.
template <class T>
inline const T* padded(const T* from, int count, T* buffer) {
  for (int i = 0; i < V::kWidth; ++i) buffer[i] = i < count && from != nullptr ? from[i] : T(0);
  return buffer;
}

inline ColumnVector load_columns(const Args& a, int64_t n, int count) {
  ColumnVector columns{V::set1(0.0f), V::set1(0.0f), V::set1(0.0f), V::set1(0)};
  if (count == V::kWidth) {
    columns.w_scale = V::load(F32{}, a.w_scale + n);
    columns.w_sum = V::load(a.w_sum + n);
    if (a.bias != nullptr) columns.bias = V::load(F32{}, a.bias + n);
    if (a.layer_scale != nullptr) columns.layer_scale = V::load(F32{}, a.layer_scale + n);
  } else {
    float buffer[V::kWidth];
    int32_t sums[V::kWidth];
    columns.w_scale = V::load(F32{}, padded(a.w_scale + n, count, buffer));
    columns.w_sum = V::load(padded(a.w_sum + n, count, sums));
    columns.bias = V::load(F32{}, padded(at_or_null(a.bias, n), count, buffer));
    columns.layer_scale = V::load(F32{}, padded(at_or_null(a.layer_scale, n), count, buffer));
  }
  return columns;
}

template <Activation kActivation>
inline V::F activate(V::F y) {
  if constexpr (kActivation == Activation::kGelu) return gated<kGeluGate>(y);
  if constexpr (kActivation == Activation::kGeluTanh) return gated<kGeluTanhGate>(y);
  if constexpr (kActivation == Activation::kQuickGelu) return gated<kQuickGeluGate>(y);
  return y;
}

// One vector of row m. residual may be null.
template <Activation kActivation, class Out>
inline V::F finish(const Args& a, V::I acc, int64_t m, const ColumnVector& columns,
                   const typename Out::Storage* residual) {
  const V::I offset = V::set1(Tile::kXOffset + (a.x_zero == nullptr ? 0 : a.x_zero[m]));
  const V::F scale = V::mul(V::set1(a.x_scale[m]), columns.w_scale);
  V::F y = V::mul(V::to_float(V::sub(acc, V::mul(offset, columns.w_sum))), scale);
  if (a.bias != nullptr) y = V::add(y, columns.bias);
  y = activate<kActivation>(y);
  if (a.layer_scale != nullptr) y = V::mul(y, columns.layer_scale);
  if (residual != nullptr) y = V::add(y, V::load(Out{}, residual));
  return y;
}

// The first count values of one vector of row m, from column n on.
template <Activation kActivation, class Out>
inline void finish_vector(const Args& a, const int32_t* acc, int64_t m, int64_t n, int count,
                          const ColumnVector& columns) {
  using T = typename Out::Storage;
  T* const y = static_cast<T*>(a.y) + m * a.N + n;
  const T* const residual =
      at_or_null(static_cast<const T*>(a.residual), m * a.residual_stride + n);
  if (count == V::kWidth) {
    V::store(Out{}, y, finish<kActivation, Out>(a, V::load(acc), m, columns, residual));
    return;
  }
  const size_t bytes = sizeof(T) * static_cast<size_t>(count);
  T part[V::kWidth] = {};
  if (residual != nullptr) std::memcpy(part, residual, bytes);
  const T* const from = residual == nullptr ? nullptr : part;
  V::store(Out{}, part, finish<kActivation, Out>(a, V::load(acc), m, columns, from));
  std::memcpy(y, part, bytes);
}

template <Activation kActivation, class Out, int kCols>
void epilogue(const Args& args, const TileOut& out) {
  // Copies stay in registers; the originals would be read again after every store, which might
  // alias them.
  const Args a = args;
  const TileOut tile = out;
  for (int c = 0; c < tile.cols; c += V::kWidth) {
    const int count = tile.cols - c < V::kWidth ? tile.cols - c : V::kWidth;
    const ColumnVector columns = load_columns(a, tile.n + c, count);
    for (int r = 0; r < tile.rows; ++r) {
      finish_vector<kActivation, Out>(a, tile.acc + r * kCols + c, tile.m + r, tile.n + c, count,
                                      columns);
    }
  }
}

using Epilogue = void (*)(const Args&, const TileOut&);

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
        return fn.template operator()<kActivation, F32>();
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
Epilogue epilogue_for(const Args& a) {
  return with_epilogue(a, []<Activation kActivation, class Out>() -> Epilogue {
    return epilogue<kActivation, Out, kCols>;
  });
}
