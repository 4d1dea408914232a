#include "common.h"

#include <atomic>
#include <cstdlib>

namespace lraee {
namespace {

std::string available_names() {
  std::string names;
  for (const std::string& name : isa_levels()) names += (names.empty() ? "" : ", ") + name;
  return names;
}

cpu::Isa checked_isa(const char* argument, const std::string& name) {
  cpu::Isa isa = cpu::Isa::kScalar;
  LRAEE_CHECK_VALUE(cpu::isa_from_name(name.c_str(), &isa) && cpu::isa_available(isa), argument,
                    " must name a level that this machine has (", available_names(), "), got '",
                    name, "'");
  return isa;
}

cpu::Isa isa_at_start() {
  static const char* const kForced = std::getenv("LRAEE_ISA");
  return kForced == nullptr || *kForced == '\0' ? cpu::probed_isa()
                                                : checked_isa("LRAEE_ISA", kForced);
}

constexpr int kNotForced = -1;
std::atomic<int> forced_isa{kNotForced};

}  // namespace

cpu::Isa active_isa() {
  const int forced = forced_isa.load(std::memory_order_relaxed);
  if (forced != kNotForced) return static_cast<cpu::Isa>(forced);
  static const cpu::Isa at_start = isa_at_start();
  return at_start;
}

void set_isa(const std::string& name) {
  forced_isa = name.empty() ? kNotForced : static_cast<int>(checked_isa("set_isa: name", name));
}

std::vector<std::string> isa_levels() {
  std::vector<std::string> names;
  for (int level = 0; level < cpu::kNumIsaLevels; ++level) {
    const auto isa = static_cast<cpu::Isa>(level);
    if (cpu::isa_available(isa)) names.emplace_back(cpu::isa_name(isa));
  }
  return names;
}

void* ThreadScratch::at_least(int64_t bytes) {
  constexpr size_t kAlignment = 64;
  if (bytes > capacity_) {
    capacity_ = 0;
    memory_.reset(std::aligned_alloc(
        kAlignment, (static_cast<size_t>(bytes) + kAlignment - 1) / kAlignment * kAlignment));
    if (memory_ == nullptr) {
      throw std::runtime_error(text("lraee: out of memory for ", bytes, " bytes of scratch"));
    }
    capacity_ = bytes;
  }
  return memory_.get();
}

void ThreadScratch::Free::operator()(void* memory) const { std::free(memory); }

cpu::FloatType float_type(Dtype dtype, const char* op, const char* argument) {
  if (dtype == kFloat32) return cpu::FloatType::kF32;
  if (dtype == kBfloat16) return cpu::FloatType::kBf16;
  if (dtype == kFloat16) return cpu::FloatType::kF16;
  throw TypeError(text(op, ": ", argument, " must be float32, bfloat16 or float16, got ", dtype));
}

}  // namespace lraee
