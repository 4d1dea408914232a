#pragma once

// Level avx_vnni: 256-bit vectors and vpdpbusd in its VEX encoding (AVX-VNNI: Alder Lake, Sierra
// Forest, Zen 5 and later).

#include "cpu/simd/vectors.h"

#define LRAEE_BEGIN_AVX_VNNI \
  _Pragma("GCC push_options") _Pragma("GCC target(\"avx2,fma,f16c,avxvnni\")")
#define LRAEE_VNNI_PREFIX "%{vex%} "  // braces choose a dialect in assembly

LRAEE_BEGIN_AVX_VNNI

#include "cpu/simd/lanes8_vnni.h"

LRAEE_END_TARGET
