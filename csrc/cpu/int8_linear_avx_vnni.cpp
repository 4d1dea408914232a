// int8_linear on 256-bit vpdpbusd in its VEX encoding (AVX-VNNI: Alder Lake, Sierra Forest, Zen 5
// and later).

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/activation_tables.h"
#include "cpu/int8_linear.h"
#include "cpu/int8_linear_blocking.h"
#include "cpu/pack_weight.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avxvnni")

namespace lraee::cpu {
namespace {

inline __m256i dpbusd(__m256i sum, __m256i x_u8x32, __m256i w_s8x32) {
  return _mm256_dpbusd_avx_epi32(sum, x_u8x32, w_s8x32);
}

#include "cpu/vec_avx2.h"
#include "cpu/int8_linear_vnni256_body.h"
#include "cpu/activation_body.h"
#include "cpu/int8_linear_epilogue.h"
#include "cpu/int8_linear_body.h"

}  // namespace

void int8_linear_avx_vnni(const Int8LinearArgs& args, const Int8LinearBlock& block, void* scratch) {
  run(args, block, scratch);
}

}  // namespace lraee::cpu

#pragma GCC pop_options

#endif  // __x86_64__
