#if defined(__x86_64__)

#include "cpu/int8_attention.h"
#include "cpu/int8_attention_scratch.h"
#include "cpu/rows_vec.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")

// clang-format off: the vectors come first
#include "cpu/rows_vec_avx512_vnni.h"
#include "cpu/int8_attention_impl.h"
// clang-format on

namespace lraee::cpu {

void int8_attention_avx512_vnni(const Int8AttentionArgs& args, const Int8AttentionPart& part,
                                void* scratch) {
  int8_attention_at_level(args, part, scratch);
}

}  // namespace lraee::cpu

#pragma GCC pop_options

#endif  // __x86_64__
