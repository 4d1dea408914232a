#pragma once

#include <cstdint>
#include <cstring>

namespace lraee::cpu {

// Storage of one activation tensor. Arithmetic is always float32.
enum class FloatType : int { kF32, kBf16, kF16 };

}  // namespace lraee::cpu
