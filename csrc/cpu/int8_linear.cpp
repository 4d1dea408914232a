#include "cpu/int8_linear.h"

#include "cpu/int8_linear_blocking.h"

namespace lraee::cpu {

int64_t int8_linear_scratch_bytes(int64_t K) {
  return chunk_rows(K) * scratch_stride(K) * static_cast<int64_t>(sizeof(int16_t));
}

void int8_linear(Isa isa, const Int8LinearArgs& args, const Int8LinearBlock& block, void* scratch) {
#if defined(__x86_64__)
  switch (isa) {
    case Isa::kScalar:
      break;
    case Isa::kAvx2:
      return int8_linear_avx2(args, block, scratch);
    case Isa::kAvxVnni:
      return has_vex_vnni() ? int8_linear_avx_vnni(args, block, scratch)
                            : int8_linear_avx512vl_vnni(args, block, scratch);
    case Isa::kAvx512Vnni:
      return int8_linear_avx512_vnni(args, block, scratch);
    case Isa::kAmx:
#if defined(__linux__)
      return int8_linear_amx(args, block, scratch);
#else
      break;
#endif
  }
#endif
  int8_linear_scalar(args, block, scratch);
}

}  // namespace lraee::cpu
