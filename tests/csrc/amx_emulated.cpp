// int8_linear_amx with its tiles in plain memory, against int8_linear_scalar bit for bit: a check
// of the AMX code on machines without AMX. Prints the cases that differ; the exit status is 1 if
// any.

#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

namespace emulated {

struct Config {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

struct Tile {
  int rows = 0, row_bytes = 0;
  alignas(64) int8_t bytes[16][64] = {};
};
Tile tiles[8];

void load_config(const void* from) {
  const auto* config = static_cast<const Config*>(from);
  for (int t = 0; t < 8; ++t) tiles[t] = {config->rows[t], config->row_bytes[t]};
}

void zero(int t) { std::memset(tiles[t].bytes, 0, sizeof(tiles[t].bytes)); }

void load(int t, const void* from, int64_t stride) {
  zero(t);
  for (int r = 0; r < tiles[t].rows; ++r) {
    std::memcpy(tiles[t].bytes[r], static_cast<const char*>(from) + r * stride,
                static_cast<size_t>(tiles[t].row_bytes));
  }
}

void store(int t, void* to, int64_t stride) {
  for (int r = 0; r < tiles[t].rows; ++r) {
    std::memcpy(static_cast<char*>(to) + r * stride, tiles[t].bytes[r],
                static_cast<size_t>(tiles[t].row_bytes));
  }
}

// sums[m][n] += sum over k, i of a[m][k][i] * b[k][n][i], signed by signed.
void multiply(int sums, int a, int b) {
  for (int m = 0; m < tiles[sums].rows; ++m) {
    for (int n = 0; n < tiles[sums].row_bytes / 4; ++n) {
      int32_t sum;
      std::memcpy(&sum, &tiles[sums].bytes[m][4 * n], sizeof(sum));
      for (int k = 0; k < tiles[a].row_bytes / 4; ++k) {
        for (int i = 0; i < 4; ++i)
          sum += tiles[a].bytes[m][4 * k + i] * tiles[b].bytes[k][4 * n + i];
      }
      std::memcpy(&tiles[sums].bytes[m][4 * n], &sum, sizeof(sum));
    }
  }
}

}  // namespace emulated

#undef _tile_loadconfig
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbssd
#undef _tile_release
#define _tile_loadconfig(from) emulated::load_config(from)
#define _tile_loadd(t, from, stride) emulated::load(t, from, stride)
#define _tile_stream_loadd(t, from, stride) emulated::load(t, from, stride)
#define _tile_stored(t, to, stride) emulated::store(t, to, stride)
#define _tile_zero(t) emulated::zero(t)
#define _tile_dpbssd(sums, a, b) emulated::multiply(sums, a, b)
#define _tile_release() static_cast<void>(0)

#include "cpu/int8_linear/amx.cpp"

using namespace lraee::cpu;

namespace {

std::mt19937 source(1);

template <class T>
std::vector<T> numbers(int64_t count, int lowest, int highest, float step) {
  std::uniform_int_distribution<int> pick(lowest, highest);
  std::vector<T> values(static_cast<size_t>(count));
  for (T& value : values) value = static_cast<T>(static_cast<float>(pick(source)) * step);
  return values;
}

// v: which operands are there, the activation and the type of y.
bool is_same(int64_t M, int64_t N, int64_t K, int v) {
  const int64_t panels = num_panels(N);
  const auto x_q = numbers<int8_t>(M * K, -128, 127, 1), w_q = numbers<int8_t>(N * K, -127, 127, 1);
  std::vector<int8_t> w(static_cast<size_t>(panels * num_k_groups(K) * kLineBytes + 1));
  std::vector<int32_t> w_sum(static_cast<size_t>(panels * kPanelWidth));
  pack_weight(w_q.data(), N, K, w.data(), w_sum.data());
  const auto x_scale = numbers<float>(M, 1, 999, 1e-5f), w_scale = numbers<float>(N, 1, 999, 1e-5f);
  const auto bias = numbers<float>(N, -500, 500, 1e-3f);
  const auto layer_scale = numbers<float>(N, -500, 500, 1e-2f);
  const auto x_zero = numbers<int32_t>(M, -128, 127, 1);
  const int64_t stride = 2 * N;
  const auto as_floats = numbers<float>(M * stride, -500, 500, 1e-3f);
  const auto as_halves = numbers<uint16_t>(M * stride, 0x3000, 0x3FFF, 1);

  constexpr FloatType kTypes[] = {FloatType::kF32, FloatType::kBf16, FloatType::kF16};
  const bool is_wide = kTypes[v % 3] == FloatType::kF32;
  const void* residual = is_wide ? static_cast<const void*>(as_floats.data()) : as_halves.data();
  Int8LinearArgs a{.M = M,
                   .N = N,
                   .K = K,
                   .x_q = x_q.data(),
                   .x_stride = K,
                   .x_scale = x_scale.data(),
                   .x_zero = (v & 1) != 0 ? x_zero.data() : nullptr,
                   .w = w.data(),
                   .w_scale = w_scale.data(),
                   .w_sum = w_sum.data(),
                   .bias = (v & 2) != 0 ? bias.data() : nullptr,
                   .layer_scale = (v & 4) != 0 ? layer_scale.data() : nullptr,
                   .residual = (v & 8) != 0 ? residual : nullptr,
                   .residual_stride = stride,
                   .y = nullptr,
                   .out_type = kTypes[v % 3],
                   .activation = static_cast<Activation>(v / 2 % 4)};

  const size_t bytes = static_cast<size_t>(M * N) * (is_wide ? 4 : 2);
  std::vector<char> expected(bytes, 7), actual(bytes, 9);
  std::vector<char> memory(static_cast<size_t>(int8_linear_scratch_bytes(K)) + 64);
  void* const scratch = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64);
  a.y = expected.data();
  const Int8LinearBlock whole{.m_begin = 0, .m_end = M, .n_begin = 0, .n_end = N};
  int8_linear_scalar(a, whole, scratch);
  a.y = actual.data();
  int8_linear_amx(a, whole, scratch);
  return expected == actual;
}

}  // namespace

int main() {
  int different = 0, count = 0;
  for (const int64_t M : {1, 2, 15, 16, 17, 31, 32, 33, 50, 97}) {
    for (const int64_t N : {1, 15, 16, 17, 31, 32, 33, 64, 65, 160}) {
      for (const int64_t K : {0, 1, 63, 64, 65, 128, 200}) {
        for (int v = 0; v < 16; ++v, ++count) {
          if (is_same(M, N, K, v)) continue;
          if (++different <= 10)
            std::printf("differs: M %ld, N %ld, K %ld, v %d\n", long(M), long(N), long(K), v);
        }
      }
    }
  }
  std::printf("%d of %d cases differ\n", different, count);
  return different == 0 ? 0 : 1;
}
