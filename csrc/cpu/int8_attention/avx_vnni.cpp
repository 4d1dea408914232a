#if defined(__x86_64__)

#include "cpu/int8_attention/int8_attention.h"
#include "cpu/int8_attention/scratch.h"
#include "cpu/simd/avx_vnni.h"

LRAEE_BEGIN_AVX_VNNI

#include "cpu/int8_attention/body.h"

namespace lraee::cpu {

void int8_attention_avx_vnni(const Int8AttentionArgs& args, const Int8AttentionPart& part,
                             void* scratch) {
  int8_attention_at_level(args, part, scratch);
}

}  // namespace lraee::cpu

LRAEE_END_TARGET

#endif  // __x86_64__
