#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cpu/types.h"
#include "tensor.h"

namespace lraee {

// The level that kernels run at: the highest available, or the one forced by LRAEE_ISA or set_isa.
// Raises ValueError if LRAEE_ISA names no level or one that this machine lacks: a silent fallback
// would only be slow.
cpu::Isa active_isa();

// Forces a level by name; "" goes back to the level chosen at start. For tests and benchmarks.
void set_isa(const std::string& name);

std::vector<std::string> isa_levels();

// Memory of one thread, aligned to 64 bytes and kept for the life of the thread: fresh memory would
// cost page faults on every call.
class ThreadScratch {
 public:
  void* at_least(int64_t bytes);

 private:
  struct Free {
    void operator()(void* memory) const;
  };
  std::unique_ptr<void, Free> memory_;
  int64_t capacity_ = 0;
};

// float32, bfloat16 and float16 as the kernels know them; op and argument name the culprit
// otherwise.
cpu::FloatType float_type(Dtype dtype, const char* op, const char* argument);

}  // namespace lraee
