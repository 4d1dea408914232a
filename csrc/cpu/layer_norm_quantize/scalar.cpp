#include "cpu/layer_norm_quantize/layer_norm_quantize.h"
#include "cpu/simd/scalar.h"

#include "cpu/layer_norm_quantize/body.h"

namespace lraee::cpu {

void layer_norm_quantize_scalar(const LayerNormQuantizeArgs& args, int64_t begin, int64_t end,
                                float* y) {
  layer_norm_quantize_at_level(args, begin, end, y);
}

}  // namespace lraee::cpu
