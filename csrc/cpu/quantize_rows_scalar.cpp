#include "cpu/quantize_rows.h"
#include "cpu/rows_vec.h"

// clang-format off: the vectors come first
#include "cpu/rows_vec_scalar.h"
#include "cpu/quantize_rows_impl.h"
// clang-format on

namespace lraee::cpu {

void quantize_rows_scalar(const QuantizeRowsArgs& args, int64_t begin, int64_t end) {
  quantize_rows_at_level(args, begin, end);
}

}  // namespace lraee::cpu
