#include "cpu/gated_quantize/gated_quantize.h"
#include "cpu/numerics/gates.h"
#include "cpu/simd/scalar.h"

#include "cpu/gated_quantize/body.h"

namespace lraee::cpu {

void gated_quantize_scalar(const GatedQuantizeArgs& args, int64_t begin, int64_t end, float* y) {
  gated_quantize_at_level(args, begin, end, y);
}

}  // namespace lraee::cpu
