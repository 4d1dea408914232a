#pragma once

// Level amx: the vectors of avx512_vnni.h, and tiles of int8.

#include "cpu/simd/avx512_vnni.h"

#define LRAEE_BEGIN_AMX LRAEE_BEGIN_AVX512_VNNI _Pragma("GCC target(\"amx-tile,amx-int8\")")
