#if defined(__x86_64__)

#include "cpu/exit_probe/exit_probe.h"
#include "cpu/simd/avx2.h"

LRAEE_BEGIN_AVX2

#include "cpu/exit_probe/body.h"

namespace lraee::cpu {

void pool_patches_avx2(const PoolPatchesArgs& args, int64_t b, int64_t c_begin, int64_t c_end) {
  pool_patches_at_level(args, b, c_begin, c_end);
}

void sum_spread_avx2(const PoolPatchesArgs& args, int64_t b) { sum_spread_at_level(args, b); }

void embedding_length_avx2(const ClassScoresArgs& args, int64_t b) {
  embedding_length_at_level(args, b);
}

void class_scores_avx2(const ClassScoresArgs& args, int64_t chunk) {
  class_scores_at_level(args, chunk);
}

void gate_score_avx2(const ClassScoresArgs& args, int64_t b) { gate_score_at_level(args, b); }

}  // namespace lraee::cpu

LRAEE_END_TARGET

#endif  // __x86_64__
