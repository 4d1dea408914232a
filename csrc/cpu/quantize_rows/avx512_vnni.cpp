#if defined(__x86_64__)

#include "cpu/quantize_rows/quantize_rows.h"
#include "cpu/simd/avx512_vnni.h"

LRAEE_BEGIN_AVX512_VNNI

#include "cpu/quantize_rows/body.h"

namespace lraee::cpu {

void quantize_rows_avx512_vnni(const QuantizeRowsArgs& args, int64_t begin, int64_t end) {
  quantize_rows_at_level(args, begin, end);
}

}  // namespace lraee::cpu

LRAEE_END_TARGET

#endif  // __x86_64__
