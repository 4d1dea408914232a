#include "cpu/isa.h"

#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace lraee::cpu {
namespace {

constexpr const char* kNames[kNumIsaLevels] = {"scalar", "avx2", "avx_vnni", "avx512_vnni", "amx"};

#if defined(__x86_64__)
#ifdef __linux__
// AMX-BF16, AMX-TILE and AMX-INT8 of CPUID leaf 7.
bool has_tiles() {
  constexpr unsigned kBits = 1u << 22 | 1u << 24 | 1u << 25;
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & kBits) == kBits;
}

// Tile registers are large, so Linux saves them only for processes with a permission.
bool may_use_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#else
bool has_tiles() { return false; }
bool may_use_tiles() { return false; }
#endif

// __builtin_cpu_supports reads CPUID and XGETBV: a register state that the operating system does
// not save counts as absent.
struct Probe {
  bool avx2, avx512, vex_vnni, evex_vnni, tiles;
  Probe() {
    __builtin_cpu_init();
    avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
    avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    vex_vnni = avx2 && __builtin_cpu_supports("avxvnni");
    evex_vnni = avx512 && __builtin_cpu_supports("avx512vnni");
    tiles = evex_vnni && has_tiles() && may_use_tiles();
  }
};
#else
struct Probe {
  bool avx2 = false, vex_vnni = false, evex_vnni = false, tiles = false;
};
#endif

const Probe& probe() {
  static const Probe once;
  return once;
}

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

bool isa_available(Isa isa) {
  switch (isa) {
    case Isa::kScalar:
      return true;
    case Isa::kAvx2:
      return probe().avx2;
    case Isa::kAvxVnni:
      return probe().vex_vnni || probe().evex_vnni;
    case Isa::kAvx512Vnni:
      return probe().evex_vnni;
    case Isa::kAmx:
      return probe().tiles;
  }
  return false;
}

bool has_vex_vnni() { return probe().vex_vnni; }

bool isa_from_name(const char* name, Isa* isa) {
  for (int level = 0; level < kNumIsaLevels; ++level) {
    if (std::strcmp(name, kNames[level]) == 0) {
      *isa = static_cast<Isa>(level);
      return true;
    }
  }
  return false;
}

Isa probed_isa() {
  for (int level = kNumIsaLevels - 1; level > 0; --level) {
    if (isa_available(static_cast<Isa>(level))) return static_cast<Isa>(level);
  }
  return Isa::kScalar;
}

}  // namespace lraee::cpu
