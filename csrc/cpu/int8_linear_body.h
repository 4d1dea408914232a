// The part of int8_linear that every instruction set shares. Each int8_linear_<isa>.cpp includes it
// inside its target region, after defining in the same unnamed namespace
//   V     vectors of float32 (vec_<isa>.h)
//   Tile  the integer product of one tile:
//     kRows, kCols      largest tile; kCols is a multiple of V::kWidth
//     X, kXOffset       how a converted row stores x_q: X(x_q + kXOffset)
//     convert(x_q, count, x)            one row
//     multiply<R, C>(x, stride, w, groups, acc, ahead)
//                       acc[R][C] = sum over k of x * w; ahead says what to prefetch meanwhile
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

template <Activation kActivation, class Out, int kCols>
void epilogue(const Args& args, const TileOut& out) {
  using T = typename Out::Storage;
  // Copies stay in registers; the originals would be read again after every store, which might
  // alias them.
  const Args a = args;
  const TileOut tile = out;
  for (int c = 0; c < tile.cols; c += V::kWidth) {
    const int count = tile.cols - c < V::kWidth ? tile.cols - c : V::kWidth;
    const size_t part_bytes = sizeof(T) * static_cast<size_t>(count);
    const ColumnVector columns = load_columns(a, tile.n + c, count);
    T* y = static_cast<T*>(a.y) + tile.m * a.N + tile.n + c;
    const T* residual =
        at_or_null(static_cast<const T*>(a.residual), tile.m * a.residual_stride + tile.n + c);
    for (int r = 0; r < tile.rows; ++r, y += a.N) {
      const V::I acc = V::load(tile.acc + r * kCols + c);
      if (count == V::kWidth) {
        V::store(Out{}, y, finish<kActivation, Out>(a, acc, tile.m + r, columns, residual));
      } else {
        T part[V::kWidth] = {};
        if (residual != nullptr) std::memcpy(part, residual, part_bytes);
        V::store(Out{}, part,
                 finish<kActivation, Out>(a, acc, tile.m + r, columns,
                                          residual == nullptr ? nullptr : part));
        std::memcpy(y, part, part_bytes);
      }
      residual = at_or_null(residual, a.residual_stride);
    }
  }
}

using Epilogue = void (*)(const Args&, const TileOut&);

template <Activation kActivation, int kCols>
Epilogue epilogue_for(FloatType out) {
  switch (out) {
    case FloatType::kBf16:
      return epilogue<kActivation, Bf16, kCols>;
    case FloatType::kF16:
      return epilogue<kActivation, F16, kCols>;
    default:
      return epilogue<kActivation, F32, kCols>;
  }
}

template <int kCols>
Epilogue epilogue_for(const Args& a) {
  switch (a.activation) {
    case Activation::kGelu:
      return epilogue_for<Activation::kGelu, kCols>(a.out_type);
    case Activation::kGeluTanh:
      return epilogue_for<Activation::kGeluTanh, kCols>(a.out_type);
    case Activation::kQuickGelu:
      return epilogue_for<Activation::kQuickGelu, kCols>(a.out_type);
    default:
      return epilogue_for<Activation::kNone, kCols>(a.out_type);
  }
}

template <int kCols, int R = Tile::kRows>
inline void multiply(int rows, const Tile::X* x, int64_t stride, const int8_t* w, int64_t groups,
                     int32_t* acc, const Ahead& ahead) {
  if constexpr (R > 1) {
    if (rows < R) return multiply<kCols, R - 1>(rows, x, stride, w, groups, acc, ahead);
  }
  Tile::template multiply<R, kCols>(x, stride, w, groups, acc, ahead);
}

// All rows of a chunk, already converted, times the columns [n, n + kCols).
template <int kCols>
void run_columns(const Args& a, Epilogue finish_tile, const Tile::X* x, int64_t m_begin,
                 int64_t m_end, int64_t n) {
  alignas(64) int32_t acc[Tile::kRows * kCols];
  const int64_t groups = num_k_groups(a.K), stride = scratch_stride(a.K);
  const int8_t* w = a.w + n / kPanelWidth * groups * kLineBytes + n % kPanelWidth * kGroupDepth;
  const int64_t rows = m_end - m_begin, num_tiles = (rows + Tile::kRows - 1) / Tile::kRows;
  const int cols = static_cast<int>(a.N - n < kCols ? a.N - n : kCols);
  const int64_t bytes = a.out_type == FloatType::kF32 ? 4 : 2;
  const int8_t* next = w + kCols * groups * kGroupDepth;
  const int64_t next_lines = n + 2 * kCols <= a.N ? kCols * groups * kGroupDepth / kLineBytes : 0;
  for (int64_t tile = 0, m = 0; tile < num_tiles; ++tile) {
    // Tiles of nearly equal height: the last one is not left with a single row.
    const int height = static_cast<int>((rows - m + num_tiles - tile - 1) / (num_tiles - tile));
    const int64_t begin = next_lines * tile / num_tiles, end = next_lines * (tile + 1) / num_tiles;
    const Ahead ahead{static_cast<const char*>(a.y) + ((m_begin + m) * a.N + n) * bytes,
                      at_or_null(static_cast<const char*>(a.residual),
                                 ((m_begin + m) * a.residual_stride + n) * bytes),
                      a.N * bytes,
                      a.residual_stride * bytes,
                      cols * bytes,
                      next + begin * kLineBytes,
                      (end - begin + height - 1) / height * kLineBytes};
    multiply<kCols>(height, x + m * stride, stride, w, groups, acc, ahead);
    finish_tile(a, {m_begin + m, n, height, cols, acc});
    m += height;
  }
}

void run(const Args& a, const Int8LinearBlock& block, void* scratch) {
  auto* x = static_cast<Tile::X*>(scratch);
  const int64_t stride = scratch_stride(a.K), chunk = chunk_rows(a.K);
  const Epilogue finish_tile = epilogue_for<Tile::kCols>(a);
  const Epilogue finish_tail = epilogue_for<Tile::kTailCols>(a);
  for (int64_t m_begin = block.m_begin; m_begin < block.m_end; m_begin += chunk) {
    const int64_t m_end = m_begin + chunk < block.m_end ? m_begin + chunk : block.m_end;
    for (int64_t m = m_begin; m < m_end; ++m) {
      Tile::X* row = x + (m - m_begin) * stride;
      Tile::convert(a.x_q + m * a.x_stride, a.K, row);
      for (int64_t k = a.K; k < num_k_groups(a.K) * kGroupDepth; ++k) row[k] = 0;
    }
    int64_t n = block.n_begin;
    for (; n + Tile::kCols <= block.n_end; n += Tile::kCols)
      run_columns<Tile::kCols>(a, finish_tile, x, m_begin, m_end, n);
    for (; n < block.n_end; n += Tile::kTailCols)
      run_columns<Tile::kTailCols>(a, finish_tail, x, m_begin, m_end, n);
  }
}
