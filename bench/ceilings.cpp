// Register-only loops: what the arithmetic units of one core can do when nothing else is in the
// way. Built and driven by ceilings.py.

#include <immintrin.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <cstdint>

namespace {

double seconds(clockid_t clock) {
  timespec t;
  clock_gettime(clock, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

}  // namespace

// Sixteen independent sums: more than latency times width on any core of today. Each instruction is
// spelled, so that no compiler can fold or spill it.
#define SIXTEEN(op, r)                                                                           \
  op r "30, " r "31, " r "0\n" op r "30, " r "31, " r "1\n" op r "30, " r "31, " r "2\n" op r    \
       "30, " r "31, " r "3\n" op r "30, " r "31, " r "4\n" op r "30, " r "31, " r "5\n" op r    \
       "30, " r "31, " r "6\n" op r "30, " r "31, " r "7\n" op r "30, " r "31, " r "8\n" op r    \
       "30, " r "31, " r "9\n" op r "30, " r "31, " r "10\n" op r "30, " r "31, " r "11\n" op r  \
       "30, " r "31, " r "12\n" op r "30, " r "31, " r "13\n" op r "30, " r "31, " r "14\n" op r \
       "30, " r "31, " r "15\n"

// Giga operations (two for each multiply-add) a second of CPU time of the calling thread.
#define CEILING(name, op, r, ops)                                                               \
  extern "C" double name(int64_t rounds) {                                                      \
    const double start = seconds(CLOCK_THREAD_CPUTIME_ID);                                      \
    const int64_t total = rounds;                                                               \
    asm volatile(                                                                               \
        "vpxord %%zmm30, %%zmm30, %%zmm30\nvpxord %%zmm31, %%zmm31, %%zmm31\n1:\n" SIXTEEN(     \
            op, r) "dec %0\njnz 1b\nvzeroupper\n"                                               \
        : "+r"(rounds)::"cc", "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", \
          "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");        \
    const double elapsed = seconds(CLOCK_THREAD_CPUTIME_ID) - start;                            \
    return static_cast<double>(total) * 16 * (ops) / elapsed / 1e9;                             \
  }

CEILING(vnni512, "vpdpbusd ", "%%zmm", 128)
CEILING(vnni256, "vpdpbusd ", "%%ymm", 64)
CEILING(bf16_512, "vdpbf16ps ", "%%zmm", 64)
CEILING(fp32_512, "vfmadd231ps ", "%%zmm", 32)

#ifdef __linux__
namespace {

// Whether the operating system lets this process use tile registers.
bool may_use_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace

// Products of 16 x 64 by 64 x 16 bytes (16 x 32 by 32 x 16 bfloat16), four sums at work, as a
// kernel has them. 0 where the machine has no tiles.
#define TILE_CEILING(name, op, ops)                                                              \
  extern "C" __attribute__((target("amx-tile,amx-int8,amx-bf16"))) double name(int64_t rounds) { \
    if (!may_use_tiles()) return 0.0;                                                            \
    alignas(64) struct {                                                                         \
      uint8_t palette = 1, start_row = 0, reserved[14] = {};                                     \
      uint16_t colsb[16] = {64, 64, 64, 64, 64, 64, 64, 64};                                     \
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};                                       \
    } config;                                                                                    \
    _tile_loadconfig(&config);                                                                   \
    const double start = seconds(CLOCK_THREAD_CPUTIME_ID);                                       \
    for (int64_t i = 0; i < rounds; ++i) {                                                       \
      asm volatile(op " %%tmm6, %%tmm4, %%tmm0\n" op " %%tmm7, %%tmm4, %%tmm1\n" op              \
                      " %%tmm6, %%tmm5, %%tmm2\n" op " %%tmm7, %%tmm5, %%tmm3\n" ::);            \
    }                                                                                            \
    const double elapsed = seconds(CLOCK_THREAD_CPUTIME_ID) - start;                             \
    _tile_release();                                                                             \
    return static_cast<double>(rounds) * 4 * (ops) / elapsed / 1e9;                              \
  }

TILE_CEILING(amx_int8, "tdpbssd", 2 * 16 * 16 * 64)
TILE_CEILING(amx_bf16, "tdpbf16ps", 2 * 16 * 16 * 32)
#endif

// Giga bytes a second read from a buffer, 64 bytes at a time.
extern "C" __attribute__((target("avx512f"))) double read_bandwidth(const char* buffer,
                                                                    int64_t bytes, int64_t rounds) {
  __m512i sum = _mm512_setzero_si512();
  const double start = seconds(CLOCK_MONOTONIC);
  for (int64_t round = 0; round < rounds; ++round) {
    for (int64_t i = 0; i + 256 <= bytes; i += 256) {
      sum = _mm512_or_si512(sum, _mm512_loadu_si512(buffer + i));
      sum = _mm512_or_si512(sum, _mm512_loadu_si512(buffer + i + 64));
      sum = _mm512_or_si512(sum, _mm512_loadu_si512(buffer + i + 128));
      sum = _mm512_or_si512(sum, _mm512_loadu_si512(buffer + i + 192));
    }
  }
  const double elapsed = seconds(CLOCK_MONOTONIC) - start;
  volatile int keep = _mm512_reduce_or_epi32(sum);
  (void)keep;
  return static_cast<double>(bytes) * static_cast<double>(rounds) / elapsed / 1e9;
}

// CPU seconds of the calling thread: time lost to other processes does not count.
extern "C" double thread_seconds() { return seconds(CLOCK_THREAD_CPUTIME_ID); }
