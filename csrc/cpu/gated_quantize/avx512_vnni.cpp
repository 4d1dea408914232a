#if defined(__x86_64__)

#include "cpu/gated_quantize/gated_quantize.h"
#include "cpu/numerics/gates.h"
#include "cpu/simd/avx512_vnni.h"

LRAEE_BEGIN_AVX512_VNNI

#include "cpu/gated_quantize/body.h"

namespace lraee::cpu {

void gated_quantize_avx512_vnni(const GatedQuantizeArgs& args, int64_t begin, int64_t end,
                                float* y) {
  gated_quantize_at_level(args, begin, end, y);
}

}  // namespace lraee::cpu

LRAEE_END_TARGET

#endif  // __x86_64__
