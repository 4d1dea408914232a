#include <cmath>

#include "cpu/float_linear.h"

namespace lraee::cpu {

void pack_float_weight(const float* w, int64_t N, int64_t K, float* packed) {
  for (int64_t n = 0; n < num_float_panels(N) * kFloatPanel; ++n) {
    float* panel = packed + n / kFloatPanel * kFloatPanel * K + n % kFloatPanel;
    for (int64_t k = 0; k < K; ++k) panel[k * kFloatPanel] = n < N ? w[n * K + k] : 0.0f;
  }
}

void unpack_float_weight(const float* packed, int64_t N, int64_t K, float* w) {
  for (int64_t n = 0; n < N; ++n) {
    const float* panel = packed + n / kFloatPanel * kFloatPanel * K + n % kFloatPanel;
    for (int64_t k = 0; k < K; ++k) w[n * K + k] = panel[k * kFloatPanel];
  }
}

namespace {

constexpr int kMaxRows = 4;
constexpr int kPanelsPerTile = 1;

struct Panel {
  float lane[kFloatPanel];

  static Panel zero() { return Panel{}; }
  static Panel load(const float* from, int64_t lanes) {
    Panel v{};
    for (int64_t i = 0; i < lanes; ++i) v.lane[i] = from[i];
    return v;
  }
  void store(float* to, int64_t lanes) const {
    for (int64_t i = 0; i < lanes; ++i) to[i] = lane[i];
  }
  void add_product(float x, const Panel& w) {
    for (int64_t i = 0; i < kFloatPanel; ++i) lane[i] = std::fma(x, w.lane[i], lane[i]);
  }
};

#include "cpu/float_linear_blocks.h"

}  // namespace

void float_linear_scalar(const FloatLinear& block) { float_linear_block(block); }

}  // namespace lraee::cpu
