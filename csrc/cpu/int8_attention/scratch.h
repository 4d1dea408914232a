#pragma once

#include <cstdint>

namespace lraee::cpu {

// One 512-bit line holds a group of 4 values of 16 keys.
inline constexpr int64_t kKeysPerPanel = 16;
// Queries that share a block of scores.
inline constexpr int64_t kQueryBlock = 12;

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
  int8_t* q_q;        // [kQueryBlock][4 groups]
  float* q_scale;     // [kQueryBlock]
  float* score;       // [kQueryBlock][L_pad]
  float* k_rows;      // [L][d_pad] keys in float32, where they are rotated or masked
  int32_t* tokens;    // [L] the token of each key
  float* q_row;       // [d_pad]
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
    take(q_q, kQueryBlock * groups * 4);
    take(q_scale, kQueryBlock);
    take(score, kQueryBlock * L_pad);
    take(k_rows, copies_keys ? L * d_pad : 0);
    take(tokens, copies_keys ? L : 0);
    take(q_row, d_pad);
  }
};

// Bytes of scratch that one call needs, aligned to 64: K, V and a block of scores of one head.
inline int64_t int8_attention_scratch_bytes(int64_t L, int64_t d, bool copies_keys) {
  return AttentionScratch(nullptr, L, d, copies_keys).size_bytes;
}

}  // namespace lraee::cpu
