#include "cpu/int8_attention.h"

#include "cpu/int8_attention_scratch.h"

namespace lraee::cpu {

int64_t int8_attention_scratch_bytes(int64_t L, int64_t d) {
  return AttentionScratch(nullptr, L, d).size_bytes;
}

}  // namespace lraee::cpu
