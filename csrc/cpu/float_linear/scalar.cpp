#include "cpu/float_linear/float_linear.h"
#include "cpu/simd/scalar.h"

namespace lraee::cpu {
namespace {

constexpr int kMaxRows = 4;
constexpr int kPanelsPerTile = 1;
constexpr int kPanelsPerRow = 1;

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

}  // namespace
}  // namespace lraee::cpu

#include "cpu/float_linear/body.h"

namespace lraee::cpu {

void float_linear_scalar(const FloatLinear& block) { float_linear_at_level(block); }

}  // namespace lraee::cpu
