#pragma once

#include <cstdint>

namespace lraee::cpu {

// One 512-bit line holds a group of 4 values of 16 keys.
inline constexpr int64_t kKeysPerPanel = 16;
// Queries that share a block of scores.
inline constexpr int64_t kQueryBlock = 12;

// Above so many keys P V runs in fixed point: int16 products, int32 sums, twice the products of a
// float32 multiply-add. Shorter rows keep the bits that they have always had.
inline constexpr int64_t kFloatKeys = 512;
inline constexpr int64_t kFixedPointKeys = 32768;  // beyond, sums might overflow
// The largest weight of a row of P, the largest sum of one, and the largest value of a channel of
// V: |sum_j p_q v_q| <= (kLargestSum * 1.0001 + L / 2) * kLargestValue < 2^31.
inline constexpr int32_t kLargestWeight = 32767, kLargestSum = 507904, kLargestValue = 4095;

inline bool is_fixed_point(int64_t keys) { return keys > kFloatKeys && keys <= kFixedPointKeys; }

inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Where each array of one head lies in the scratch. With L = 257 and d = 64 it takes 102 KB: it
// stays in L2.
struct AttentionScratch {
  int64_t L;  // keys
  int64_t L_pad, d_pad, groups;
  int8_t* k_q;        // [L_pad / 16][groups][16][4], zero padded
  int32_t* k_offset;  // [L_pad] kLeftOffset * sum of k_q
  float* k_scale;     // [L_pad]
  float* v;           // [L][d_pad], zero padded
  float* k_mean;      // [d_pad]
  float* row;         // [d_pad]
  int8_t* row_q;      // [d_pad]
  int8_t* q_q;        // [kQueryBlock][4 groups], and the rest of a vector
  float* q_scale;     // [kQueryBlock]
  float* score;       // [kQueryBlock][L_pad]
  float* k_rows;      // [L][d_pad] keys in float32, where they are rotated or masked
  int32_t* tokens;    // [L] the token of each key
  float* q_row;       // [d_pad]
  int16_t* v_q;       // [L / 2, rounded up][d_pad][2] values of two tokens side by side
  float* v_scale;     // [d_pad] of each channel
  int16_t* p_q;       // [kQueryBlock][L_pad]
  float* p_scale;     // [kQueryBlock]
  int64_t size_bytes;

  AttentionScratch(void* base, int64_t L, int64_t d, bool copies_keys)
      : L(L), L_pad(round_up(L, kKeysPerPanel)), d_pad(round_up(d, 16)), groups((d + 3) / 4) {
    const auto start = reinterpret_cast<uintptr_t>(base);
    size_bytes = 0;
    const auto take = [&]<class T>(T*& array, int64_t count) {
      array = reinterpret_cast<T*>(start + size_bytes);
      size_bytes += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    };
    take(k_q, L_pad * groups * 4);
    take(k_offset, L_pad);
    take(k_scale, L_pad);
    take(v, L * d_pad);
    take(k_mean, d_pad);
    take(row, d_pad);
    take(row_q, d_pad);
    take(q_q, kQueryBlock * groups * 4 + 16);
    take(q_scale, kQueryBlock);
    take(score, kQueryBlock * L_pad);
    take(k_rows, copies_keys ? L * d_pad : 0);
    take(tokens, copies_keys ? L : 0);
    take(q_row, d_pad);
    const int64_t fixed = L > kFloatKeys ? 1 : 0;  // of the keys some may be masked
    take(v_q, fixed * round_up(L, 2) * d_pad);
    take(v_scale, fixed * d_pad);
    take(p_q, fixed * kQueryBlock * L_pad);
    take(p_scale, fixed * kQueryBlock);
  }
};

// Bytes of scratch that one call needs, aligned to 64: K, V and a block of scores of one head.
inline int64_t int8_attention_scratch_bytes(int64_t L, int64_t d, bool copies_keys) {
  return AttentionScratch(nullptr, L, d, copies_keys).size_bytes;
}

}  // namespace lraee::cpu
