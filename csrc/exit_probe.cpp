// z [B, L, D] -> embedding [B, E], top1, confidence, margin, variance and score [B] of leaving at
// this depth.

#include "cpu/exit_probe/exit_probe.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include "box.h"
#include "int8_linear.h"
#include "levels.h"
#include "rows.h"

namespace lraee {
namespace {

// Values to pool and products with classes that make a task worth its dispatch. A probe of
// lraee-tiny at batch 1 stays on one thread with them: 12 us instead of 15 (2 threads of an Intel
// Xeon, family 6 model 167, 24 November 2026); ViT-B/32 is shared between threads as before.
constexpr int64_t kPooledPerTask = 16384, kProductsPerTask = 65536;

// Pieces of this size that make a task.
int64_t pieces_per_task(int64_t task, int64_t piece) {
  return std::max<int64_t>(1, task / std::max<int64_t>(1, piece));
}

struct Pool {
  Tensor row, variance;  // [B, P], [B]
};

// Mean of the patch tokens, behind it for P = 2 D the class token, and the spatial variance of the
// patches. A small batch is cut into channels, so that no thread idles.
Pool pool_tokens(const Tensor& z, int64_t P) {
  const Tensor rows = with_contiguous_rows(z);
  const int64_t B = z.size(0), D = z.size(2);
  Pool pool{Tensor::empty({B, P}, kFloat32), Tensor::empty({B}, kFloat32)};
  const Tensor spread = Tensor::empty({B, D}, kFloat32);
  const cpu::PoolPatchesArgs args{.z = rows.const_data_ptr(),
                                  .stride_b = rows.stride(0),
                                  .stride_l = rows.stride(1),
                                  .type = float_type(z.dtype(), "exit_probe", "z"),
                                  .L = z.size(1),
                                  .D = D,
                                  .P = P,
                                  .pooled = pool.row.mutable_data_ptr<float>(),
                                  .spread = spread.mutable_data_ptr<float>(),
                                  .variance = pool.variance.mutable_data_ptr<float>()};
  const int64_t threads = num_threads();
  const int64_t parts =
      B == 0 ? 1 : std::min((threads + B - 1) / B, 1 + args.L * D / kPooledPerTask);
  const int64_t step = std::max<int64_t>(64, (D / parts + 63) / 64 * 64);
  const int64_t steps = (D + step - 1) / step;
  auto* const pool_part = by_level<cpu::PoolPatches>(LRAEE_THREE_LEVELS(cpu::pool_patches));
  const int64_t grain = pieces_per_task(kPooledPerTask, args.L * step);
  parallel_for(0, B * steps, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t c = task % steps * step;
      pool_part(args, task / steps, c, std::min(D, c + step));
    }
  });
  auto* const sum_spread = by_level<cpu::SumSpread>(LRAEE_THREE_LEVELS(cpu::sum_spread));
  for (int64_t b = 0; b < B; ++b) sum_spread(args, b);
  return pool;
}

struct Scores {
  Tensor top1, confidence, margin, score;
};

Scores gate_scores(const Tensor& embedding, const Tensor& classes, double logit_scale,
                   const Tensor& gate, const Tensor& variance) {
  const int64_t B = embedding.size(0), K = classes.size(0);
  const Tensor class_rows = classes.contiguous(), gate_row = gate.contiguous();
  const Tensor length = Tensor::empty({B}, kFloat32);
  Scores scores{.top1 = Tensor::empty({B}, kInt64),
                .confidence = Tensor::empty({B}, kFloat32),
                .margin = Tensor::empty({B}, kFloat32),
                .score = Tensor::empty({B}, kFloat32)};
  const int64_t chunks = (K + cpu::kClassChunk - 1) / cpu::kClassChunk;
  std::vector<cpu::ClassPart> parts(static_cast<size_t>(chunks * B));
  const cpu::ClassScoresArgs args{
      .embedding = embedding.const_data_ptr<float>(),
      .classes = class_rows.const_data_ptr(),
      .class_type = float_type(classes.dtype(), "exit_probe", "classes"),
      .B = B,
      .E = classes.size(1),
      .K = K,
      .logit_scale = static_cast<float>(logit_scale),
      .gate = gate_row.const_data_ptr<float>(),
      .variance = variance.const_data_ptr<float>(),
      .length = length.mutable_data_ptr<float>(),
      .parts = parts.data(),
      .top1 = scores.top1.mutable_data_ptr<int64_t>(),
      .confidence = scores.confidence.mutable_data_ptr<float>(),
      .margin = scores.margin.mutable_data_ptr<float>(),
      .score = scores.score.mutable_data_ptr<float>()};
  auto* const length_of = by_level<cpu::EmbeddingLength>(LRAEE_THREE_LEVELS(cpu::embedding_length));
  auto* const score_chunk = by_level<cpu::ClassScores>(LRAEE_THREE_LEVELS(cpu::class_scores));
  auto* const gate_score = by_level<cpu::GateScore>(LRAEE_THREE_LEVELS(cpu::gate_score));
  for (int64_t b = 0; b < B; ++b) length_of(args, b);
  const int64_t grain = pieces_per_task(kProductsPerTask, cpu::kClassChunk * args.E * B);
  parallel_for(0, B == 0 ? 0 : chunks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) score_chunk(args, chunk);
  });
  for (int64_t b = 0; b < B; ++b) gate_score(args, b);
  return scores;
}

void check(const Tensor& z, const Tensor& gamma, const Tensor& w1_scale, const OptionalTensor& w2,
           const OptionalTensor& w2_scale, const Tensor& classes, const Tensor& gate) {
  LRAEE_CHECK_VALUE(z.dim() == 3 && z.size(1) >= 2,
                    "exit_probe: z must have shape [B, L >= 2, D], got ", z.sizes());
  const int64_t D = z.size(2), P = gamma.numel();
  LRAEE_CHECK_VALUE(gamma.dim() == 1 && (P == D || P == 2 * D),
                    "exit_probe: gamma must have shape [D] or [2 D] = [", D, "] or [", 2 * D,
                    "], got ", gamma.sizes());
  const int64_t E = w2.has_value() && w2_scale.has_value() ? w2_scale->numel() : w1_scale.numel();
  LRAEE_CHECK_VALUE(classes.dim() == 2 && classes.size(0) >= 1 && classes.size(1) == E,
                    "exit_probe: classes must have shape [K >= 1, E] with E = ", E, ", got ",
                    classes.sizes());
  LRAEE_CHECK_VALUE(gate.numel() == 4, "exit_probe: gate must have shape [4], got ", gate.sizes());
  LRAEE_CHECK_TYPE(gate.dtype() == kFloat32, "exit_probe: gate must be float32, got ",
                   gate.dtype());
}

using Probe = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Probe exit_probe(const Tensor& z, const Tensor& gamma, const Tensor& beta, double eps,
                 const Tensor& w1, const Tensor& w1_scale, const Tensor& w1_sum,
                 const OptionalTensor& b1, const OptionalTensor& w2, const OptionalTensor& w2_scale,
                 const OptionalTensor& w2_sum, const OptionalTensor& b2, const Tensor& classes,
                 double logit_scale, const Tensor& gate) {
  check(z, gamma, w1_scale, w2, w2_scale, classes, gate);
  Pool pool = pool_tokens(z, gamma.numel());
  const auto [x_q, x_scale, x_zero] =
      layer_norm_quantize(pool.row, gamma, beta.borrowed(), eps, false);
  Tensor embedding =
      int8_linear(x_q, x_scale, x_zero.borrowed(), w1, w1_scale, w1_sum, b1, std::nullopt,
                  std::nullopt, w2.has_value() ? "gelu" : "none", kFloat32);
  if (w2.has_value()) {
    const auto [h_q, h_scale, h_zero] = quantize_rows(embedding, false);
    embedding = int8_linear(h_q, h_scale, h_zero.borrowed(), *w2, w2_scale.value(), w2_sum.value(),
                            b2, std::nullopt, std::nullopt, "none", kFloat32);
  }
  Scores scores = gate_scores(embedding, classes, logit_scale, gate, pool.variance);
  return {std::move(embedding),     std::move(scores.top1),   std::move(scores.confidence),
          std::move(scores.margin), std::move(pool.variance), std::move(scores.score)};
}

const CpuOperators operators{LRAEE_OPERATOR(exit_probe)};

}  // namespace
}  // namespace lraee
