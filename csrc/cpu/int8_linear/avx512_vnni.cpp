// int8_linear on 512-bit vpdpbusd.
//                      Zen 4           Zen 5       Ice Lake and later
//   vpdpbusd zmm       1 / cycle       2           1 (client) or 2
//   latency            4               4           5

#if defined(__x86_64__)

#include "cpu/int8_linear/blocking.h"
#include "cpu/int8_linear/int8_linear.h"
#include "cpu/int8_linear/prefetch.h"
#include "cpu/numerics/gates.h"
#include "cpu/pack_weight/pack_weight.h"
#include "cpu/simd/avx512_vnni.h"

LRAEE_BEGIN_AVX512_VNNI

#include "cpu/int8_linear/vnni_tile.h"
#include "cpu/int8_linear/body.h"

namespace lraee::cpu {

void int8_linear_avx512_vnni(const Int8LinearArgs& args, const Int8LinearBlock& block,
                             void* scratch) {
  int8_linear_at_level(args, block, scratch);
}

}  // namespace lraee::cpu

LRAEE_END_TARGET

#endif  // __x86_64__
