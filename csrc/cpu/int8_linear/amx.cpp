// int8_linear on AMX tiles: one tdpbssd multiplies 16 rows of 64 bytes with 16 columns of 64 bytes,
// signed by signed, in as many cycles as there are rows (Sapphire Rapids and later): eight times
// what 512-bit vpdpbusd does. A line of pack_weight/pack_weight.h is a row of a weight tile.

#if defined(__x86_64__) && defined(__linux__)

#include "cpu/int8_linear/blocking.h"
#include "cpu/int8_linear/int8_linear.h"
#include "cpu/numerics/gates.h"
#include "cpu/pack_weight/pack_weight.h"
#include "cpu/simd/amx.h"

LRAEE_BEGIN_AMX

namespace lraee::cpu {
namespace {

struct Tile {
  static constexpr int32_t kXOffset = 0;
};

}  // namespace
}  // namespace lraee::cpu

#include "cpu/int8_linear/epilogue.h"

namespace lraee::cpu {
namespace {

// Two tiles of rows by two panels of columns: four tiles of sums, two of x, two of w. Each tile
// that is loaded takes part in two products.
constexpr int kTileRows = 16, kRows = 2 * kTileRows, kPanels = 2;
constexpr int kCols = kPanels * static_cast<int>(kPanelWidth);
constexpr int64_t kTileBytes = kTileRows * kLineBytes;
constexpr int64_t kStepGroups = kLineBytes / kGroupDepth;  // of 4 reduction steps, in one product

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {};
};

// GCC's tile intrinsics do not say what memory they read: the compiler must not drop or delay the
// stores to it.
inline void is_read(const void* memory) { asm volatile("" : : "r"(memory) : "memory"); }

// Sums are tiles 0 to 3, x is 4 and 5, w is 6 and 7.
inline void configure(int upper, int lower) {
  TileConfig config;
  const auto up = static_cast<uint8_t>(upper), low = static_cast<uint8_t>(lower > 0 ? lower : 1);
  const uint8_t rows[8] = {up, up, low, low, up, low, kTileRows, kTileRows};
  std::memcpy(config.rows, rows, sizeof(rows));
  is_read(&config);
  _tile_loadconfig(&config);
}

// Rows whose sums are there but not y: they are finished while the tiles work on the next sums.
template <Activation kActivation, class T>
class Pending {
 public:
  // acc [rows][kCols] stays untouched until all rows are finished.
  void start(const Args& args, const TileOut& out) {
    a_ = args, out_ = out, row_ = 0;
    columns_.load(args, out.n, out.cols);
  }

  // Finishes `rows` more rows, or those that are left.
  void advance(int rows) {
    const int end = out_.rows - row_ < rows ? out_.rows : row_ + rows;
    if (row_ == end) return;
    finish_rows<kActivation, T>(a_, out_, columns_, row_, end);
    row_ = end;
  }

 private:
  Args a_{};
  TileOut out_{};
  int row_ = 0;
  TileColumns<kCols> columns_;
};

// The weights of one pair of panels.
struct Weights {
  const int8_t* w;      // of the first panel
  int64_t panel_bytes;  // from one panel to the next
  const int8_t* tail;   // [kPanels][kTileBytes]: groups that do not fill a tile, and zeros
  int64_t steps, full_steps;
};

// acc[rows][kCols] = x @ w for kTiles tiles of rows and kWide panels; finishes what is pending in
// acc before.
template <int kTiles, int kWide, class P>
inline void multiply(const int8_t* x, int64_t stride, int upper, const Weights& w,
                     const int8_t* next, int64_t next_bytes, int32_t* acc, P& pending) {
  const int rows_per_step = static_cast<int>((kRows + w.steps - 1) / w.steps);
  _tile_zero(0);
  if constexpr (kWide == 2) _tile_zero(1);
  if constexpr (kTiles == 2) _tile_zero(2);
  if constexpr (kTiles == 2 && kWide == 2) _tile_zero(3);
  const int8_t* const lower = x + upper * stride;
  for (int64_t step = 0; step < w.steps; ++step) {
    const bool is_full = step < w.full_steps;
    const int8_t* const lines = is_full ? w.w + step * kTileBytes : w.tail;
    const int64_t next_panel = is_full ? w.panel_bytes : kTileBytes;
    _tile_loadd(6, lines, kLineBytes);
    _tile_stream_loadd(4, x + step * kLineBytes, stride);
    _tile_dpbssd(0, 4, 6);
    if constexpr (kWide == 2) {
      _tile_loadd(7, lines + next_panel, kLineBytes);
      _tile_dpbssd(1, 4, 7);
    }
    if constexpr (kTiles == 2) {
      _tile_stream_loadd(5, lower + step * kLineBytes, stride);
      _tile_dpbssd(2, 5, 6);
      if constexpr (kWide == 2) _tile_dpbssd(3, 5, 7);
    }
    for (const int8_t* const stop = next + next_bytes; next < stop; next += kLineBytes)
      _mm_prefetch(next, _MM_HINT_T1);
    pending.advance(rows_per_step);
  }
  pending.advance(kRows);
  constexpr int64_t kAccBytes = kCols * sizeof(int32_t);
  _tile_stored(0, acc, kAccBytes);
  if constexpr (kWide == 2) _tile_stored(1, acc + kPanelWidth, kAccBytes);
  if constexpr (kTiles == 2) {
    _tile_stored(2, acc + upper * kCols, kAccBytes);
    if constexpr (kWide == 2) _tile_stored(3, acc + upper * kCols + kPanelWidth, kAccBytes);
  }
}

// Rows of x as tiles read them: in place where K fills whole steps, else copied and padded.
struct Rows {
  const int8_t* x;
  int64_t stride;
};

template <Activation kActivation, class T>
class Runner {
 public:
  explicit Runner(const Args& a) : a_(a) {}

  void block(const Int8LinearBlock& block, int8_t* scratch) {
    const bool in_place = a_.K > 0 && a_.K % kLineBytes == 0;
    constexpr int64_t kChunkBytes = 768 * 1024;  // of x, in L2 while all columns pass
    int64_t chunk = in_place ? kChunkBytes / a_.K / kRows * kRows : chunk_rows(a_.K);
    if (chunk < kRows) chunk = kRows;
    for (int64_t m = block.m_begin; m < block.m_end; m += chunk) {
      const int64_t end = m + chunk < block.m_end ? m + chunk : block.m_end;
      const int8_t* const x = a_.x_q + m * a_.x_stride;
      if (in_place) {
        columns({x, a_.x_stride}, m, end, block);
      } else {
        pending_.advance(kRows);
        columns(copied(x, end - m, scratch), m, end, block);
      }
    }
    pending_.advance(kRows);
    _tile_release();
  }

 private:
  Rows copied(const int8_t* x, int64_t rows, int8_t* scratch) const {
    const int64_t stride = scratch_stride(a_.K);
    for (int64_t r = 0; r < rows; ++r) {
      std::memcpy(scratch + r * stride, x + r * a_.x_stride, static_cast<size_t>(a_.K));
      std::memset(scratch + r * stride + a_.K, 0, static_cast<size_t>(stride - a_.K));
    }
    is_read(scratch);
    return {scratch, stride};
  }

  void columns(Rows rows, int64_t m, int64_t end, const Int8LinearBlock& block) {
    const int64_t groups = num_k_groups(a_.K), panel_bytes = groups * kLineBytes;
    alignas(64) int8_t tail[kPanels * kTileBytes];
    for (int64_t n = block.n_begin; n < block.n_end; n += kCols) {
      const int cols = static_cast<int>(block.n_end - n < kCols ? block.n_end - n : kCols);
      const bool is_wide = cols > kPanelWidth;
      const int64_t steps = (groups + kStepGroups - 1) / kStepGroups;
      const Weights w{.w = a_.w + n / kPanelWidth * panel_bytes,
                      .panel_bytes = panel_bytes,
                      .tail = tail,
                      .steps = steps > 0 ? steps : 1,
                      .full_steps = groups / kStepGroups};
      if (w.full_steps < w.steps) copy_tail(w, is_wide ? 2 : 1, tail);
      if (is_wide) {
        tiles<2>(rows, m, end, n, cols, w);
      } else {
        tiles<1>(rows, m, end, n, cols, w);
      }
    }
  }

  static void copy_tail(const Weights& w, int panels, int8_t* tail) {
    const int64_t begin = w.full_steps * kTileBytes;
    for (int p = 0; p < panels; ++p, tail += kTileBytes) {
      std::memset(tail, 0, kTileBytes);
      std::memcpy(tail, w.w + p * w.panel_bytes + begin,
                  static_cast<size_t>(w.panel_bytes - begin));
    }
    is_read(tail);
  }

  // Rows in tiles of nearly equal height: a product takes as many cycles as it has rows.
  template <int kWide>
  void tiles(Rows rows, int64_t m, int64_t end, int64_t n, int cols, const Weights& w) {
    const int64_t parts = (end - m + kRows - 1) / kRows;
    // Software prefetch of the next columns' weights while these are at work, a share with each
    // step.
    const bool has_next = (n / kPanelWidth + 2 * kPanels) * kPanelWidth <= a_.N;
    const int64_t lines = has_next ? kPanels * w.panel_bytes / kLineBytes : 0;
    const int64_t step_bytes = (lines + parts * w.steps - 1) / (parts * w.steps) * kLineBytes;
    const int8_t* next = w.w + kPanels * w.panel_bytes;
    for (int64_t part = 0; part < parts; ++part) {
      const int height = static_cast<int>((end - m + parts - part - 1) / (parts - part));
      const int upper = height > kTileRows ? (height + 1) / 2 : height;
      if (height != configured_) configure(upper, height - upper);
      configured_ = height;
      if (height > kTileRows) {
        multiply<2, kWide>(rows.x, rows.stride, upper, w, next, step_bytes, acc_, pending_);
      } else {
        multiply<1, kWide>(rows.x, rows.stride, upper, w, next, step_bytes, acc_, pending_);
      }
      next += w.steps * step_bytes;
      pending_.start(a_, {.m = m, .n = n, .rows = height, .cols = cols, .acc = acc_});
      rows.x += height * rows.stride;
      m += height;
    }
  }

  const Args a_;
  Pending<kActivation, T> pending_;
  int configured_ = 0;  // height of the tiles
  alignas(64) int32_t acc_[kRows * kCols];
};

}  // namespace

void int8_linear_amx(const Int8LinearArgs& args, const Int8LinearBlock& block, void* scratch) {
  with_epilogue(args, [&]<Activation kActivation, class T>() {
    Runner<kActivation, T>(args).block(block, static_cast<int8_t*>(scratch));
  });
}

}  // namespace lraee::cpu

LRAEE_END_TARGET

#endif  // __x86_64__ && __linux__
