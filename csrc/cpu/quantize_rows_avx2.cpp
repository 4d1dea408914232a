#if defined(__x86_64__)

#include "cpu/quantize_rows.h"
#include "cpu/rows_vec.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

// clang-format off: the vectors come first
#include "cpu/rows_vec_avx2.h"
#include "cpu/quantize_rows_impl.h"
// clang-format on

namespace lraee::cpu {

void quantize_rows_avx2(const QuantizeRowsArgs& args, int64_t begin, int64_t end) {
  quantize_rows_at_level(args, begin, end);
}

}  // namespace lraee::cpu

#pragma GCC pop_options

#endif  // __x86_64__
