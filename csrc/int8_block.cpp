// One transformer block on tensors: x + ls_1(attention(ln_1(x))), then the same with an MLP. Each
// thread takes whole images through all of the block, a few at a time, so that what passes between
// its operators stays near the thread, and threads meet once a block instead of seven times. Where
// images would leave threads idle, they share each operator.

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <string_view>
#include <vector>

#ifdef __linux__
#include <unistd.h>
#endif

#include "cpu/int8_attention/scratch.h"
#include "cpu/int8_linear/blocking.h"
#include "cpu/pack_weight/pack_weight.h"
#include "box.h"
#include "int8_block.h"
#include "int8_linear.h"
#include "rows.h"

namespace lraee {
namespace {

// Rows [M, K] to be multiplied.
struct QuantizedRows {
  const int8_t* x_q;
  const float* x_scale;
  const int32_t* x_zero;
  int64_t M, K;
};

// y = x times the weight of `linear` and what follows; residual, where it is given, and y may be
// the same rows.
cpu::Int8LinearArgs product(const QuantizedRows& x, const Linear& linear, const void* residual,
                            int64_t residual_stride, void* y, cpu::FloatType type,
                            cpu::Activation activation) {
  return {.M = x.M,
          .N = linear.N,
          .K = x.K,
          .x_q = x.x_q,
          .x_stride = x.K,
          .x_scale = x.x_scale,
          .x_zero = x.x_zero,
          .w = linear.values.w,
          .w_scale = linear.values.w_scale,
          .w_sum = linear.values.w_sum,
          .bias = linear.values.bias,
          .layer_scale = linear.values.layer_scale,
          .residual = residual,
          .residual_stride = residual_stride,
          .y = y,
          .out_type = type,
          .activation = activation};
}

// Threads share each operator.
class Operators {
 public:
  Operators(const Tensor& x, const Block& block)
      : block_(block),
        dtype_(x.dtype()),
        type_(float_type(dtype_, "int8_block", "x")),
        B_(x.size(0)),
        L_(x.size(1)),
        D_(x.size(2)),
        x_(x.const_data_ptr()) {}

  void run(const Tensor& y) const {
    const int64_t num_queries = block_.num_queries(L_), rows = B_ * num_queries;
    const Tensor qkv = Tensor::empty({B_, L_, 3 * D_}, dtype_);
    multiply(normed(matrix(x_, B_ * L_, D_), block_.norm_1, block_.in_proj), block_.in_proj,
             nullptr, cpu::Activation::kNone, &block_.out_proj, qkv);
    const Tensor attended = int8_attention_of(qkv, block_.attention, num_queries);
    const Matrix residual{.values = x_,
                          .stride = block_.first_only ? L_ * D_ : D_,
                          .M = rows,
                          .K = D_,
                          .type = type_};
    const Tensor middle = Tensor::empty({rows, D_}, dtype_);
    multiply(quantize_rows_of(matrix(attended, rows, D_), block_.out_proj.symmetric),
             block_.out_proj, &residual, cpu::Activation::kNone, &block_.c_fc, middle);
    const Matrix middle_rows = matrix(middle, rows, D_);
    const Tensor wide = Tensor::empty({rows, block_.c_fc.N}, dtype_);
    multiply(normed(middle_rows, block_.norm_2, block_.c_fc), block_.c_fc, nullptr,
             block_.activation(), &block_.c_proj, wide);
    const Matrix wide_rows = matrix(wide, rows, block_.c_fc.N);
    multiply(quantize_rows_of(wide_rows, block_.c_proj.symmetric), block_.c_proj, &middle_rows,
             cpu::Activation::kNone, nullptr, y);
  }

 private:
  Matrix matrix(const void* values, int64_t rows, int64_t width) const {
    return {.values = values, .stride = width, .M = rows, .K = width, .type = type_};
  }
  Matrix matrix(const Tensor& x, int64_t rows, int64_t width) const {
    return matrix(x.const_data_ptr(), rows, width);
  }

  static Quantized normed(const Matrix& x, const Norm& norm, const Linear& linear) {
    return layer_norm_quantize_of(x, norm.gamma_ptr(), norm.beta_ptr(), norm.eps, linear.symmetric);
  }

  // next: the operands that are read after this product, if they are known.
  void multiply(const Quantized& x, const Linear& linear, const Matrix* residual,
                cpu::Activation activation, const Linear* next, const Tensor& y) const {
    const auto& [x_q, x_scale, x_zero] = x;
    const QuantizedRows rows{.x_q = x_q.const_data_ptr<int8_t>(),
                             .x_scale = x_scale.const_data_ptr<float>(),
                             .x_zero = x_zero.const_data_ptr<int32_t>(),
                             .M = x_q.size(0),
                             .K = x_q.size(1)};
    int8_linear_of(product(rows, linear, residual == nullptr ? nullptr : residual->values,
                           residual == nullptr ? 0 : residual->stride, y.mutable_data_ptr(), type_,
                           activation),
                   next == nullptr ? PackedWeight{} : next->weight());
  }

  const Block& block_;
  const Dtype dtype_;
  const cpu::FloatType type_;
  const int64_t B_, L_, D_;
  const void* const x_;
};

// Bytes that the largest intermediate of a chunk may take. A chunk reads all weights of the block,
// so it should be large; its intermediates should stay in L2. ViT-B/32 on AMX, 2 MiB of L2, one
// thread, 32 images: 0.4, 0.6, 0.9, 1.3, 2, 3 and 5 times L2 take 279, 236, 220, 203, 186, 187 and
// 189 ms.
int64_t chunk_bytes() {
  constexpr int64_t kUnknown = 1 << 20;
#ifdef _SC_LEVEL2_CACHE_SIZE
  static const int64_t l2 = sysconf(_SC_LEVEL2_CACHE_SIZE);
#else
  static const int64_t l2 = 0;
#endif
  return 2 * (l2 > 0 ? l2 : kUnknown);
}

int64_t padded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// One thread's way through the block, a few images at a time.
class Images {
 public:
  Images(const Tensor& x, const Tensor& y, const Block& block)
      : block_(block),
        L_(x.size(1)),
        num_queries_(block.num_queries(L_)),
        D_(x.size(2)),
        hidden_(block.c_fc.N),
        element_(static_cast<int64_t>(x.element_size())),
        type_(float_type(x.dtype(), "int8_block", "x")),
        x_(static_cast<const char*>(x.const_data_ptr())),
        y_(static_cast<char*>(y.mutable_data_ptr())),
        int8_linear_(int8_linear_kernel()) {
    const int64_t fitting = chunk_bytes() / (std::max(3 * D_, hidden_) * element_);
    images_ = std::max<int64_t>(1, fitting / L_);
    rows_ = std::clamp<int64_t>(fitting / 32 * 32, 32, std::max<int64_t>(32, images_ * L_));
  }

  void run(int64_t begin, int64_t end) {
    static thread_local ThreadScratch memory;
    const int64_t kept = block_.first_only ? end - begin : images_ * L_;
    place(static_cast<char*>(memory.at_least(place(nullptr, kept))), kept);
    for (int64_t image = begin; image < end; image += images_) {
      const int64_t count = std::min(images_, end - image);
      char* const attended =
          block_.first_only ? attended_ + (image - begin) * D_ * element_ : attended_;
      attend(image, count, attended);
      if (block_.first_only) continue;
      project(image * L_, count * L_, attended_);
      for (int64_t row = image * L_; row < (image + count) * L_; row += rows_) {
        mlp(row, std::min(rows_, (image + count) * L_ - row));
      }
    }
    if (!block_.first_only) return;
    // One row an image is left: all together, so that the weights are read once.
    for (int64_t row = begin; row < end; row += rows_) {
      const int64_t rows = std::min(rows_, end - row);
      project(row, rows, attended_ + (row - begin) * D_ * element_);
      mlp(row, rows);
    }
  }

 private:
  // Where each array lies, `kept` rows between attention and its projection; returns the bytes.
  int64_t place(char* base, int64_t kept) {
    const int64_t rows = std::max(images_ * L_, rows_);
    const int64_t wide = std::max(images_ * L_ * 3 * D_, rows_ * hidden_);
    const int64_t linear =
        std::max({cpu::int8_linear_scratch_bytes(D_), cpu::int8_linear_scratch_bytes(hidden_),
                  cpu::int8_attention_scratch_bytes(L_, D_ / block_.attention.num_heads,
                                                    block_.attention.copies_keys())});
    int64_t size = 0;
    const auto take = [&]<class T>(T*& array, int64_t bytes) {
      array = reinterpret_cast<T*>(base + size);
      size += padded(bytes);
    };
    take(wide_, wide * element_);
    take(attended_, kept * D_ * element_);
    take(x_q_, std::max(rows * D_, rows_ * hidden_));
    take(x_scale_, rows * 4);
    take(x_zero_, rows * 4);
    take(norm_, D_ * 4);
    take(scratch_, linear);
    return size;
  }

  void norm(const char* x, int64_t rows, const Norm& norm, bool symmetric) {
    layer_norm_quantize_kernel()({.x = x,
                                  .stride = D_,
                                  .type = type_,
                                  .D = D_,
                                  .gamma = norm.gamma_ptr(),
                                  .beta = norm.beta_ptr(),
                                  .eps = static_cast<float>(norm.eps),
                                  .symmetric = symmetric,
                                  .x_q = x_q_,
                                  .x_scale = x_scale_,
                                  .x_zero = x_zero_},
                                 0, rows, norm_);
  }

  void quantize(const char* x, int64_t rows, int64_t K, bool symmetric) {
    quantize_rows_kernel()({.x = x,
                            .stride = K,
                            .type = type_,
                            .K = K,
                            .symmetric = symmetric,
                            .x_q = x_q_,
                            .x_scale = x_scale_,
                            .x_zero = x_zero_},
                           0, rows);
  }

  void multiply(const Linear& linear, int64_t rows, int64_t K, const char* residual,
                int64_t residual_stride, char* y, cpu::Activation activation, const Linear& next) {
    const QuantizedRows x{.x_q = x_q_, .x_scale = x_scale_, .x_zero = x_zero_, .M = rows, .K = K};
    int8_linear_(product(x, linear, residual, residual_stride, y, type_, activation),
                 {.m_begin = 0,
                  .m_end = rows,
                  .n_begin = 0,
                  .n_end = linear.N,
                  .next = next.weight().from(0)},
                 scratch_);
  }

  // Attention of whole images, of their first num_queries_ tokens.
  void attend(int64_t image, int64_t count, char* attended) {
    const int64_t H = block_.attention.num_heads, rows = count * L_, d = D_ / H;
    const char* const x = x_ + image * L_ * D_ * element_;
    norm(x, rows, block_.norm_1, block_.in_proj.symmetric);
    multiply(block_.in_proj, rows, D_, nullptr, 0, wide_, cpu::Activation::kNone, block_.out_proj);
    const auto root = static_cast<float>(1.0 / std::sqrt(static_cast<double>(d)));
    cpu::Int8AttentionArgs args{.qkv = wide_,
                                .stride_b = L_ * 3 * D_,
                                .stride_l = 3 * D_,
                                .type = type_,
                                .L = L_,
                                .H = H,
                                .d = d,
                                .is_causal = block_.attention.causal,
                                .root = root,
                                .y = attended,
                                .y_stride = num_queries_ * D_};
    block_.attention.fill(args, image);
    cpu::Int8Attention* const one_head = int8_attention_kernel();
    for (int64_t b = 0; b < count; ++b) {
      for (int64_t h = 0; h < H; ++h) {
        one_head(args, {.b = b, .h = h, .i_begin = 0, .i_end = num_queries_}, scratch_);
      }
    }
  }

  // The projection of the attention of rows of y, added to their x.
  void project(int64_t row, int64_t rows, const char* attended) {
    const int64_t stride = block_.first_only ? L_ * D_ : D_;
    quantize(attended, rows, D_, block_.out_proj.symmetric);
    multiply(block_.out_proj, rows, D_, x_ + row * stride * element_, stride,
             y_ + row * D_ * element_, cpu::Activation::kNone, block_.c_fc);
  }

  // The MLP of some rows of y, in place.
  void mlp(int64_t row, int64_t rows) {
    char* const y = y_ + row * D_ * element_;
    norm(y, rows, block_.norm_2, block_.c_fc.symmetric);
    multiply(block_.c_fc, rows, D_, nullptr, 0, wide_, block_.activation(), block_.c_proj);
    quantize(wide_, rows, hidden_, block_.c_proj.symmetric);
    multiply(block_.c_proj, rows, hidden_, y, D_, y, cpu::Activation::kNone, block_.in_proj);
  }

  const Block& block_;
  const int64_t L_, num_queries_, D_, hidden_, element_;
  const cpu::FloatType type_;
  const char* const x_;
  char* const y_;
  cpu::Int8Linear* const int8_linear_;
  int64_t images_, rows_;
  char *wide_ = nullptr, *attended_ = nullptr, *scratch_ = nullptr;
  int8_t* x_q_ = nullptr;
  float *x_scale_ = nullptr, *norm_ = nullptr;
  int32_t* x_zero_ = nullptr;
};

// Whether whole images, shared out evenly, keep all threads at work, or the block is so small that
// to wake the others costs more than they help: lraee-tiny at batch 1, 24 M multiply-adds on AMX,
// takes 75 us on one thread and 87 on two.
bool takes_images(const Tensor& x, const Block& block) {
  const int64_t B = x.size(0), threads = num_threads();
  const int64_t most = (B + threads - 1) / threads;
  if (most * threads * 4 <= B * 5) return true;
  const int64_t products = B * x.size(1) * x.size(2) * (4 * x.size(2) + 2 * block.c_fc.N);
  return products <= (active_isa() == cpu::Isa::kAmx ? 1 << 25 : 1 << 22);
}

void check_linear(const char* name, const Linear& linear, int64_t N, int64_t K) {
  const auto layout = packed_layout(N, K);
  LRAEE_CHECK_VALUE(std::ranges::equal(linear.w.sizes(), layout) && linear.N == N &&
                        linear.w_sum.numel() == N && (!linear.bias || linear.bias->numel() == N) &&
                        (!linear.layer_scale || linear.layer_scale->numel() == N),
                    "int8_block: ", name, " must have the cpu layout ", Sizes(layout),
                    " of [N, K] = [", N, ", ", K, "] and vectors of ", N, ", got ",
                    linear.w.sizes());
}

void check(const Tensor& x, const Block& block) {
  const int64_t D = x.size(2);
  const auto check_norm = [](const Norm& norm, int64_t width) {
    LRAEE_CHECK_VALUE(
        norm.gamma.numel() == width && (!norm.beta.has_value() || norm.beta->numel() == width),
        "int8_block: a norm must have gamma and beta of shape [", width, "]");
  };
  check_norm(block.norm_1, D);
  check_norm(block.norm_2, D);
  check_linear("in_proj", block.in_proj, 3 * D, D);
  check_linear("out_proj", block.out_proj, D, D);
  check_linear("c_fc", block.c_fc, block.c_fc.N, D);
  check_linear("c_proj", block.c_proj, D, block.c_fc.N);
}

void check_shape(const Tensor& x, int64_t num_heads) {
  LRAEE_CHECK_VALUE(x.dim() == 3 && x.size(1) >= 1 && num_heads >= 1 && x.size(2) >= 1 &&
                        x.size(2) % num_heads == 0,
                    "int8_block: x must have shape [B, L >= 1, num_heads * d] with num_heads = ",
                    num_heads, ", got ", x.sizes());
}

using Parts = std::vector<OptionalTensor>;

Tensor int8_block(const Tensor& x, const std::vector<Tensor>& norm_1, const Parts& in_proj,
                  const Parts& out_proj, const std::vector<Tensor>& norm_2, const Parts& c_fc,
                  const Parts& c_proj, const std::vector<double>& eps,
                  const std::vector<bool>& symmetric, int64_t num_heads, bool causal,
                  std::string_view activation, bool first_only, const OptionalTensor& key_mask,
                  std::string_view attention) {
  LRAEE_CHECK_VALUE(attention == "int8", "int8_block: attention must be int8 on the CPU, got ",
                    attention, "; run the operators of the block one by one");
  LRAEE_CHECK_VALUE(eps.size() == 2, "int8_block: eps must have a value for each norm, got ",
                    static_cast<int64_t>(eps.size()));
  LRAEE_CHECK_VALUE(symmetric.size() == 4, "int8_block: symmetric must have 4 values, got ",
                    static_cast<int64_t>(symmetric.size()));
  check_shape(x, num_heads);
  const int64_t B = x.size(0), L = x.size(1), D = x.size(2);
  const Block block{.norm_1 = Norm(norm_1, eps[0]),
                    .norm_2 = Norm(norm_2, eps[1]),
                    .in_proj = Linear(in_proj, symmetric[0]),
                    .out_proj = Linear(out_proj, symmetric[1]),
                    .c_fc = Linear(c_fc, symmetric[2]),
                    .c_proj = Linear(c_proj, symmetric[3]),
                    .attention = AttentionOperands("int8_block", B, L, D / num_heads, num_heads,
                                                   causal, std::nullopt, key_mask),
                    .activation_name = activation,
                    .first_only = first_only};
  block.activation();  // raises on an unknown name
  check(x, block);
  const Tensor rows = x.contiguous();
  Tensor y = Tensor::empty({B, block.num_queries(L), D}, rows.dtype());
  if (takes_images(x, block)) {
    const int64_t threads = num_threads();
    parallel_for(0, B, (B + threads - 1) / threads,
                 [&](int64_t begin, int64_t end) { Images(rows, y, block).run(begin, end); });
  } else {
    Operators(rows, block).run(y);
  }
  return y;
}

const CpuOperators operators{LRAEE_OPERATOR(int8_block)};

}  // namespace
}  // namespace lraee
