#pragma once

#include "common.h"

namespace lraee {

// The function of one operator at each level.
template <class Kernel>
struct Levels {
  Kernel* scalar;
  Kernel* avx2;
  Kernel* avx_vnni;
  Kernel* avx512_vnni;
  Kernel* amx;
};

// The function of the active level.
template <class Kernel>
Kernel* by_level(const Levels<Kernel>& levels) {
  switch (active_isa()) {
    case cpu::Isa::kScalar:
      return levels.scalar;
    case cpu::Isa::kAvx2:
      return levels.avx2;
    case cpu::Isa::kAvxVnni:
      return levels.avx_vnni;
    case cpu::Isa::kAvx512Vnni:
      return levels.avx512_vnni;
    case cpu::Isa::kAmx:
      return levels.amx;
  }
  return levels.scalar;
}

// Levels of an operator without int8 products, to which avx_vnni and amx have nothing to add.
// Elsewhere than on x86-64 only the scalar level is compiled.
#if defined(__x86_64__)
#define LRAEE_THREE_LEVELS(name)          \
  {                                       \
      .scalar = &name##_scalar,           \
      .avx2 = &name##_avx2,               \
      .avx_vnni = &name##_avx2,           \
      .avx512_vnni = &name##_avx512_vnni, \
      .amx = &name##_avx512_vnni,         \
  }
#else
#define LRAEE_THREE_LEVELS(name)     \
  {                                  \
      .scalar = &name##_scalar,      \
      .avx2 = &name##_scalar,        \
      .avx_vnni = &name##_scalar,    \
      .avx512_vnni = &name##_scalar, \
      .amx = &name##_scalar,         \
  }
#endif

}  // namespace lraee
