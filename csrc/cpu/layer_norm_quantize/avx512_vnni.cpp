#if defined(__x86_64__)

#include "cpu/layer_norm_quantize/layer_norm_quantize.h"
#include "cpu/simd/avx512_vnni.h"

LRAEE_BEGIN_AVX512_VNNI

#include "cpu/layer_norm_quantize/body.h"

namespace lraee::cpu {

void layer_norm_quantize_avx512_vnni(const LayerNormQuantizeArgs& args, int64_t begin, int64_t end,
                                     float* y) {
  layer_norm_quantize_at_level(args, begin, end, y);
}

}  // namespace lraee::cpu

LRAEE_END_TARGET

#endif  // __x86_64__
