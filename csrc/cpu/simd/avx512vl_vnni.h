#pragma once

// Level avx_vnni on a processor without AVX-VNNI: 256-bit vectors and vpdpbusd in its EVEX encoding
// (AVX512VL and AVX512-VNNI).

#include "cpu/simd/vectors.h"

#define LRAEE_BEGIN_AVX512VL_VNNI \
  _Pragma("GCC push_options") _Pragma("GCC target(\"avx2,fma,f16c,avx512f,avx512vl,avx512vnni\")")
#define LRAEE_VNNI_PREFIX ""

LRAEE_BEGIN_AVX512VL_VNNI

#include "cpu/simd/lanes8_vnni.h"

LRAEE_END_TARGET
