#include "cpu/int8_attention.h"
#include "cpu/int8_attention_scratch.h"
#include "cpu/rows_vec.h"

// clang-format off: the vectors come first
#include "cpu/rows_vec_scalar.h"
#include "cpu/int8_attention_impl.h"
// clang-format on

namespace lraee::cpu {

void int8_attention_scalar(const Int8AttentionArgs& args, const Int8AttentionPart& part,
                           void* scratch) {
  int8_attention_at_level(args, part, scratch);
}

}  // namespace lraee::cpu
