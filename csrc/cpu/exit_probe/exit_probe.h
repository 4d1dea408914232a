#pragma once

#include <cstdint>

#include "cpu/types.h"

namespace lraee::cpu {

struct PoolPatchesArgs {
  const void* z;  // [B, L, D], the values of a token side by side, the class token first
  int64_t stride_b, stride_l;
  FloatType type;
  int64_t L, D, P;  // P = D, or 2 D where the class token stands behind the mean
  float* pooled;    // [B, P]
  float* spread;    // [B, D] variance of each channel over the patches
  float* variance;  // [B] its sum
};

// Mean, spread and, for P = 2 D, class token of channels c_begin..c_end - 1 of one image, each
// value of z read once.
using PoolPatches = void(const PoolPatchesArgs& args, int64_t b, int64_t c_begin, int64_t c_end);
PoolPatches pool_patches_scalar, pool_patches_avx2, pool_patches_avx512_vnni;

// The variance of one image from its spread.
using SumSpread = void(const PoolPatchesArgs& args, int64_t b);
SumSpread sum_spread_scalar, sum_spread_avx2, sum_spread_avx512_vnni;

// What one chunk of classes says of one image.
struct ClassPart {
  float best, second;  // logits; best is NaN if one of the chunk is
  float sum;           // of exp(logit - best)
  int64_t top1;
};

struct ClassScoresArgs {
  const float* embedding;  // [B, E]
  const void* classes;     // [K, E]
  FloatType class_type;
  int64_t B, E, K;
  float logit_scale;
  const float* gate;      // [4]
  const float* variance;  // [B]
  float* length;          // [B]
  ClassPart* parts;       // [ceil(K / kClassChunk)][B]
  int64_t* top1;          // [B], and so are the rest
  float* confidence;
  float* margin;
  float* score;
};

// Classes that are judged together. The sums of a chunk, and the order of chunks, do not depend on
// threads.
inline constexpr int64_t kClassChunk = 64;

// Length of the embedding of one image.
using EmbeddingLength = void(const ClassScoresArgs& args, int64_t b);
EmbeddingLength embedding_length_scalar, embedding_length_avx2, embedding_length_avx512_vnni;

// Parts of one chunk of classes, for all images.
using ClassScores = void(const ClassScoresArgs& args, int64_t chunk);
ClassScores class_scores_scalar, class_scores_avx2, class_scores_avx512_vnni;

// top1, confidence, margin and score of one image from its parts.
using GateScore = void(const ClassScoresArgs& args, int64_t b);
GateScore gate_score_scalar, gate_score_avx2, gate_score_avx512_vnni;

}  // namespace lraee::cpu
