// Blocking of float_linear, written once for all instruction sets. Each float_linear_<isa>.cpp
// includes it inside its own target region and anonymous namespace, after defining `Panel` (16
// float lanes) and `kMaxRows` (rows of a register tile). No include guard and no includes, on
// purpose.

// Steps of k between two stores of the partial sums: 2 panels x 512 x 64 bytes stay in L2 beside
// the rows.
constexpr int64_t kStepsPerBlock = 512;
// Rows whose x block (192 x 512 x 4 bytes) stays in L2 while all panels pass by.
constexpr int64_t kRowsPerBlock = 192;

struct Steps {
  int64_t begin, end;
};

// R rows x P panels of y: sums of k in [steps.begin, steps.end) are added to what y holds, or to
// the bias at the first block.
template <int R, int P>
void float_tile(const FloatLinear& b, int64_t row, int64_t panel, Steps steps) {
  Panel acc[R][P];
  int64_t lanes[P];
  const float* w[P];
  for (int p = 0; p < P; ++p) {
    const int64_t n = (panel + p) * kFloatPanel;
    lanes[p] = b.N - n < kFloatPanel ? b.N - n : kFloatPanel;
    w[p] = b.w + steps.begin * b.w_stride + n;
    const float* bias = b.bias == nullptr ? nullptr : b.bias + n;
    for (int r = 0; r < R; ++r) {
      if (steps.begin > 0) {
        acc[r][p] = Panel::load(b.y + (row + r) * b.y_stride + n, lanes[p]);
      } else {
        acc[r][p] = bias == nullptr ? Panel::zero() : Panel::load(bias, lanes[p]);
      }
    }
  }
  const float* x = b.x + row * b.x_stride;
  for (int64_t k = steps.begin; k < steps.end; ++k) {
    Panel column[P];
    for (int p = 0; p < P; ++p) {
      column[p] = Panel::load(w[p], lanes[p]);
      w[p] += b.w_stride;
    }
    for (int r = 0; r < R; ++r) {
      for (int p = 0; p < P; ++p) acc[r][p].add_product(x[r * b.x_stride + k], column[p]);
    }
  }
  for (int p = 0; p < P; ++p) {
    for (int r = 0; r < R; ++r) {
      acc[r][p].store(b.y + (row + r) * b.y_stride + (panel + p) * kFloatPanel, lanes[p]);
    }
  }
}

using FloatTile = void (*)(const FloatLinear&, int64_t, int64_t, Steps);

template <int P, int R = kMaxRows>
FloatTile float_tile_of(int64_t rows) {
  if (rows == R) return &float_tile<R, P>;
  if constexpr (R > 1) return float_tile_of<P, R - 1>(rows);
  return nullptr;
}

// All panels of the block for rows [row, end), in tiles of nearly equal height.
void float_rows(const FloatLinear& b, int64_t row, int64_t end, Steps steps) {
  for (int64_t panel = b.first_panel; panel < b.last_panel; panel += kPanelsPerTile) {
    const bool is_full = b.last_panel - panel >= kPanelsPerTile;
    int64_t tiles = (end - row + kMaxRows - 1) / kMaxRows;
    for (int64_t r = row; r < end; --tiles) {
      const int64_t height = (end - r + tiles - 1) / tiles;
      const FloatTile tile =
          is_full ? float_tile_of<kPanelsPerTile>(height) : float_tile_of<1>(height);
      tile(b, r, panel, steps);
      r += height;
    }
  }
}

void float_linear_block(const FloatLinear& b) {
  for (int64_t row = 0; row < b.rows; row += kRowsPerBlock) {
    const int64_t end = row + kRowsPerBlock < b.rows ? row + kRowsPerBlock : b.rows;
    int64_t k = 0;
    do {  // at least once: K = 0 still stores the bias
      const int64_t k_end = k + kStepsPerBlock < b.K ? k + kStepsPerBlock : b.K;
      float_rows(b, row, end, {k, k_end});
      k = k_end;
    } while (k < b.K);
  }
}
