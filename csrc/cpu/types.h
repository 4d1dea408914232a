#pragma once

#include <cstdint>
#include <cstring>

namespace lraee::cpu {

// Storage of one activation tensor. Arithmetic is always float32.
enum class FloatType : int { kF32, kBf16, kF16 };

// The same as types, to choose an overload by.
struct F32 {
  using Storage = float;
};
struct Bf16 {
  using Storage = uint16_t;
};
struct F16 {
  using Storage = uint16_t;
};

}  // namespace lraee::cpu
