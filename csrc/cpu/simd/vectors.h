#pragma once

// The vocabulary of vectors that all kernels are written in, so that each numeric sequence is
// written once and all levels give the same bits. A file <operator>/<isa>.cpp includes first the
// headers of its operator, then the one simd/<isa>.h of its instruction set, and after
// LRAEE_BEGIN_<ISA>, up to LRAEE_END_TARGET, what is compiled for it.
//
// A simd/<isa>.h holds the target string of its instruction set and defines, in an unnamed
// namespace (each file has its own copy, compiled for its own target):
//   kWidth                    lanes of a vector: 1, 8 or 16
//   Vf, Vi                    kWidth float32 / int32 lanes
//   load, store, set1         of float, Bf16, F16 and int32; stores to Bf16 and F16 round half to
//                             even, NaN becomes the quiet NaN 0x7FC0 of torch in Bf16
//   load_masked, store_masked, keep_masked
//                             at 16 lanes only: the first n values; zero in the lanes beyond
//   + - * /                   each rounded on its own; of int32 without the division, and wrapping
//   fma, fnma                 a * b + c and c - a * b, rounded once
//   min, max                  of the two operands the second, if one is NaN
//   abs                       clears the sign
//   select_lt(a, b, x, y)     a < b ? x : y
//   bits, from_bits           reinterpretation
//   to_f32, round_i32         half to even; round_i32 for |x| < 2^22
//   store_i8                  clamps to -128..127
//   first_lanes               {0, 1, 2, ...}
//   fold                      the lanes of a vector added in halves: lane[i] += lane[i + half]
//   Left, Right, dot4         int8 products in groups of four; see [NOTE: u8s8 compensation]
//   store_left                int8 lanes in the form that dot4 wants on its left
//   Pairs, dot2               int16 products in groups of two: exact, and wrapping sums
//   load_pairs, set_pairs     a vector of pairs; one pair in every lane
//   store_pairs               the low 16 bits of two vectors, as pairs
//   store_i16                 lanes within -32768..32767

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cpu/types.h"

#define LRAEE_INLINE inline __attribute__((always_inline))
#define LRAEE_INLINE_LAMBDA __attribute__((always_inline))

// Ends what LRAEE_BEGIN_<ISA> begins.
#define LRAEE_END_TARGET _Pragma("GCC pop_options")

// [NOTE: u8s8 compensation]
// vpdpbusd multiplies unsigned by signed bytes. At the VNNI levels a left operand x_q is therefore
// stored as u = x_q + 128 in [0, 255], and
//   sum_k u w = sum_k x_q w + 128 sum_k w,
// so 128 times the sum of each right operand, known once, is taken off again. kLeftOffset is 128
// there and 0 elsewhere. Exact in int32: sum_k u w <= 255 * 128 * K < 2^31 for K <= 65,793.
