#pragma once

#include <cstdint>

namespace lraee::cpu {

// Storage of one activation tensor. Arithmetic is always float32.
enum class FloatType : int { kF32, kBf16, kF16 };

// Its elements where they are not float.
struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

}  // namespace lraee::cpu
