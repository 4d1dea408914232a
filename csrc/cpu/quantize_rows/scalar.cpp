#include "cpu/quantize_rows/quantize_rows.h"
#include "cpu/simd/scalar.h"

#include "cpu/quantize_rows/body.h"

namespace lraee::cpu {

void quantize_rows_scalar(const QuantizeRowsArgs& args, int64_t begin, int64_t end) {
  quantize_rows_at_level(args, begin, end);
}

}  // namespace lraee::cpu
