// One transformer block on tensors: x + ls_1(attention(ln_1(x))), then the same with an MLP. Each
// thread takes whole images through all of the block, a few at a time, so that what passes between
// its operators stays near the thread, and threads meet once a block instead of seven times. Where
// images would leave threads idle, they share each operator.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

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
#include "int8_block.h"
#include "int8_linear.h"
#include "rows.h"

namespace lraee {
namespace {

// Threads share each operator.
at::Tensor by_operator(const at::Tensor& x, const Block& block) {
  const int64_t B = x.size(0), L = x.size(1), D = x.size(2);
  const auto type = x.scalar_type();
  const int64_t num_queries = block.num_queries(L);
  const at::Tensor all = x.view({B * L, D}), rows = block.first_only ? x.select(1, 0) : all;
  const auto multiply = [&](const std::tuple<at::Tensor, at::Tensor, at::Tensor>& quantized,
                            const Linear& linear, const std::optional<at::Tensor>& residual,
                            std::string_view then, const PackedWeight& next) {
    const auto& [x_q, x_scale, x_zero] = quantized;
    return int8_linear(x_q, x_scale, x_zero, linear.w, linear.w_scale, linear.w_sum, linear.bias,
                       residual, linear.layer_scale, then, type, next);
  };
  const auto normed = [&](const at::Tensor& from, const Norm& norm, const Linear& linear) {
    return layer_norm_quantize(from, norm.gamma, norm.beta, norm.eps, linear.symmetric);
  };
  const at::Tensor qkv = multiply(normed(all, block.norm_1, block.in_proj), block.in_proj,
                                  std::nullopt, "none", block.out_proj.weight());
  const at::Tensor attended =
      int8_attention_of(qkv.view({B, L, 3 * D}), block.attention, num_queries)
          .view({B * num_queries, D});
  const at::Tensor middle = multiply(quantize_rows(attended, block.out_proj.symmetric),
                                     block.out_proj, rows, "none", block.c_fc.weight());
  const at::Tensor hidden = multiply(normed(middle, block.norm_2, block.c_fc), block.c_fc,
                                     std::nullopt, block.activation_name, block.c_proj.weight());
  return multiply(quantize_rows(hidden, block.c_proj.symmetric), block.c_proj, middle, "none", {})
      .view({B, num_queries, D});
}

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
  Images(const at::Tensor& x, at::Tensor& y, const Block& block)
      : block_(block),
        L_(x.size(1)),
        num_queries_(block.num_queries(L_)),
        D_(x.size(2)),
        hidden_(block.c_fc.N()),
        element_(static_cast<int64_t>(x.element_size())),
        type_(float_type(x.scalar_type(), "int8_block", "x")),
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
                                  .gamma = norm.gamma.const_data_ptr<float>(),
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

  // y = the quantized rows times the weight; residual and y may be the same rows.
  void multiply(const Linear& linear, int64_t rows, int64_t K, const char* residual,
                int64_t residual_stride, char* y, cpu::Activation activation, const Linear& next) {
    const auto values = [](const std::optional<at::Tensor>& vector) {
      return vector.has_value() ? vector->const_data_ptr<float>() : nullptr;
    };
    const int64_t N = linear.N();
    const cpu::Int8LinearArgs args{.M = rows,
                                   .N = N,
                                   .K = K,
                                   .x_q = x_q_,
                                   .x_stride = K,
                                   .x_scale = x_scale_,
                                   .x_zero = x_zero_,
                                   .w = linear.w.const_data_ptr<int8_t>(),
                                   .w_scale = linear.w_scale.const_data_ptr<float>(),
                                   .w_sum = linear.w_sum.const_data_ptr<int32_t>(),
                                   .bias = values(linear.bias),
                                   .layer_scale = values(linear.layer_scale),
                                   .residual = residual,
                                   .residual_stride = residual_stride,
                                   .y = y,
                                   .out_type = type_,
                                   .activation = activation};
    int8_linear_(
        args,
        {.m_begin = 0, .m_end = rows, .n_begin = 0, .n_end = N, .next = next.weight().from(0)},
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
bool takes_images(const at::Tensor& x, const Block& block) {
  const int64_t B = x.size(0), threads = at::get_num_threads();
  const int64_t most = (B + threads - 1) / threads;
  if (most * threads * 4 <= B * 5) return true;
  const int64_t products = B * x.size(1) * x.size(2) * (4 * x.size(2) + 2 * block.c_fc.N());
  return products <= (active_isa() == cpu::Isa::kAmx ? 1 << 25 : 1 << 22);
}

void check_linear(const char* name, const Linear& linear, int64_t N, int64_t K) {
  const std::vector<int64_t> layout{cpu::num_panels(N), cpu::num_k_groups(K), cpu::kPanelWidth,
                                    cpu::kGroupDepth};
  TORCH_CHECK_VALUE(linear.w.sizes() == at::IntArrayRef(layout) && linear.N() == N &&
                        linear.w_sum.numel() == N && (!linear.bias || linear.bias->numel() == N) &&
                        (!linear.layer_scale || linear.layer_scale->numel() == N),
                    "int8_block: ", name, " must have the cpu layout ", at::IntArrayRef(layout),
                    " of [N, K] = [", N, ", ", K, "] and vectors of ", N, ", got ",
                    linear.w.sizes());
}

void check(const at::Tensor& x, const Block& block) {
  const int64_t D = x.size(2);
  const auto check_norm = [](const Norm& norm, int64_t width) {
    TORCH_CHECK_VALUE(
        norm.gamma.numel() == width && (!norm.beta.has_value() || norm.beta->numel() == width),
        "int8_block: a norm must have gamma and beta of shape [", width, "]");
  };
  check_norm(block.norm_1, D);
  check_norm(block.norm_2, D);
  check_linear("in_proj", block.in_proj, 3 * D, D);
  check_linear("out_proj", block.out_proj, D, D);
  check_linear("c_fc", block.c_fc, block.c_fc.N(), D);
  check_linear("c_proj", block.c_proj, D, block.c_fc.N());
}

void check_shape(const at::Tensor& x, int64_t num_heads) {
  TORCH_CHECK_VALUE(x.dim() == 3 && x.size(1) >= 1 && num_heads >= 1 && x.size(2) >= 1 &&
                        x.size(2) % num_heads == 0,
                    "int8_block: x must have shape [B, L >= 1, num_heads * d] with num_heads = ",
                    num_heads, ", got ", x.sizes());
}

at::Tensor int8_block(const at::Tensor& x, at::TensorList norm_1, const OptionalTensors& in_proj,
                      const OptionalTensors& out_proj, at::TensorList norm_2,
                      const OptionalTensors& c_fc, const OptionalTensors& c_proj,
                      at::ArrayRef<double> eps, std::array<bool, 4> symmetric, int64_t num_heads,
                      bool causal, std::string_view activation, bool first_only,
                      const std::optional<at::Tensor>& key_mask) {
  TORCH_CHECK_VALUE(eps.size() == 2, "int8_block: eps must have a value for each norm, got ",
                    eps.size());
  check_shape(x, num_heads);
  const int64_t B = x.size(0);
  const Block block{
      .norm_1 = Norm(norm_1, eps[0]),
      .norm_2 = Norm(norm_2, eps[1]),
      .in_proj = Linear(in_proj, symmetric[0]),
      .out_proj = Linear(out_proj, symmetric[1]),
      .c_fc = Linear(c_fc, symmetric[2]),
      .c_proj = Linear(c_proj, symmetric[3]),
      .attention = AttentionOperands("int8_block", B, x.size(1), x.size(2) / num_heads, num_heads,
                                     causal, std::nullopt, key_mask),
      .activation_name = activation,
      .first_only = first_only};
  block.activation();  // raises on an unknown name
  check(x, block);
  const at::Tensor rows = x.contiguous();
  if (!takes_images(x, block)) return by_operator(rows, block);
  at::Tensor y = at::empty({B, block.num_queries(x.size(1)), x.size(2)}, rows.options());
  const int64_t threads = at::get_num_threads();
  at::parallel_for(0, B, (B + threads - 1) / threads,
                   [&](int64_t begin, int64_t end) { Images(rows, y, block).run(begin, end); });
  return y;
}

}  // namespace
}  // namespace lraee

TORCH_LIBRARY_IMPL(lraee, CPU, m) { m.impl("int8_block", &lraee::int8_block); }
