// uint8 image [H, W, 3] -> a crop of its resize in Pillow's bits, as uint8 or normalized float32.
// One thread, no OpenMP: decoding threads call it, and a pool of threads inside each of them would
// take the processor from the model.

#include "cpu/resize/resize.h"
#include "cpu/resize/weights.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "box.h"
#include "levels.h"

namespace lraee {
namespace {

constexpr const char* kOp = "resize_crop_normalize";
constexpr int64_t kChannels = 3;

cpu::ResizeFilter filter_of(std::string_view name) {
  constexpr std::array<std::string_view, 5> kNames = {"box", "bilinear", "hamming", "bicubic",
                                                      "lanczos"};
  const auto it = std::find(kNames.begin(), kNames.end(), name);
  LRAEE_CHECK_VALUE(it != kNames.end(), kOp,
                    ": filter must be box, bilinear, hamming, bicubic or lanczos, got '", name,
                    "'");
  return static_cast<cpu::ResizeFilter>(it - kNames.begin());
}

// Weights of outputs first..first + count - 1 of an axis, with their memory.
class Weights {
 public:
  Weights(const cpu::ResizeAxis& axis, int64_t first, int64_t count)
      : stride_(cpu::resize_weight_stride(axis)),
        start_(count),
        taps_(count),
        low_(count * stride_),
        high_(count * stride_) {
    std::vector<double> real(stride_);
    const bool fits = cpu::resize_weights(axis, first, count, real.data(), start_.data(),
                                          taps_.data(), low_.data(), high_.data());
    LRAEE_CHECK_VALUE(fits, kOp, ": box must give weights below 32, got [", axis.begin, ", ",
                      axis.end, "] of ", axis.input);
  }

  cpu::ResizeWeights view() const {
    return {start_.data(), taps_.data(), low_.data(), high_.data(), stride_};
  }
  int64_t begin() const { return *std::min_element(start_.begin(), start_.end()); }
  int64_t end() const {
    int64_t last = 0;
    for (size_t i = 0; i < start_.size(); ++i) last = std::max(last, int64_t{start_[i]} + taps_[i]);
    return last;
  }
  // Counts inputs from `begin` on.
  void rebase(int64_t begin) {
    for (int32_t& start : start_) start -= static_cast<int32_t>(begin);
  }

 private:
  int64_t stride_;
  std::vector<int32_t> start_, taps_;
  std::vector<int16_t> low_, high_;
};

bool is_resized(const cpu::ResizeAxis& axis) {
  return axis.output != axis.input || axis.begin != 0 ||
         axis.end != static_cast<float>(axis.output);
}

struct Span {
  int64_t first, count;
};

// Rows of RGB pixels that a pass reads: of the image, or of what the pass before it wrote.
struct Rows {
  const uint8_t* data;
  int64_t stride;        // bytes
  int64_t width, count;  // pixels, rows
  const uint8_t* end;    // of memory that may be read
  std::unique_ptr<uint8_t[]> memory;

  Rows of(Span rows, Span columns) && {
    data += rows.first * stride + columns.first * kChannels;
    count = rows.count;
    width = columns.count;
    return std::move(*this);
  }
};

// Rows that a pass writes. One byte more each: the horizontal pass stores pixels as four bytes.
Rows empty_rows(int64_t width, int64_t count) {
  const int64_t stride = width * kChannels + 1;
  const int64_t bytes = count * stride + cpu::kResizeReadSlack;
  std::unique_ptr<uint8_t[]> memory(new uint8_t[bytes]);
  uint8_t* const data = memory.get();
  return {data, stride, width, count, data + bytes, std::move(memory)};
}

Rows resized_across(const Rows& x, const Weights& weights, int64_t width) {
  Rows y = empty_rows(width, x.count);
  cpu::ResizeHorizontal* const run =
      by_level<cpu::ResizeHorizontal>(LRAEE_THREE_LEVELS(cpu::resize_horizontal));
  // Rows whose end is too near the end of the memory to be read past are copied.
  const int64_t bytes = x.width * kChannels;
  std::vector<uint8_t> copies;
  copies.reserve(cpu::kResizeRows * (bytes + cpu::kResizeReadSlack));
  for (int64_t row = 0; row < x.count; row += cpu::kResizeRows) {
    const uint8_t* in[cpu::kResizeRows];
    uint8_t* out[cpu::kResizeRows];
    copies.clear();
    for (int64_t i = 0; i < cpu::kResizeRows; ++i) {
      if (i > 0 && row + i >= x.count) {
        in[i] = in[i - 1];
        out[i] = out[i - 1];
        continue;
      }
      in[i] = x.data + (row + i) * x.stride;
      out[i] = y.memory.get() + (row + i) * y.stride;
      if (x.end - in[i] < bytes + cpu::kResizeReadSlack) {
        const uint8_t* const whole = in[i];
        in[i] = copies.data() + copies.size();
        copies.insert(copies.end(), whole, whole + bytes);
        copies.resize(copies.size() + cpu::kResizeReadSlack);
      }
    }
    run(in, weights.view(), width, out);
  }
  return y;
}

Rows resized_down(const Rows& x, const Weights& weights, int64_t height) {
  Rows y = empty_rows(x.width, height);
  cpu::ResizeVertical* const run =
      by_level<cpu::ResizeVertical>(LRAEE_THREE_LEVELS(cpu::resize_vertical));
  const cpu::ResizeWeights w = weights.view();
  for (int64_t i = 0; i < height; ++i) {
    run(x.data + w.start[i] * x.stride, x.stride, w.taps[i], w.low + i * w.stride,
        w.high + i * w.stride, x.width * kChannels, y.memory.get() + i * y.stride);
  }
  return y;
}

Span reach(const std::optional<Weights>& weights, Span outputs) {
  if (!weights) return outputs;
  return {weights->begin(), weights->end() - weights->begin()};
}

Rows resized(const Tensor& image, const cpu::ResizeAxis& across, const cpu::ResizeAxis& down,
             Span columns, Span rows, bool vertical_first) {
  std::optional<Weights> across_weights, down_weights;
  if (is_resized(across)) across_weights.emplace(across, columns.first, columns.count);
  if (is_resized(down)) down_weights.emplace(down, rows.first, rows.count);
  const uint8_t* const data = image.const_data_ptr<uint8_t>();
  const Span needed_rows = reach(down_weights, rows);
  const Span needed_columns = reach(across_weights, columns);
  Rows y = Rows{data, image.size(1) * kChannels, 0, 0, data + image.numel(), nullptr}.of(
      needed_rows, needed_columns);
  if (across_weights) across_weights->rebase(needed_columns.first);
  if (down_weights) down_weights->rebase(needed_rows.first);
  if (down_weights && vertical_first) y = resized_down(y, *down_weights, rows.count);
  if (across_weights) y = resized_across(y, *across_weights, columns.count);
  if (down_weights && !vertical_first) y = resized_down(y, *down_weights, rows.count);
  return y;
}

void write_bytes(const Rows& x, bool channels_first, uint8_t* y) {
  const int64_t plane = x.count * x.width;
  for (int64_t i = 0; i < x.count; ++i) {
    const uint8_t* row = x.data + i * x.stride;
    if (!channels_first) {
      std::memcpy(y + i * x.width * kChannels, row, x.width * kChannels);
      continue;
    }
    uint8_t* const out = y + i * x.width;
    for (int64_t j = 0; j < x.width; ++j) {
      for (int64_t c = 0; c < kChannels; ++c) out[c * plane + j] = row[kChannels * j + c];
    }
  }
}

void write_floats(const Rows& x, const float* table, float* y) {
  const int64_t plane = x.count * x.width;
  for (int64_t i = 0; i < x.count; ++i) {
    const uint8_t* row = x.data + i * x.stride;
    float* const out = y + i * x.width;
    for (int64_t j = 0; j < x.width; ++j) {
      for (int64_t c = 0; c < kChannels; ++c) {
        out[c * plane + j] = table[256 * c + row[kChannels * j + c]];
      }
    }
  }
}

void check(const Tensor& image, std::span<const double> box, Sizes size, Sizes crop,
           const OptionalTensor& table, bool channels_first) {
  LRAEE_CHECK_VALUE(image.dim() == 3 && image.size(2) == kChannels && image.numel() > 0, kOp,
                    ": image must have shape [H, W, 3] and pixels, got ", image.sizes());
  LRAEE_CHECK_TYPE(image.dtype() == kUint8, kOp, ": image must be uint8, got ", image.dtype());
  LRAEE_CHECK_VALUE(image.is_contiguous(), kOp, ": image must be contiguous, got strides ",
                    image.strides());
  constexpr int64_t kMost = int64_t{1} << 30;
  LRAEE_CHECK_VALUE(image.size(0) < kMost && image.size(1) < kMost, kOp,
                    ": image must have sides below 2^30, got ", image.sizes());
  LRAEE_CHECK_VALUE(box.size() == 4 && box[0] >= 0 && box[1] >= 0 && box[2] > box[0] &&
                        box[3] > box[1] && box[2] <= static_cast<double>(image.size(1)) &&
                        box[3] <= static_cast<double>(image.size(0)),
                    kOp, ": box must be [left, top, right, bottom] inside the image, got ", box);
  LRAEE_CHECK_VALUE(
      size.size() == 2 && size[0] > 0 && size[1] > 0 && size[0] < kMost && size[1] < kMost, kOp,
      ": size must be [height, width], both positive, got ", size);
  LRAEE_CHECK_VALUE(crop.size() == 4 && crop[0] >= 0 && crop[1] >= 0 && crop[2] > 0 &&
                        crop[3] > 0 && crop[2] <= size[0] && crop[3] <= size[1] &&
                        crop[0] <= size[0] - crop[2] && crop[1] <= size[1] - crop[3],
                    kOp, ": crop must be [top, left, height, width] inside size ", size, ", got ",
                    crop);
  if (!table.has_value()) return;
  LRAEE_CHECK_VALUE(table->dtype() == kFloat32 && table->is_contiguous() &&
                        equal(table->sizes(), {kChannels, 256}) && channels_first,
                    kOp, ": table must be float32 [3, 256], with channels_first, got ",
                    table->dtype(), " ", table->sizes());
}

}  // namespace

Tensor resize_crop_normalize(const Tensor& image, const std::vector<double>& box,
                             const std::vector<int64_t>& size, const std::vector<int64_t>& crop,
                             std::string_view filter_name, bool vertical_first,
                             const OptionalTensor& table, bool channels_first) {
  check(image, box, size, crop, table, channels_first);
  const cpu::ResizeFilter filter = filter_of(filter_name);
  const cpu::ResizeAxis across{image.size(1), static_cast<float>(box[0]),
                               static_cast<float>(box[2]), size[1], filter};
  const cpu::ResizeAxis down{image.size(0), static_cast<float>(box[1]), static_cast<float>(box[3]),
                             size[0], filter};
  const Rows rows =
      resized(image, across, down, {crop[1], crop[3]}, {crop[0], crop[2]}, vertical_first);
  if (table.has_value()) {
    Tensor y = Tensor::empty({kChannels, crop[2], crop[3]}, kFloat32);
    write_floats(rows, table->const_data_ptr<float>(), y.mutable_data_ptr<float>());
    return y;
  }
  Tensor y = channels_first ? Tensor::empty({kChannels, crop[2], crop[3]}, kUint8)
                            : Tensor::empty({crop[2], crop[3], kChannels}, kUint8);
  write_bytes(rows, channels_first, y.mutable_data_ptr<uint8_t>());
  return y;
}

namespace {

// Its schema stands here, not with the operators of models: nothing traces or differentiates it.
const CpuOperators operators{
    "resize_crop_normalize(Tensor image, float[] box, int[] size, int[] crop, str filter, "
    "bool vertical_first, Tensor? table, bool channels_first) -> Tensor",
    LRAEE_OPERATOR(resize_crop_normalize)};

}  // namespace
}  // namespace lraee
