// int8_linear on tensors: pointers, the split between threads, scratch.

#include "int8_linear.h"

#include <algorithm>

#include "cpu/int8_linear/blocking.h"
#include "cpu/pack_weight/pack_weight.h"
#include "box.h"
#include "levels.h"

namespace lraee {
namespace {

// Contiguous float32 or int32 operand of the given length; null where it is absent. keep holds the
// storage alive.
template <class T>
const T* vector_pointer(const char* name, const Tensor* operand, int64_t size,
                        OptionalTensor* keep) {
  if (operand == nullptr) return nullptr;
  LRAEE_CHECK_VALUE(operand->dim() == 1 && operand->size(0) == size, "int8_linear: ", name,
                    " must have shape [", size, "], got ", operand->sizes());
  *keep = operand->contiguous();
  return (*keep)->const_data_ptr<T>();
}

const Tensor* pointer_to(const OptionalTensor& operand) { return operand ? &*operand : nullptr; }

}  // namespace

cpu::Int8Linear* int8_linear_kernel() {
#if defined(__x86_64__)
  return by_level<cpu::Int8Linear>({.scalar = &cpu::int8_linear_scalar,
                                    .avx2 = &cpu::int8_linear_avx2,
                                    .avx_vnni = cpu::has_vex_vnni()
                                                    ? &cpu::int8_linear_avx_vnni
                                                    : &cpu::int8_linear_avx512vl_vnni,
                                    .avx512_vnni = &cpu::int8_linear_avx512_vnni,
#if defined(__linux__)
                                    .amx = &cpu::int8_linear_amx});
#else
                                    .amx = &cpu::int8_linear_avx512_vnni});
#endif
#else
  return &cpu::int8_linear_scalar;
#endif
}

cpu::Activation activation_from_name(std::string_view name) {
  if (name == "none") return cpu::Activation::kNone;
  if (name == "gelu") return cpu::Activation::kGelu;
  if (name == "gelu_tanh") return cpu::Activation::kGeluTanh;
  if (name == "quick_gelu") return cpu::Activation::kQuickGelu;
  throw ValueError(
      text("int8_linear: activation must be none, gelu, gelu_tanh or quick_gelu, got ", name));
}

namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A grid of blocks of y [M, N], one for each thread.
struct Grid {
  int64_t M, N, m_parts, n_parts;

  int64_t row_step() const { return ceil_div(M, m_parts); }
  int64_t column_step() const {
    return ceil_div(ceil_div(N, cpu::kColumnStep), n_parts) * cpu::kColumnStep;
  }
  int64_t row_of(int64_t part) const { return part / n_parts * row_step(); }
  int64_t column_of(int64_t part) const { return part % n_parts * column_step(); }
};

// The split with the least work and traffic for the slowest thread. Rows weigh by 6, columns by 64,
// the sizes of a tile; a thread reads its weights once and converts its rows once.
Grid best_grid(int64_t M, int64_t N, int64_t K) {
  constexpr int64_t kSerialProducts = 1 << 20, kSerialBytes = 1 << 18;
  constexpr int64_t kRows = 6, kProductsPerByte = 8;
  Grid best{.M = M, .N = N, .m_parts = 1, .n_parts = 1};
  // A single row takes as long as its weights, which come from memory: 0.8 MB on one thread 41 us.
  if (M * N * K < kSerialProducts && N * K < kSerialBytes) return best;
  const int64_t threads = num_threads();
  int64_t least = INT64_MAX;
  for (int64_t m_parts = 1; m_parts <= threads; ++m_parts) {
    const Grid grid{.M = M, .N = N, .m_parts = m_parts, .n_parts = threads / m_parts};
    const int64_t rows = ceil_div(grid.row_step(), kRows) * kRows, columns = grid.column_step();
    const int64_t cost = rows * columns + kProductsPerByte * (rows + columns);
    if (cost < least) {
      least = cost;
      best = grid;
    }
  }
  return best;
}

}  // namespace

void int8_linear_of(const cpu::Int8LinearArgs& a, const PackedWeight& next) {
  if (a.M == 0 || a.N == 0) return;
  cpu::Int8Linear* const kernel = int8_linear_kernel();
  const Grid grid = best_grid(a.M, a.N, a.K), next_grid = best_grid(a.M, next.N, next.K);
  const int64_t row_step = grid.row_step(), column_step = grid.column_step();
  parallel_for(0, grid.m_parts * grid.n_parts, 1, [&](int64_t begin, int64_t end) {
    static thread_local ThreadScratch memory;
    void* scratch = memory.at_least(cpu::int8_linear_scratch_bytes(a.K));
    for (int64_t part = begin; part < end; ++part) {
      const int64_t m = grid.row_of(part), n = grid.column_of(part);
      if (m >= a.M || n >= a.N) continue;
      kernel(a,
             {.m_begin = m,
              .m_end = std::min(a.M, m + row_step),
              .n_begin = n,
              .n_end = std::min(a.N, n + column_step),
              .next = next.from(next_grid.column_of(part))},
             scratch);
    }
  });
}

cpu::NextWeight PackedWeight::from(int64_t n) const {
  // More would not come faster than the product reads it.
  constexpr int64_t kBytes = 64 * 1024;
  if (n >= N) return {};
  const int64_t panel_bytes = cpu::num_k_groups(K) * cpu::kLineBytes;
  const int64_t panel = n / cpu::kPanelWidth, panels = cpu::kColumnStep / cpu::kPanelWidth;
  const int64_t count = std::min(panels, cpu::num_panels(N) - panel);
  return {w + panel * panel_bytes, std::min(kBytes, count * panel_bytes)};
}

Tensor int8_linear(const Tensor& x_q, const Tensor& x_scale, const OptionalTensor& x_zero,
                   const Tensor& w, const Tensor& w_scale, const Tensor& w_sum,
                   const OptionalTensor& bias, const OptionalTensor& residual,
                   const OptionalTensor& layer_scale, std::string_view activation,
                   Dtype out_dtype) {
  LRAEE_CHECK_VALUE(x_q.dim() == 2 && (x_q.size(1) <= 1 || x_q.stride(1) == 1),
                    "int8_linear: x_q must have shape [M, K] and contiguous rows, got ",
                    x_q.sizes(), " with strides ", x_q.strides());
  const int64_t M = x_q.size(0), K = x_q.size(1), N = w_scale.numel();
  const auto layout = packed_layout(N, K);
  LRAEE_CHECK_VALUE(std::ranges::equal(w.sizes(), layout) && w.is_contiguous(),
                    "int8_linear: w must have the cpu layout ", Sizes(layout), " of [N, K] = [", N,
                    ", ", K, "], got ", w.sizes());
  LRAEE_CHECK_VALUE(
      !residual.has_value() || (residual->dim() == 2 && residual->size(0) == M &&
                                residual->size(1) == N && residual->dtype() == out_dtype),
      "int8_linear: residual must be ", out_dtype, " [", M, ", ", N, "]");
  Tensor y = Tensor::empty({M, N}, out_dtype);
  std::array<OptionalTensor, 6> keep;
  OptionalTensor residual_rows;
  if (residual.has_value()) {
    residual_rows =
        N <= 1 || residual->stride(1) == 1 ? residual->borrowed() : residual->contiguous();
  }
  const cpu::Int8LinearArgs args{
      .M = M,
      .N = N,
      .K = K,
      .x_q = x_q.const_data_ptr<int8_t>(),
      .x_stride = x_q.stride(0),
      .x_scale = vector_pointer<float>("x_scale", &x_scale, M, &keep[0]),
      .x_zero = vector_pointer<int32_t>("x_zero", pointer_to(x_zero), M, &keep[1]),
      .w = w.const_data_ptr<int8_t>(),
      .w_scale = vector_pointer<float>("w_scale", &w_scale, N, &keep[2]),
      .w_sum = vector_pointer<int32_t>("w_sum", &w_sum, N, &keep[3]),
      .bias = vector_pointer<float>("bias", pointer_to(bias), N, &keep[4]),
      .layer_scale = vector_pointer<float>("layer_scale", pointer_to(layer_scale), N, &keep[5]),
      .residual = residual.has_value() ? residual_rows->const_data_ptr() : nullptr,
      .residual_stride = residual.has_value() ? residual_rows->stride(0) : 0,
      .y = y.mutable_data_ptr(),
      .out_type = float_type(out_dtype, "int8_linear", "out_dtype"),
      .activation = activation_from_name(activation)};
  int8_linear_of(args, {});
  return y;
}

namespace {

const CpuOperators operators{LRAEE_OPERATOR(int8_linear)};

}  // namespace
}  // namespace lraee
