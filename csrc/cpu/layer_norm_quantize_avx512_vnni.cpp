#if defined(__x86_64__)

#include "cpu/layer_norm_quantize.h"
#include "cpu/rows_vec.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")

// clang-format off: the vectors come first
#include "cpu/rows_vec_avx512_vnni.h"
#include "cpu/layer_norm_quantize_impl.h"
// clang-format on

namespace lraee::cpu {

void layer_norm_quantize_avx512_vnni(const LayerNormQuantizeArgs& args, int64_t begin, int64_t end,
                                     float* y) {
  layer_norm_quantize_at_level(args, begin, end, y);
}

}  // namespace lraee::cpu

#pragma GCC pop_options

#endif  // __x86_64__
