#pragma once

#include "cpu/int8_attention/fixed_point.h"
#include "cpu/int8_attention/scores.h"
#include "cpu/numerics/exp.h"
#include "cpu/numerics/quantizer.h"

// One head: K and V are brought into the scratch once, then blocks of queries go through scores,
// softmax and P V. Keys that are rotated, or of which some are masked, are first copied in float32,
// the valid ones side by side in the order of tokens: all that follows is computed as if there were
// no others, so a masked token changes no bit of the rest.

namespace lraee::cpu {
namespace {

// 16 values of d are the unit of a tile of P V: at most 24 of 32 registers, or 12 of 16, hold sums.
constexpr int kTileUnits = kWidth == 16 ? 4 : 1;
constexpr int kMeanVectors = kWidth == 1 ? 1 : 4;  // sums side by side

// The mean of K over tokens, added in the order of tokens.
template <class T>
LRAEE_INLINE void mean_of_keys(int64_t d, const T* k, int64_t stride, AttentionScratch& s) {
  for (int64_t c = 0; c < s.d_pad; ++c) s.k_mean[c] = 0.0f;
  const Vf size = set1(static_cast<float>(s.L));
  int64_t c = 0;
  for (; c + kMeanVectors * kWidth <= d; c += kMeanVectors * kWidth) {
    Vf sum[kMeanVectors];
    for (Vf& lane : sum) lane = set1(0.0f);
    for (int64_t l = 0; l < s.L; ++l) {
#pragma GCC unroll 8
      for (int v = 0; v < kMeanVectors; ++v) {
        sum[v] = sum[v] + load(k + l * stride + c + v * kWidth);
      }
    }
    for (int v = 0; v < kMeanVectors; ++v) store(s.k_mean + c + v * kWidth, sum[v] / size);
  }
  for_vectors(d - c, [&](int64_t left, int n, int) LRAEE_INLINE_LAMBDA {
    Vf sum = set1(0.0f);
    for (int64_t l = 0; l < s.L; ++l) {
      sum = sum + load_first(k + l * stride + c + left, n);
    }
    store_first(s.k_mean + c + left, sum / size, n);
  });
}

// Key l, centred on the mean and quantized, goes to its place in the panels.
template <class T>
LRAEE_INLINE void pack_key(int64_t d, const T* k, int64_t l, AttentionScratch& s) {
  // Zeros behind d move no scale, and are 0 in the panels.
  for_vectors(d, [&](int64_t c, int n, int) LRAEE_INLINE_LAMBDA {
    store(s.row + c, load_first(k + c, n) - load(s.k_mean + c));
  });
  s.k_scale[l] = quantize_row<true>(s.row, round_up(d, kWidth), s.row_q).scale;
  int8_t* const panel = s.k_q + l / kKeysPerPanel * s.groups * kKeysPerPanel * 4;
  for (int64_t g = 0; g < s.groups; ++g) {
    std::memcpy(panel + (g * kKeysPerPanel + l % kKeysPerPanel) * 4, s.row_q + g * 4, 4);
  }
}

// kLeftOffset times the sum of each key, see [NOTE: u8s8 compensation]: the product with a query of
// nothing but the offset.
LRAEE_INLINE void offsets_of_keys(AttentionScratch& s) {
  int8_t bytes[4];
  std::memset(bytes, kLeftOffset, sizeof(bytes));
  const Left offset = load_left(bytes);
  for (int64_t panel = 0; panel < s.L_pad; panel += kKeysPerPanel) {
    const int8_t* const lines = s.k_q + panel * s.groups * 4;
#pragma GCC unroll 16
    for (int v = 0; v < kPanelVectors; ++v) {
      Vi sum = set1(0);
      for (int64_t g = 0; g < s.groups; ++g) {
        sum = dot4(sum, offset, load_right(lines + g * kKeysPerPanel * 4 + v * kWidth * 4));
      }
      store(s.k_offset + panel + v * kWidth, sum);
    }
  }
}

// y = x * cos + (-x2, x1) * sin for a row x = (x1, x2) of two halves, each step rounded.
template <class T>
LRAEE_INLINE void rotate(const T* x, const float* cos, const float* sin, int64_t d, float* y) {
  const int64_t half = d / 2;
  for_vectors(half, [&](int64_t c, int n, int) LRAEE_INLINE_LAMBDA {
    const Vf x1 = load_first(x + c, n), x2 = load_first(x + half + c, n);
    store_first(y + c, x1 * load_first(cos + c, n) - x2 * load_first(sin + c, n), n);
    store_first(y + half + c,
                x2 * load_first(cos + half + c, n) + x1 * load_first(sin + half + c, n), n);
  });
}

// The query or key of a token in float32, rotated where it is to be. y has room for whole vectors:
// what is not rotated fills the last one with zeros. A masked load of the last values takes 200
// cycles on Zen 5; the values behind them, of the next head or of the keys or values, may be read.
template <class T>
LRAEE_INLINE void copy_row(const Int8AttentionArgs& args, const T* x, int64_t token, float* y) {
  const bool has_more = args.H * args.d >= kWidth;
  if (args.cos != nullptr && token >= args.prefix) {
    const int64_t at = (token - args.prefix) * args.d;
    rotate(x, args.cos + at, args.sin + at, args.d, y);
  } else {
    for_vectors(args.d, [&](int64_t c, int n, int) LRAEE_INLINE_LAMBDA {
      store(y + c, has_more ? keep_first(load(x + c), n) : load_first(x + c, n));
    });
  }
}

template <class T>
LRAEE_INLINE void pack_value(int64_t d, const T* v, int64_t l, AttentionScratch& s) {
  float* const row = s.v + l * s.d_pad;
  for (int64_t c = d / 16 * 16; c < s.d_pad; ++c) row[c] = 0.0f;
  for_vectors(
      d, [&](int64_t c, int n, int) LRAEE_INLINE_LAMBDA { store(row + c, load_first(v + c, n)); });
}

// k: the keys, one at each stride.
template <class T>
LRAEE_INLINE void pack_keys(int64_t d, const T* k, int64_t stride, AttentionScratch& s) {
  mean_of_keys(d, k, stride, s);
  std::memset(s.row_q, 0, static_cast<size_t>(s.d_pad));
  const int64_t last_panel = s.L_pad - kKeysPerPanel;
  std::memset(s.k_q + last_panel * s.groups * 4, 0,
              static_cast<size_t>(kKeysPerPanel * s.groups * 4));
  std::fill(s.k_scale + last_panel, s.k_scale + s.L_pad, 0.0f);
  for (int64_t l = 0; l < s.L; ++l) pack_key(d, k + l * stride, l, s);
  offsets_of_keys(s);
}

template <class T>
void pack_keys_and_values(const Int8AttentionArgs& args, const T* k, const T* v,
                          AttentionScratch& s) {
  const bool is_copied = args.copies_keys();
  const auto value = [&](int64_t l) LRAEE_INLINE_LAMBDA {
    return v + (is_copied ? s.tokens[l] : l) * args.stride_l;
  };
  if (is_copied) {
    for (int64_t l = 0; l < s.L; ++l) {
      const int64_t token = s.tokens[l];
      copy_row(args, k + token * args.stride_l, token, s.k_rows + l * s.d_pad);
    }
    pack_keys<float>(args.d, s.k_rows, s.d_pad, s);
  } else {
    pack_keys(args.d, k, args.stride_l, s);
  }
  if (is_fixed_point(s.L)) {
    pack_fixed_values<T>(args.d, value, s);
  } else {
    for (int64_t l = 0; l < s.L; ++l) pack_value(args.d, value(l), l, s);
  }
}

// x: row i of the block of queries, K values of it, whole vectors. What is written behind the
// groups of the row is the start of the next one, which comes later.
template <class T>
LRAEE_INLINE void pack_query_row(const Int8AttentionArgs& args, const T* x, int64_t K, int64_t i,
                                 AttentionScratch& s) {
  const Quantization quantization = quantization_of_row<true>(x, K);
  write_quantized<true>(x, K, quantization, s.q_q + i * s.groups * 4);
  s.q_scale[i] = quantization.scale * args.root;
}

template <class T>
LRAEE_INLINE void pack_query(const Int8AttentionArgs& args, const T* q, int64_t token, int64_t i,
                             AttentionScratch& s) {
  if (args.cos == nullptr && args.d % kWidth == 0) return pack_query_row(args, q, args.d, i, s);
  copy_row(args, q, token, s.q_row);
  pack_query_row<float>(args, s.q_row, round_up(args.d, kWidth), i, s);
}

// p as the type of qkv holds it. No NaN with a payload comes here: those of Quantization and of
// the processor are plain.
LRAEE_INLINE Vf rounded_as(Vf p, const float*) { return p; }
LRAEE_INLINE Vf rounded_as(Vf p, const Bf16*) {
  const Vi odd = shift_right<16>(bits(p)) & set1(1);
  return from_bits((bits(p) + odd + set1(0x7FFF)) & set1(static_cast<int32_t>(0xFFFF0000)));
}
LRAEE_INLINE Vf rounded_as(Vf p, const F16*) {
  F16 half[kWidth];
  store(half, p);
  return load(half);
}

// row[j] = -inf for j >= visible, in whole vectors: what follows reads vectors, and would wait for
// narrower stores.
LRAEE_INLINE void hide_from(float* row, int64_t visible, int64_t L_pad) {
  const Vf hidden = set1(-std::numeric_limits<float>::infinity());
  int64_t j = visible / kWidth * kWidth;
  if (j < visible) {
    const Vf limit = set1(static_cast<float>(visible - j));
    store(row + j, select_lt(first_lanes(), limit, load(row + j), hidden));
    j += kWidth;
  }
  for (; j < L_pad; j += kWidth) store(row + j, hidden);
}

// Logits of a row -> exp(logit - largest), of which the first `visible` are not 0, and their sum.
LRAEE_INLINE float exp_row(float* row, int64_t visible, int64_t L_pad) {
  hide_from(row, visible, L_pad);
  Vf best[4];
  for (Vf& slot : best) slot = set1(-std::numeric_limits<float>::infinity());
  for_vectors(L_pad, [&](int64_t j, int, int slot)
                         LRAEE_INLINE_LAMBDA { best[slot] = max(best[slot], load(row + j)); });
  const Vf most = set1(max_of(max(max(best[0], best[1]), max(best[2], best[3]))));
  return lane_sum(L_pad, [&](int64_t j, int) LRAEE_INLINE_LAMBDA {
    const Vf e = exp_nonpositive(load(row + j) - most);
    store(row + j, e);
    return e;
  });
}

// Logits of row i of the block -> P, of which the first `visible` are not 0.
template <class T>
LRAEE_INLINE void softmax_row(int64_t i, int64_t visible, AttentionScratch& s) {
  float* const row = s.score + i * s.L_pad;
  // A query without keys gets 0.
  if (visible == 0) std::fill(row, row + s.L_pad, 0.0f);
  const float sum = visible == 0 ? 1.0f : exp_row(row, visible, s.L_pad);
  if (is_fixed_point(s.L)) return store_fixed_row(row, sum, i, s);
  const Vf share = set1(1.0f / sum);
  for_vectors(s.L_pad, [&](int64_t j, int, int) LRAEE_INLINE_LAMBDA {
    store(row + j, rounded_as(load(row + j) * share, static_cast<const T*>(nullptr)));
  });
}

// y[q, c..] = sum over j of P[q, j] V[j, c..], keys in order; kUnits * 16 values of d.
template <int kQueries, int kUnits, class T>
void value_tile(const Int8AttentionArgs& args, const AttentionScratch& s, int64_t query, int64_t c,
                T* y) {
  constexpr int kVectors = kUnits * kPanelVectors;
  Vf acc[kQueries][kVectors];
#pragma GCC unroll 8
  for (int q = 0; q < kQueries; ++q) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) acc[q][v] = set1(0.0f);
  }
  const float* p = s.score + query * s.L_pad;
  const float* v_row = s.v + c;
  for (int64_t j = 0; j < s.L; ++j, ++p, v_row += s.d_pad) {
    Vf value[kVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) value[v] = load(v_row + v * kWidth);
#pragma GCC unroll 8
    for (int q = 0; q < kQueries; ++q) {
      const Vf weight = set1(p[q * s.L_pad]);
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) acc[q][v] = fma(weight, value[v], acc[q][v]);
    }
  }
#pragma GCC unroll 8
  for (int q = 0; q < kQueries; ++q) {
    T* const row = y + q * args.H * args.d + c;
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      const int64_t left = args.d - c - v * kWidth;
      if (left >= kWidth) {
        store(row + v * kWidth, acc[q][v]);
      } else if (left > 0) {
        store_first(row + v * kWidth, acc[q][v], static_cast<int>(left));
      }
    }
  }
}

// y: where query 0 of the block goes.
template <class T>
LRAEE_INLINE void value_block(const Int8AttentionArgs& args, const AttentionScratch& s,
                              int64_t queries, T* y) {
  for (int64_t query = 0; query < queries; query += kTileQueries) {
    with_count<kTileQueries>(queries - query, [&]<int kQueries>() {
      T* const rows = y + query * args.H * args.d;
      int64_t tiles = (s.d_pad / 16 + kTileUnits - 1) / kTileUnits;  // of nearly equal width
      for (int64_t c = 0; c < s.d_pad; --tiles) {
        const int64_t units = ((s.d_pad - c) / 16 + tiles - 1) / tiles;
        with_count<kTileUnits>(units, [&]<int kUnits>() {
          if (is_fixed_point(s.L)) {
            fixed_value_tile<kQueries, kUnits>(args, s, query, c, rows);
          } else {
            value_tile<kQueries, kUnits>(args, s, query, c, rows);
          }
        });
        c += units * 16;
      }
    });
  }
}

template <class T>
void int8_attention_of(const Int8AttentionArgs& args, const Int8AttentionPart& part,
                       AttentionScratch& s) {
  const int64_t D = args.H * args.d;
  const T* const q = static_cast<const T*>(args.qkv) + part.b * args.stride_b + part.h * args.d;
  T* const y = static_cast<T*>(args.y) + part.b * args.y_stride + part.h * args.d;
  pack_keys_and_values(args, q + D, q + 2 * D, s);
  std::fill(s.q_row, s.q_row + s.d_pad, 0.0f);
  int64_t visible = 0;  // keys that the query sees, where it does not see all
  const auto sees = [&](int64_t token) {
    if (!args.is_causal) return s.L;
    if (args.key_mask == nullptr) return token + 1;
    while (visible < s.L && s.tokens[visible] <= token) ++visible;
    return visible;
  };
  // Blocks of nearly equal height: the last one is not left with a single query.
  int64_t blocks = (part.i_end - part.i_begin + kQueryBlock - 1) / kQueryBlock;
  for (int64_t i = part.i_begin; i < part.i_end; --blocks) {
    const int64_t queries = (part.i_end - i + blocks - 1) / blocks;
    for (int64_t n = 0; n < queries; ++n)
      pack_query(args, q + (i + n) * args.stride_l, i + n, n, s);
    score_block(s, queries);
    for (int64_t n = 0; n < queries; ++n) softmax_row<T>(n, sees(i + n), s);
    value_block(args, s, queries, y + i * D);
    i += queries;
  }
}

// Lists the keys of image b in s.tokens; returns how many there are.
inline int64_t list_keys(const Int8AttentionArgs& args, int64_t b, int32_t* tokens) {
  int64_t count = 0;
  for (int64_t l = 0; l < args.L; ++l) {
    if (args.key_mask == nullptr || args.key_mask[b * args.L + l]) {
      tokens[count++] = static_cast<int32_t>(l);
    }
  }
  return count;
}

// All of an image's tokens masked: every query sees no key.
template <class T>
void fill_zero(const Int8AttentionArgs& args, const Int8AttentionPart& part, T* y) {
  for (int64_t i = part.i_begin; i < part.i_end; ++i) {
    for_vectors(args.d, [&](int64_t c, int n, int) LRAEE_INLINE_LAMBDA {
      store_first(y + i * args.H * args.d + c, set1(0.0f), n);
    });
  }
}

inline void int8_attention_at_level(const Int8AttentionArgs& args, const Int8AttentionPart& part,
                                    void* scratch) {
  AttentionScratch s(scratch, args.L, args.d, args.copies_keys());
  if (args.copies_keys()) s.L = list_keys(args, part.b, s.tokens);
  with_type(args.type, [&]<class T>(const T*) {
    if (s.L == 0) {
      fill_zero(args, part, static_cast<T*>(args.y) + part.b * args.y_stride + part.h * args.d);
      return;
    }
    s.L_pad = round_up(s.L, kKeysPerPanel);
    int8_attention_of<T>(args, part, s);
  });
}

}  // namespace
}  // namespace lraee::cpu
