#include "cpu/layer_norm_quantize.h"
#include "cpu/rows_vec.h"

// clang-format off: the vectors come first
#include "cpu/rows_vec_scalar.h"
#include "cpu/layer_norm_quantize_impl.h"
// clang-format on

namespace lraee::cpu {

void layer_norm_quantize_scalar(const LayerNormQuantizeArgs& args, int64_t begin, int64_t end,
                                float* y) {
  layer_norm_quantize_at_level(args, begin, end, y);
}

}  // namespace lraee::cpu
