// The part of int8_linear that every instruction set shares. Each int8_linear_<isa>.cpp includes it inside its target region, after
// defining in the same unnamed namespace
//   V     vectors of float32 (vec_<isa>.h)
//   Tile  the integer product of one tile:
//     kRows, kCols      largest tile; kCols is a multiple of V::kWidth
//     X, kXOffset       how a converted row stores x_q: X(x_q + kXOffset)
//     convert(x_q, count, x)            one row
//     multiply<R, C>(x, stride, w, groups, acc, next)   acc[R][C] = sum over k of x * w; `next`: weights to prefetch
// No includes here: they would be compiled for the target.

// [NOTE: u8s8 compensation]
// vpdpbusd multiplies unsigned by signed bytes. With u = x_q + 128 in [0, 255],
//   sum_k (x_q - x_zero) w = sum_k u w - (128 + x_zero) sum_k w = acc - (kXOffset + x_zero) w_sum,
// so the shift to unsigned costs nothing that an asymmetric x_zero does not cost already. Exact in int32:
// acc <= 255 * 128 * K < 2^31 for K <= 65,793, and the result is a sum of products of at most 255 * 128 as well.

using Args = Int8LinearArgs;

// A tile of y that lies at (m, n), with its int32 sums [rows][stride].
struct TileOut {
  int64_t m, n;
  int rows, cols, stride;
  const int32_t* acc;
};

// Per-column operands, valid for a whole tile: where the tile crosses N they are padded copies.
template <int kCols>
struct Columns {
  const float *w_scale, *bias, *layer_scale;
  const int32_t* w_sum;
  float padded[3][kCols];
  int32_t padded_sum[kCols];

  Columns(const Args& a, int64_t n, int cols) {
    w_scale = a.w_scale + n;
    w_sum = a.w_sum + n;
    bias = a.bias == nullptr ? nullptr : a.bias + n;
    layer_scale = a.layer_scale == nullptr ? nullptr : a.layer_scale + n;
    if (cols == kCols) return;
    w_scale = pad(w_scale, padded[0], cols);
    bias = pad(bias, padded[1], cols);
    layer_scale = pad(layer_scale, padded[2], cols);
    w_sum = pad(w_sum, padded_sum, cols);
  }

  template <class T>
  static const T* pad(const T* from, T* to, int cols) {
    if (from == nullptr) return nullptr;
    for (int i = 0; i < kCols; ++i) to[i] = i < cols ? from[i] : T(0);
    return to;
  }
};

template <Activation kActivation>
inline V::F activate(V::F y) {
  if constexpr (kActivation == Activation::kGelu) return gated<kGeluGate>(y);
  if constexpr (kActivation == Activation::kGeluTanh) return gated<kGeluTanhGate>(y);
  if constexpr (kActivation == Activation::kQuickGelu) return gated<kQuickGeluGate>(y);
  return y;
}

// One vector of the epilogue; residual may be null.
template <Activation kActivation, class Out>
inline V::F finish(V::I acc, V::F scale, V::I correction, const float* bias,
                   const float* layer_scale, const typename Out::Storage* residual) {
  V::F y = V::mul(V::to_float(V::sub(acc, correction)), scale);
  if (bias != nullptr) y = V::add(y, V::load(F32{}, bias));
  y = activate<kActivation>(y);
  if (layer_scale != nullptr) y = V::mul(y, V::load(F32{}, layer_scale));
  if (residual != nullptr) y = V::add(y, V::load(Out{}, residual));
  return y;
}

template <Activation kActivation, class Out, int kCols>
void epilogue(const Args& a, const TileOut& tile) {
  using T = typename Out::Storage;
  const Columns<kCols> columns(a, tile.n, tile.cols);
  for (int r = 0; r < tile.rows; ++r) {
    const int64_t m = tile.m + r;
    const V::F x_scale = V::set1(a.x_scale[m]);
    const V::I x_zero = V::set1(Tile::kXOffset + (a.x_zero == nullptr ? 0 : a.x_zero[m]));
    T* y = static_cast<T*>(a.y) + m * a.N + tile.n;
    const T* residual = a.residual == nullptr
                            ? nullptr
                            : static_cast<const T*>(a.residual) + m * a.residual_stride + tile.n;
    for (int c = 0; c < tile.cols; c += V::kWidth) {
      const V::I acc = V::load(tile.acc + r * tile.stride + c);
      const V::I correction = V::mul(x_zero, V::load(columns.w_sum + c));
      const V::F scale = V::mul(x_scale, V::load(F32{}, columns.w_scale + c));
      const float* bias = columns.bias == nullptr ? nullptr : columns.bias + c;
      const float* layer_scale = columns.layer_scale == nullptr ? nullptr : columns.layer_scale + c;
      const int count = tile.cols - c;
      if (count >= V::kWidth) {
        V::store(Out{}, y + c,
                 finish<kActivation, Out>(acc, scale, correction, bias, layer_scale,
                                          residual == nullptr ? nullptr : residual + c));
      } else {
        T part[V::kWidth] = {};
        if (residual != nullptr)
          std::memcpy(part, residual + c, sizeof(T) * static_cast<size_t>(count));
        V::store(Out{}, part,
                 finish<kActivation, Out>(acc, scale, correction, bias, layer_scale,
                                          residual == nullptr ? nullptr : part));
        std::memcpy(y + c, part, sizeof(T) * static_cast<size_t>(count));
      }
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
                     int32_t* acc, const int8_t* next) {
  if constexpr (R > 1) {
    if (rows < R) return multiply<kCols, R - 1>(rows, x, stride, w, groups, acc, next);
  }
  Tile::template multiply<R, kCols>(x, stride, w, groups, acc, next);
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
  for (int64_t tile = 0, m = 0; tile < num_tiles; ++tile) {
    // Tiles of nearly equal height: the last one is not left with a single row.
    const int height = static_cast<int>((rows - m + num_tiles - tile - 1) / (num_tiles - tile));
    multiply<kCols>(height, x + m * stride, stride, w, groups, acc, nullptr);
    finish_tile(a, {m_begin + m, n, height, cols, kCols, acc});
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
