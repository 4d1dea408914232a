#pragma once

#include "cpu/numerics/exp.h"
#include "cpu/numerics/rows.h"

namespace lraee::cpu {
namespace {

// [NOTE: one reading of the patches]
// Mean and variance come from s1 = sum (z - shift) and s2 = sum (z - shift)^2 with the first patch
// as shift:
//   mean = shift + s1 / N,   variance = (s2 - s1^2 / N) / N.
// Without the shift the squares of a large mean would cancel. Tokens are added in order; several at
// a time only so that the sums are read and written less often.
template <int kTokens, class T>
LRAEE_INLINE void add_tokens(const T* shift, const T* z, int64_t stride, int64_t count, float* s1,
                             float* s2) {
  for_vectors(count, [&](int64_t c, int n, int) LRAEE_INLINE_LAMBDA {
    const Vf base = load_first(shift + c, n);
    Vf sum = load_first(s1 + c, n), squares = load_first(s2 + c, n);
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
      const Vf difference = load_first(z + t * stride + c, n) - base;
      sum = sum + difference;
      squares = squares + difference * difference;
    }
    store_first(s1 + c, sum, n);
    store_first(s2 + c, squares, n);
  });
}

template <class T>
void pool_patches_of(const PoolPatchesArgs& args, int64_t b, int64_t c_begin, int64_t c_end) {
  constexpr int kTokens = 8;
  const int64_t count = c_end - c_begin, N = args.L - 1, stride = args.stride_l;
  const T* const class_token = static_cast<const T*>(args.z) + b * args.stride_b + c_begin;
  const T* const patches = class_token + stride;
  float* const s1 = args.pooled + b * args.P + c_begin;
  float* const s2 = args.spread + b * args.D + c_begin;
  std::fill(s1, s1 + count, 0.0f);
  std::fill(s2, s2 + count, 0.0f);
  int64_t token = 0;
  for (; token + kTokens <= N; token += kTokens) {
    add_tokens<kTokens>(patches, patches + token * stride, stride, count, s1, s2);
  }
  for (; token < N; ++token) {
    add_tokens<1>(patches, patches + token * stride, stride, count, s1, s2);
  }
  const Vf size = set1(static_cast<float>(N)), zero = set1(0.0f);
  for_vectors(count, [&](int64_t c, int n, int) LRAEE_INLINE_LAMBDA {
    const Vf sum = load_first(s1 + c, n), squares = load_first(s2 + c, n);
    store_first(s1 + c, load_first(patches + c, n) + sum / size, n);
    store_first(s2 + c, max(zero, (squares - sum * sum / size) / size), n);
  });
  if (args.P == args.D) return;
  for_vectors(count, [&](int64_t c, int n, int) LRAEE_INLINE_LAMBDA {
    store_first(s1 + args.D + c, load_first(class_token + c, n), n);
  });
}

inline void pool_patches_at_level(const PoolPatchesArgs& args, int64_t b, int64_t c_begin,
                                  int64_t c_end) {
  with_type(args.type, [&]<class T>(const T*) { pool_patches_of<T>(args, b, c_begin, c_end); });
}

inline void sum_spread_at_level(const PoolPatchesArgs& args, int64_t b) {
  const float* const spread = args.spread + b * args.D;
  args.variance[b] = lane_sum(
      args.D, [&](int64_t c, int n) LRAEE_INLINE_LAMBDA { return load_first(spread + c, n); });
}

inline void embedding_length_at_level(const ClassScoresArgs& args, int64_t b) {
  const float* const e = args.embedding + b * args.E;
  const float length = std::sqrt(lane_sum(args.E, [&](int64_t k, int n) LRAEE_INLINE_LAMBDA {
    const Vf value = load_first(e + k, n);
    return value * value;
  }));
  args.length[b] = length < 1e-12f ? 1e-12f : length;
}

// Products of kImages embeddings with one class, each in the order of lane_sum. The class is read
// once for all of them.
template <int kImages, class T>
LRAEE_INLINE void class_products(const float* e, const T* t, int64_t E, float* products) {
  Vf lanes[kImages][kGroups];
#pragma GCC unroll 4
  for (int i = 0; i < kImages; ++i) {
    for (Vf& lane : lanes[i]) lane = set1(0.0f);
  }
  const auto add = [&](int g, int64_t k, int n) LRAEE_INLINE_LAMBDA {
    const Vf value = load_first(t + k, n);
#pragma GCC unroll 4
    for (int i = 0; i < kImages; ++i) {
      lanes[i][g] = lanes[i][g] + load_first(e + i * E + k, n) * value;
    }
  };
  int64_t k = 0;
  for (; k + kLanes <= E; k += kLanes) {
#pragma GCC unroll 8
    for (int g = 0; g < kGroups; ++g) add(g, k + g * kWidth, kWidth);
  }
#pragma GCC unroll 8
  for (int g = 0; g < kGroups; ++g) {
    const int64_t left = E - k - g * kWidth;
    if (left >= kWidth) {
      add(g, k + g * kWidth, kWidth);
    } else if (left > 0) {
      add(g, k + g * kWidth, static_cast<int>(left));
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kImages; ++i) products[i] = fold_lanes(lanes[i]);
}

// Best two of the logits of a chunk, of which `count` are classes, and the sum of exponentials.
LRAEE_INLINE ClassPart part_of(float* logits, int64_t count, int64_t first) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  ClassPart part{.best = -kInfinity, .second = -kInfinity, .sum = 0.0f, .top1 = first};
  bool has_nan = false;
  for (int64_t k = 0; k < count; ++k) {
    const float logit = logits[k];
    has_nan |= std::isnan(logit);
    if (logit > part.best) {
      part.second = part.best;
      part.best = logit;
      part.top1 = first + k;
    } else if (logit > part.second) {
      part.second = logit;
    }
  }
  if (has_nan) part.best = std::numeric_limits<float>::quiet_NaN();
  std::fill(logits + count, logits + kClassChunk, -kInfinity);
  const Vf best = set1(part.best);
  part.sum = lane_sum(kClassChunk, [&](int64_t k, int) LRAEE_INLINE_LAMBDA {
    return exp_nonpositive(load(logits + k) - best);
  });
  return part;
}

template <int kImages, class T>
void class_scores_of(const ClassScoresArgs& args, int64_t chunk, int64_t b) {
  float logits[kImages][kClassChunk];
  const int64_t first = chunk * kClassChunk, count = std::min(kClassChunk, args.K - first);
  const T* const classes = static_cast<const T*>(args.classes);
  for (int64_t k = 0; k < count; ++k) {
    float products[kImages];
    class_products<kImages>(args.embedding + b * args.E, classes + (first + k) * args.E, args.E,
                            products);
    for (int i = 0; i < kImages; ++i) {
      logits[i][k] = products[i] / args.length[b + i] * args.logit_scale;
    }
  }
  for (int i = 0; i < kImages; ++i) {
    args.parts[chunk * args.B + b + i] = part_of(logits[i], count, first);
  }
}

inline void class_scores_at_level(const ClassScoresArgs& args, int64_t chunk) {
  constexpr int kImages = kWidth == 16 ? 4 : 1;  // 4 images take 16 of 32 registers
  with_type(args.class_type, [&]<class T>(const T*) {
    int64_t b = 0;
    for (; b + kImages <= args.B; b += kImages) class_scores_of<kImages, T>(args, chunk, b);
    for (; b < args.B; ++b) class_scores_of<1, T>(args, chunk, b);
  });
}

LRAEE_INLINE float exp_of(float x) {
  float lanes[kWidth];
  store(lanes, exp_nonpositive(set1(x)));
  return lanes[0];
}

// The parts of two ranges of classes, `a` the lower one, as one.
LRAEE_INLINE ClassPart merged(const ClassPart& a, const ClassPart& b) {
  if (std::isnan(a.best)) return a;
  if (std::isnan(b.best)) return b;
  if (b.best > a.best) {
    return {.best = b.best,
            .second = std::max(a.best, b.second),
            .sum = a.sum * exp_of(a.best - b.best) + b.sum,
            .top1 = b.top1};
  }
  return {.best = a.best,
          .second = std::max(b.best, a.second),
          .sum = a.sum + b.sum * exp_of(b.best - a.best),
          .top1 = a.top1};
}

inline void gate_score_at_level(const ClassScoresArgs& args, int64_t b) {
  ClassPart all = args.parts[b];
  for (int64_t chunk = 1; chunk * kClassChunk < args.K; ++chunk) {
    all = merged(all, args.parts[chunk * args.B + b]);
  }
  const float confidence = 1.0f / all.sum;
  const float margin =
      args.K == 1 ? confidence : confidence * (1.0f - exp_of(all.second - all.best));
  const float* const g = args.gate;
  float score[kWidth];
  store(score,
        sigmoid(set1(((g[0] * confidence + g[1] * margin) + g[2] * args.variance[b]) + g[3])));
  args.top1[b] = std::isnan(all.best) ? 0 : all.top1;
  args.confidence[b] = confidence;
  args.margin[b] = margin;
  args.score[b] = score[0];
}

}  // namespace
}  // namespace lraee::cpu
