#if defined(__x86_64__)

#include "cpu/quantize_rows/quantize_rows.h"
#include "cpu/simd/avx2.h"

LRAEE_BEGIN_AVX2

#include "cpu/quantize_rows/body.h"

namespace lraee::cpu {

void quantize_rows_avx2(const QuantizeRowsArgs& args, int64_t begin, int64_t end) {
  quantize_rows_at_level(args, begin, end);
}

}  // namespace lraee::cpu

LRAEE_END_TARGET

#endif  // __x86_64__
