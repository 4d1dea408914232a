#pragma once

// Tensors, and torch's threads, through the C functions that libtorch keeps from version 2.10 on
// (torch/csrc/stable/c/shim.h): one build runs on every torch from then on. torch::stable::Tensor
// does the same with a shared_ptr for each tensor; a call of int8_block has 24.

#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <exception>
#include <initializer_list>
#include <optional>
#include <span>
#include <string>
#include <utility>

#include "cpu/types.h"
#include "errors.h"

namespace lraee {

// Raises RuntimeError if a function of libtorch failed. It has printed why.
void succeed(AOTITorchError code);

// A type of elements, by the number that this libtorch gives it.
struct Dtype {
  int32_t number;
  friend bool operator==(Dtype, Dtype) = default;
};
inline const Dtype kFloat32{aoti_torch_dtype_float32()}, kBfloat16{aoti_torch_dtype_bfloat16()},
    kFloat16{aoti_torch_dtype_float16()}, kInt8{aoti_torch_dtype_int8()},
    kInt32{aoti_torch_dtype_int32()}, kInt64{aoti_torch_dtype_int64()},
    kUint8{aoti_torch_dtype_uint8()}, kBool{aoti_torch_dtype_bool()};
void append(std::string& line, Dtype dtype);

template <class T>
Dtype dtype_of();
template <>
inline Dtype dtype_of<float>() {
  return kFloat32;
}
template <>
inline Dtype dtype_of<int8_t>() {
  return kInt8;
}
template <>
inline Dtype dtype_of<int32_t>() {
  return kInt32;
}
template <>
inline Dtype dtype_of<int64_t>() {
  return kInt64;
}
template <>
inline Dtype dtype_of<uint8_t>() {
  return kUint8;
}
template <>
inline Dtype dtype_of<bool>() {
  return kBool;
}

using Sizes = std::span<const int64_t>;

inline bool equal(Sizes a, std::initializer_list<int64_t> b) { return std::ranges::equal(a, b); }

// A CPU tensor of torch: owned, or borrowed from one that lives longer.
class Tensor {
 public:
  explicit Tensor(AtenTensorHandle owned) : handle_(owned), is_owned_(true) {}
  Tensor(Tensor&& other) noexcept
      : handle_(other.handle_), is_owned_(std::exchange(other.is_owned_, false)) {}
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    std::swap(is_owned_, other.is_owned_);
    return *this;
  }
  ~Tensor() {
    if (is_owned_) aoti_torch_delete_tensor_object(handle_);
  }

  static Tensor empty(Sizes sizes, Dtype dtype);
  static Tensor empty(std::initializer_list<int64_t> sizes, Dtype dtype) {
    return empty(Sizes(sizes.begin(), sizes.size()), dtype);
  }
  Tensor borrowed() const { return Tensor(handle_, false); }
  // The handle, which the caller then owns.
  AtenTensorHandle release() &&;

  int64_t dim() const { return read<int64_t>(aoti_torch_get_dim); }
  int64_t numel() const { return read<int64_t>(aoti_torch_get_numel); }
  Dtype dtype() const { return {read<int32_t>(aoti_torch_get_dtype)}; }
  int64_t element_size() const {
    return static_cast<int64_t>(aoti_torch_dtype_element_size(dtype().number));
  }
  Sizes sizes() const { return list(aoti_torch_get_sizes); }
  Sizes strides() const { return list(aoti_torch_get_strides); }
  int64_t size(int64_t i) const { return read<int64_t>(aoti_torch_get_size, i); }
  int64_t stride(int64_t i) const { return read<int64_t>(aoti_torch_get_stride, i); }
  bool is_contiguous() const { return read<bool>(aoti_torch_is_contiguous); }

  // Itself, borrowed, or a copy.
  Tensor contiguous() const;
  // Its transpose [K, N] of a matrix [N, K], in memory: a copy.
  Tensor transposed() const;

  const void* const_data_ptr() const { return read<const void*>(torch_get_const_data_ptr); }
  void* mutable_data_ptr() const { return read<void*>(torch_get_mutable_data_ptr); }
  template <class T>
  const T* const_data_ptr() const {
    require(dtype_of<T>());
    return static_cast<const T*>(const_data_ptr());
  }
  template <class T>
  T* mutable_data_ptr() const {
    require(dtype_of<T>());
    return static_cast<T*>(mutable_data_ptr());
  }

 private:
  Tensor(AtenTensorHandle handle, bool is_owned) : handle_(handle), is_owned_(is_owned) {}

  template <class T, class Function, class... Arguments>
  T read(Function* function, Arguments... arguments) const {
    T value;
    succeed(function(handle_, arguments..., &value));
    return value;
  }
  template <class Function>
  Sizes list(Function* function) const {
    return {read<int64_t*>(function), static_cast<size_t>(dim())};
  }
  void require(Dtype expected) const;
  // Its elements, one behind the other.
  Tensor copy(Sizes sizes) const;

  AtenTensorHandle handle_;
  bool is_owned_;
};

using OptionalTensor = std::optional<Tensor>;

inline OptionalTensor contiguous(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(tensor->contiguous()) : std::nullopt;
}

template <class T>
const T* const_data_ptr(const OptionalTensor& tensor) {
  return tensor ? tensor->const_data_ptr<T>() : nullptr;
}

inline int64_t num_threads() {
  uint32_t count = 1;
  succeed(torch_get_num_threads(&count));
  return count;
}

// f(begin, end) for parts of a range on torch's threads, as at::parallel_for; an exception of one
// of them is raised here.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  if (begin >= end) return;
  if (end - begin <= std::max<int64_t>(1, grain)) return f(begin, end);
  struct Task {
    const F& f;
    std::atomic_flag has_failed;
    std::exception_ptr error;
  } task{f, {}, {}};
  succeed(torch_parallel_for(
      begin, end, grain,
      [](int64_t first, int64_t last, void* context) {
        Task& of = *static_cast<Task*>(context);
        try {
          of.f(first, last);
        } catch (...) {
          if (!of.has_failed.test_and_set()) of.error = std::current_exception();
        }
      },
      &task));
  if (task.error) std::rethrow_exception(task.error);
}

}  // namespace lraee
