#pragma once

// What every kernel file includes before its `#pragma GCC target` region. Inside the region it then
// includes one of rows_vec_scalar.h, rows_vec_avx2.h, rows_vec_avx_vnni.h, rows_vec_avx512_vnni.h
// and the <operator>_impl.h written on top of them, so that each numeric sequence is written once
// and all levels give the same bits.
//
// A rows_vec_<isa>.h defines, in an anonymous namespace (each file has its own copy, compiled for
// its own level):
//   kWidth                    lanes of a vector: 1, 8 or 16
//   Vf, Vi                  kWidth float32 / int32 lanes
//   load, store, set1         of float, Bf16Value, F16Value; the last two round half to even
//   + - * /                   each rounded on its own; fma(a, b, c) = a * b + c rounded once
//   min, max                  of the two operands the second, if one is NaN
//   select_lt(a, b, x, y)     a < b ? x : y
//   bits, from_bits           reinterpretation
//   round_i32                 half to even, |x| < 2^22
//   store_i8                  clamps to -128..127
//   store_query               int8 lanes as a query: with kQueryBias added
//   first_lanes               {0, 1, 2, ...}
//   fold                      the lanes of a vector added in halves: lane[i] += lane[i + half]
//   Quads, Query, dot4        int8 products in groups of four; see [NOTE: query bias]

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "cpu/types.h"

#define LRAEE_INLINE inline __attribute__((always_inline))
#define LRAEE_INLINE_LAMBDA __attribute__((always_inline))

namespace lraee::cpu {

struct Bf16Value {
  uint16_t bits;
};

struct F16Value {
  uint16_t bits;
};

// [NOTE: query bias]
// vpdpbusd multiplies unsigned by signed bytes. At the VNNI levels a query is therefore stored as q
// + 128 and
//   sum_c (q_c + 128) k_c = sum_c q_c k_c + 128 sum_c k_c,
// so 128 times the sum of each key, known once per key, is taken off again. kQueryBias is 128 there
// and 0 elsewhere.

}  // namespace lraee::cpu
