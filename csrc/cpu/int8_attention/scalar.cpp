#include "cpu/int8_attention/int8_attention.h"
#include "cpu/int8_attention/scratch.h"
#include "cpu/simd/scalar.h"

#include "cpu/int8_attention/body.h"

namespace lraee::cpu {

void int8_attention_scalar(const Int8AttentionArgs& args, const Int8AttentionPart& part,
                           void* scratch) {
  int8_attention_at_level(args, part, scratch);
}

}  // namespace lraee::cpu
