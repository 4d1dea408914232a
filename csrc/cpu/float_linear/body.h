#pragma once

// Blocking of float_linear, written once for all instruction sets. Included inside a target region,
// after `Panel` (16 float lanes), `kMaxRows` and `kPanelsPerTile` of a register tile, and
// `kPanelsPerRow` of a single row.

namespace lraee::cpu {
namespace {

// Steps of k between two stores of the partial sums, and rows that share one copy of them. The
// copied panels (24 KB) leave L1 room for the rows of a tile, both copies (180 KB of stack) stay in
// L2. On a Xeon with AMX, 784 x 768 x 3072: 256 steps and 96 rows 162 GFLOP/s a core, these 179, of
// 247.
constexpr int64_t kStepsPerBlock = 192;
constexpr int64_t kRowsPerBlock = 192;

// [NOTE: why both operands are copied] Rows of x and steps of w lie a multiple of 4 KB apart in
// real towers, so the lines of a tile would all fall into one or two sets of L1: 37 GFLOP/s a core
// instead of about 90 (K = 3072, N = 768, Zen 4).
constexpr int64_t kRowStride = kStepsPerBlock + 16;  // an odd number of lines
struct FloatCopies {
  alignas(64) float x[kRowsPerBlock * kRowStride];
  alignas(64) float w[kStepsPerBlock * kPanelsPerTile * kFloatPanel];
};

struct KRange {
  int64_t begin, end;
  int64_t count() const { return end - begin; }
};

void copy_rows(const FloatLinear& b, int64_t row, int64_t end, KRange steps, float* to) {
  for (int64_t r = row; r < end; ++r, to += kRowStride) {
    std::memcpy(to, b.x + r * b.x_stride + steps.begin, sizeof(float) * steps.count());
  }
}

template <int P>
void copy_panels(const FloatLinear& b, int64_t panel, KRange steps, float* to) {
  for (int64_t k = steps.begin; k < steps.end; ++k) {
    for (int p = 0; p < P; ++p, to += kFloatPanel) {
      const int64_t n = (panel + p) * kFloatPanel;
      const int64_t lanes = b.N - n < kFloatPanel ? b.N - n : kFloatPanel;
      Panel::load(b.w + k * b.w_stride + n, lanes).store(to, kFloatPanel);
    }
  }
}

// R rows x P panels of y: sums of k in `steps` are added to what y holds, or to the bias at the
// first block. x and w are copies.
template <int R, int P>
void float_tile(const FloatLinear& b, const float* x, const float* w, int64_t row, int64_t panel,
                KRange steps) {
  Panel acc[R][P];
  int64_t lanes[P];
  for (int p = 0; p < P; ++p) {
    const int64_t n = (panel + p) * kFloatPanel;
    lanes[p] = b.N - n < kFloatPanel ? b.N - n : kFloatPanel;
    const float* bias = b.bias == nullptr ? nullptr : b.bias + n;
    for (int r = 0; r < R; ++r) {
      if (steps.begin > 0) {
        acc[r][p] = Panel::load(b.y + (row + r) * b.y_stride + n, lanes[p]);
      } else {
        acc[r][p] = bias == nullptr ? Panel::zero() : Panel::load(bias, lanes[p]);
      }
    }
  }
  for (int64_t k = 0; k < steps.count(); ++k, w += P * kFloatPanel) {
    Panel column[P];
    for (int p = 0; p < P; ++p) column[p] = Panel::load(w + p * kFloatPanel, kFloatPanel);
    for (int r = 0; r < R; ++r) {
      for (int p = 0; p < P; ++p) acc[r][p].add_product(x[r * kRowStride + k], column[p]);
    }
  }
  for (int p = 0; p < P; ++p) {
    for (int r = 0; r < R; ++r) {
      acc[r][p].store(b.y + (row + r) * b.y_stride + (panel + p) * kFloatPanel, lanes[p]);
    }
  }
}

using FloatTile = void (*)(const FloatLinear&, const float*, const float*, int64_t, int64_t,
                           KRange);

template <int P, int R = kMaxRows>
FloatTile float_tile_of(int64_t rows) {
  if (rows == R) return &float_tile<R, P>;
  if constexpr (R > 1) return float_tile_of<P, R - 1>(rows);
  return nullptr;
}

// P panels of y for rows [row, end), in tiles of nearly equal height.
template <int P>
void float_panels(const FloatLinear& b, int64_t row, int64_t end, int64_t panel, KRange steps,
                  FloatCopies& copies) {
  copy_panels<P>(b, panel, steps, copies.w);
  int64_t tiles = (end - row + kMaxRows - 1) / kMaxRows;
  for (int64_t r = row; r < end; --tiles) {
    const int64_t height = (end - r + tiles - 1) / tiles;
    float_tile_of<P>(height)(b, copies.x + (r - row) * kRowStride, copies.w, r, panel, steps);
    r += height;
  }
}

// P whole panels of the one row of y. w comes from memory, each step as many lines side by side as
// registers hold sums for: nothing is read twice, so nothing is copied.
template <int P>
void float_row(const FloatLinear& b, int64_t panel) {
  const int64_t n = panel * kFloatPanel;
  Panel acc[P];
  for (int p = 0; p < P; ++p) {
    const float* bias = b.bias == nullptr ? nullptr : b.bias + n + p * kFloatPanel;
    acc[p] = bias == nullptr ? Panel::zero() : Panel::load(bias, kFloatPanel);
  }
  const float* w = b.w + n;
  for (int64_t k = 0; k < b.K; ++k, w += b.w_stride) {
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) {
      acc[p].add_product(b.x[k], Panel::load(w + p * kFloatPanel, kFloatPanel));
    }
  }
  for (int p = 0; p < P; ++p) acc[p].store(b.y + n + p * kFloatPanel, kFloatPanel);
}

// The row's whole panels; returns the first panel that is left.
int64_t float_row_panels(const FloatLinear& b) {
  int64_t panel = b.first_panel;
  const int64_t whole = b.last_panel * kFloatPanel <= b.N ? b.last_panel : b.last_panel - 1;
  for (; panel + kPanelsPerRow <= whole; panel += kPanelsPerRow) float_row<kPanelsPerRow>(b, panel);
  for (; panel < whole; ++panel) float_row<1>(b, panel);
  return panel;
}

inline void float_linear_at_level(FloatLinear b) {
  if (b.rows == 1) b.first_panel = float_row_panels(b);
  if (b.first_panel == b.last_panel) return;
  FloatCopies copies;
  for (int64_t row = 0; row < b.rows; row += kRowsPerBlock) {
    const int64_t end = row + kRowsPerBlock < b.rows ? row + kRowsPerBlock : b.rows;
    int64_t k = 0;
    do {  // at least once: K = 0 still stores the bias
      const int64_t k_end = k + kStepsPerBlock < b.K ? k + kStepsPerBlock : b.K;
      copy_rows(b, row, end, {k, k_end}, copies.x);
      int64_t panel = b.first_panel;
      for (; panel + kPanelsPerTile <= b.last_panel; panel += kPanelsPerTile) {
        float_panels<kPanelsPerTile>(b, row, end, panel, {k, k_end}, copies);
      }
      for (; panel < b.last_panel; ++panel) float_panels<1>(b, row, end, panel, {k, k_end}, copies);
      k = k_end;
    } while (k < b.K);
  }
}

}  // namespace
}  // namespace lraee::cpu
