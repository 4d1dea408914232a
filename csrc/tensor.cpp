#include "tensor.h"

#include <cstdio>

namespace lraee {

void append(std::string& line, double number) {
  std::array<char, 32> digits;
  std::snprintf(digits.data(), digits.size(), "%g", number);
  line += digits.data();
}

void append(std::string& line, Dtype dtype) {
  const std::array<std::pair<Dtype, const char*>, 11> names{{
      {kFloat32, "float32"},
      {kBfloat16, "bfloat16"},
      {kFloat16, "float16"},
      {{aoti_torch_dtype_float64()}, "float64"},
      {kInt8, "int8"},
      {kUint8, "uint8"},
      {{aoti_torch_dtype_int16()}, "int16"},
      {kInt32, "int32"},
      {kInt64, "int64"},
      {kBool, "bool"},
      {{aoti_torch_dtype_complex64()}, "complex64"},
  }};
  for (const auto& [value, name] : names) {
    if (value == dtype) return append(line, name);
  }
  line += "another type";
}

void succeed(AOTITorchError code) {
  if (code != AOTI_TORCH_SUCCESS) throw std::runtime_error("lraee: a function of libtorch failed");
}

Tensor Tensor::empty(Sizes sizes, Dtype dtype) {
  std::array<int64_t, 16> strides;
  LRAEE_CHECK_VALUE(sizes.size() <= strides.size(), "lraee: a tensor must have at most ",
                    static_cast<int64_t>(strides.size()), " dimensions, got ", sizes);
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(1, sizes[i]);
  }
  AtenTensorHandle handle = nullptr;
  succeed(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                   dtype.number, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

AtenTensorHandle Tensor::release() && {
  if (std::exchange(is_owned_, false)) return handle_;
  AtenTensorHandle handle = nullptr;
  succeed(aoti_torch_new_tensor_handle(handle_, &handle));
  return handle;
}

Tensor Tensor::copy(Sizes sizes) const {
  Tensor y = empty(sizes, dtype());
  succeed(aoti_torch_copy_(y.handle_, handle_, 0));
  return y;
}

Tensor Tensor::contiguous() const { return is_contiguous() ? borrowed() : copy(sizes()); }

Tensor Tensor::transposed() const {
  const std::array<int64_t, 2> sizes{size(1), size(0)}, strides{stride(1), stride(0)};
  AtenTensorHandle view = nullptr;
  succeed(aoti_torch_as_strided(handle_, sizes.data(), strides.data(), &view));
  return Tensor(view).copy(sizes);
}

void Tensor::require(Dtype expected) const {
  if (dtype() == expected) [[likely]]
    return;
  throw std::runtime_error(text("expected elements of ", expected, ", got ", dtype()));
}

}  // namespace lraee
