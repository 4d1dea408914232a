// Prints the largest errors of csrc/cpu/numerics/exp.h, measured at AVX2 on a grid of float32 bit
// patterns: relative of exp_nonpositive on [-86, 0] and of exp_f32 on [-86, 88.7], absolute of
// sigmoid on [-100, 100].

#include <cstdio>

#include "cpu/simd/avx2.h"

LRAEE_BEGIN_AVX2

#include "cpu/numerics/exp.h"

namespace lraee::cpu {
namespace {

constexpr uint32_t kStep = 509;  // a prime, so that every low bit pattern is met
constexpr uint32_t kSign = 0x80000000u;

// Largest error(actual, x) over the floats of the given sign up to `limit` in size.
template <class Function, class Error>
double largest(uint32_t sign, float limit, Function function, Error error) {
  uint32_t end;
  std::memcpy(&end, &limit, 4);
  double worst = 0.0;
  for (uint32_t pattern = 0; pattern <= end; pattern += kStep * kWidth) {
    uint32_t patterns[kWidth];
    float x[kWidth], actual[kWidth];
    for (uint32_t i = 0; i < kWidth; ++i) patterns[i] = std::min(end, pattern + i * kStep) | sign;
    std::memcpy(x, patterns, sizeof(x));
    store(actual, function(load(x)));
    for (int i = 0; i < kWidth; ++i) worst = std::max(worst, error(actual[i], double{x[i]}));
  }
  return worst;
}

double relative(float actual, double x) { return std::fabs(actual / std::exp(x) - 1.0); }
double of_sigmoid(float actual, double x) { return std::fabs(actual - 1.0 / (1.0 + std::exp(-x))); }

void print() {
  const auto nonpositive = [](Vf x) { return exp_nonpositive(x); };
  const auto any = [](Vf x) { return exp_f32(x); };
  const auto squashed = [](Vf x) { return sigmoid(x); };
  std::printf("%.9g %.9g %.9g\n", largest(kSign, 86.0f, nonpositive, relative),
              std::max(largest(kSign, 86.0f, any, relative), largest(0, 88.7f, any, relative)),
              std::max(largest(kSign, 100.0f, squashed, of_sigmoid),
                       largest(0, 100.0f, squashed, of_sigmoid)));
  float special[kWidth] = {0.0f, -INFINITY, NAN, NAN, 89.0f, INFINITY, -1e30f, -86.5f};
  const uint32_t payload = 0x7FC01234u;
  std::memcpy(special + 3, &payload, 4);
  for (int i = 0; i < 2; ++i) {
    float actual[kWidth];
    store(actual, i == 0 ? exp_nonpositive(load(special)) : exp_f32(load(special)));
    for (float value : actual) {
      std::printf("%g ", static_cast<double>(std::isnan(value) ? std::fabs(value) : value));
    }
  }
}

}  // namespace
}  // namespace lraee::cpu

LRAEE_END_TARGET

int main() { lraee::cpu::print(); }
