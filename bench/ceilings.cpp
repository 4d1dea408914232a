// Register-only loops: what the arithmetic units of one core can do when nothing else is in the
// way. Built and driven by ceilings.py.

#include <immintrin.h>
#include <time.h>

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
