#pragma once

namespace lraee::cpu {

// Instruction-set levels that kernels are written for, lowest first.
//   scalar       plain C++
//   avx2         AVX2, FMA, F16C
//   avx_vnni     the same and 256-bit vpdpbusd, in the VEX encoding (AVX-VNNI) or the EVEX encoding
//                (AVX512VL + AVX512-VNNI)
//   avx512_vnni  AVX512 F, BW, DQ, VL and VNNI
//   amx          the same, and AMX tiles of int8 and bfloat16 (Linux)
enum class Isa : int { kScalar, kAvx2, kAvxVnni, kAvx512Vnni, kAmx };
inline constexpr int kNumIsaLevels = 5;

const char* isa_name(Isa isa);

// Whether the CPU has the level and the operating system saves its registers.
bool isa_available(Isa isa);

// Whether 256-bit vpdpbusd exists in its VEX encoding.
bool has_vex_vnni();

// The level named; false if there is none of that name.
bool isa_from_name(const char* name, Isa* isa);

// The highest level available.
Isa probed_isa();

}  // namespace lraee::cpu
