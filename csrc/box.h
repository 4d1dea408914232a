#pragma once

// An operator's C++ function as the dispatcher of torch's stable ABI calls it: with a stack of
// 64-bit values, whose memory it is given. What stands in them is written in
// torch/csrc/stable/stableivalue_conversions.h, target version 2.10.

#include <array>
#include <cstring>
#include <initializer_list>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "tensor.h"

namespace lraee {

// From a value of the stack to an argument, and from a result to a value.
template <class T>
struct Boxed {
  static_assert(std::is_arithmetic_v<T> || std::is_same_v<T, Dtype> || std::is_pointer_v<T>);
  static T from(StableIValue value) {
    T result;
    std::memcpy(&result, &value, sizeof result);
    return result;
  }
  static StableIValue to(T result) {
    StableIValue value = 0;
    std::memcpy(&value, &result, sizeof result);
    return value;
  }
};

template <>
struct Boxed<Tensor> {
  static Tensor from(StableIValue value) { return Tensor(Boxed<AtenTensorHandle>::from(value)); }
  static StableIValue to(Tensor&& result) {
    return Boxed<AtenTensorHandle>::to(std::move(result).release());
  }
};

template <>
struct Boxed<std::string> {
  static std::string from(StableIValue value) {
    auto* const handle = Boxed<StringHandle>::from(value);
    const char* data = nullptr;
    size_t length = 0;
    succeed(torch_string_c_str(handle, &data));
    succeed(torch_string_length(handle, &length));
    std::string result(data, length);
    succeed(torch_delete_string(handle));
    return result;
  }
};

template <class T>
struct Boxed<std::optional<T>> {
  static std::optional<T> from(StableIValue value) {
    auto* const inner = Boxed<StableIValue*>::from(value);
    if (inner == nullptr) return std::nullopt;
    std::optional<T> result(Boxed<T>::from(*inner));
    delete inner;
    return result;
  }
};

template <class T>
struct Boxed<std::vector<T>> {
  static std::vector<T> from(StableIValue value) {
    auto* const list = Boxed<StableListHandle>::from(value);
    size_t size = 0;
    succeed(torch_list_size(list, &size));
    std::vector<T> result;
    result.reserve(size);
    for (size_t i = 0; i < size; ++i) {
      StableIValue item = 0;
      succeed(torch_list_get_item(list, i, &item));
      result.push_back(Boxed<T>::from(item));
    }
    succeed(torch_delete_list(list));
    return result;
  }
};

// Elements of a tuple; 0 of any other type.
template <class T>
inline constexpr size_t kTupleSize = 0;
template <class... T>
inline constexpr size_t kTupleSize<std::tuple<T...>> = sizeof...(T);

template <auto* kFunction>
struct BoxedFunction;

template <class Result, class... Parameters, Result (*kFunction)(Parameters...)>
struct BoxedFunction<kFunction> {
  // What holds an argument while the function runs.
  template <class T>
  using Held =
      std::conditional_t<std::is_same_v<T, std::string_view>, std::string, std::remove_cvref_t<T>>;
  static constexpr size_t kNumResults = std::max<size_t>(1, kTupleSize<Result>);

  static void call(StableIValue* stack, uint64_t num_arguments, uint64_t num_results) {
    if (num_arguments != sizeof...(Parameters) || num_results != kNumResults) {
      throw std::runtime_error(text("lraee: the schema must have ",
                                    static_cast<int64_t>(sizeof...(Parameters)), " arguments and ",
                                    static_cast<int64_t>(kNumResults), " results"));
    }
    call(stack, std::index_sequence_for<Parameters...>());
  }

 private:
  template <size_t... I>
  static void call(StableIValue* stack, std::index_sequence<I...>) {
    const std::tuple<Held<Parameters>...> arguments{Boxed<Held<Parameters>>::from(stack[I])...};
    Result results = std::apply(kFunction, arguments);
    if constexpr (kTupleSize<Result> != 0) {
      std::apply(
          [&](auto&... result) {
            size_t i = 0;
            ((stack[i++] = Boxed<std::remove_cvref_t<decltype(result)>>::to(std::move(result))),
             ...);
          },
          results);
    } else {
      stack[0] = Boxed<Result>::to(std::move(results));
    }
  }
};

// Registers implementations of torch.ops.lraee.* for CPU tensors, while it lives.
class CpuOperators {
 public:
  struct Entry {
    const char* name;
    void (*call)(StableIValue*, uint64_t, uint64_t);
  };
  // Schemas are defined in lraee/ops/registry.py,
  CpuOperators(std::initializer_list<Entry> entries) {
    succeed(aoti_torch_library_init_impl("lraee", "CPU", __FILE__, __LINE__, &library_));
    for (const auto& [name, call] : entries) {
      succeed(torch_library_impl(library_, name, call, TORCH_ABI_VERSION));
    }
  }
  // or here.
  CpuOperators(const char* schema, Entry entry) : CpuOperators({entry}) {
    succeed(aoti_torch_library_init_fragment("lraee", __FILE__, __LINE__, &fragment_));
    succeed(aoti_torch_library_def(fragment_, schema));
  }
  CpuOperators(const CpuOperators&) = delete;
  CpuOperators& operator=(const CpuOperators&) = delete;
  ~CpuOperators() {
    aoti_torch_delete_library_object(library_);
    if (fragment_ != nullptr) aoti_torch_delete_library_object(fragment_);
  }

 private:
  TorchLibraryHandle library_ = nullptr, fragment_ = nullptr;
};

#define LRAEE_OPERATOR(name) {#name, &::lraee::BoxedFunction<&name>::call}

}  // namespace lraee
