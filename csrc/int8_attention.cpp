// qkv [B, L, 3 D] -> softmax(Q K^T / sqrt(d)) V [B, L, D], Q and K in int8 with one scale per
// token and head.

#include "cpu/int8_attention/int8_attention.h"

#include <algorithm>
#include <cmath>

#include "cpu/int8_attention/scratch.h"
#include "box.h"
#include "levels.h"
#include "rows.h"

namespace lraee {

cpu::Int8Attention* int8_attention_kernel() {
#if defined(__x86_64__)
  return by_level<cpu::Int8Attention>({.scalar = &cpu::int8_attention_scalar,
                                       .avx2 = &cpu::int8_attention_avx2,
                                       .avx_vnni = cpu::has_vex_vnni()
                                                       ? &cpu::int8_attention_avx_vnni
                                                       : &cpu::int8_attention_avx512vl_vnni,
                                       .avx512_vnni = &cpu::int8_attention_avx512_vnni,
                                       .amx = &cpu::int8_attention_avx512_vnni});
#else
  return &cpu::int8_attention_scalar;
#endif
}

namespace {

// Parts that the queries of one head are cut into. Each part prepares K and V anew, so heads are
// cut only where whole heads would leave threads idle. No result depends on the cut.
int64_t parts_per_head(int64_t heads, int64_t num_queries) {
  const int64_t threads = num_threads();
  constexpr int64_t kQueriesPerPart = 24;
  if (heads >= 4 * threads || heads % threads == 0) return 1;
  return std::clamp<int64_t>((4 * threads + heads - 1) / heads, 1,
                             std::max<int64_t>(1, num_queries / kQueriesPerPart));
}

void run(const cpu::Int8AttentionArgs& args, int64_t B, int64_t num_queries) {
  const int64_t heads = B * args.H, parts = parts_per_head(heads, num_queries);
  const int64_t scratch_bytes =
      cpu::int8_attention_scratch_bytes(args.L, args.d, args.copies_keys());
  cpu::Int8Attention* const one_part = int8_attention_kernel();
  parallel_for(0, heads * parts, 1, [&](int64_t begin, int64_t end) {
    static thread_local ThreadScratch memory;
    void* const scratch = memory.at_least(scratch_bytes);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / parts, part = task % parts;
      one_part(args,
               {.b = head / args.H,
                .h = head % args.H,
                .i_begin = num_queries * part / parts,
                .i_end = num_queries * (part + 1) / parts},
               scratch);
    }
  });
}

}  // namespace

AttentionOperands::AttentionOperands(std::string_view op, int64_t B, int64_t L, int64_t d,
                                     int64_t heads, bool is_causal, const OptionalTensor& rope_of,
                                     const OptionalTensor& mask)
    : num_heads(heads), causal(is_causal) {
  if (rope_of.has_value()) {
    LRAEE_CHECK_TYPE(rope_of->dtype() == kFloat32, op, ": rope must be float32, got ",
                     rope_of->dtype());
    LRAEE_CHECK_VALUE(rope_of->dim() == 3 && rope_of->size(0) == 2 && rope_of->size(1) <= L &&
                          rope_of->size(2) == d && d % 2 == 0,
                      op, ": rope must have shape [2, R, d] with R <= ", L, " and even d = ", d,
                      ", got ", rope_of->sizes());
    rope = rope_of->contiguous();
  }
  if (mask.has_value()) {
    LRAEE_CHECK_TYPE(mask->dtype() == kBool, op, ": key_mask must be bool, got ", mask->dtype());
    LRAEE_CHECK_VALUE(mask->dim() == 2 && mask->size(0) == B && mask->size(1) == L, op,
                      ": key_mask must have shape [B, L] = [", B, ", ", L, "], got ",
                      mask->sizes());
    key_mask = mask->contiguous();
  }
}

void AttentionOperands::fill(cpu::Int8AttentionArgs& args, int64_t b) const {
  if (rope.has_value()) {
    const int64_t rotated = rope->size(1);
    args.cos = rope->const_data_ptr<float>();
    args.sin = args.cos + rotated * args.d;
    args.prefix = args.L - rotated;
  }
  if (key_mask.has_value()) args.key_mask = key_mask->const_data_ptr<bool>() + b * args.L;
}

Tensor int8_attention_of(const Tensor& qkv, const AttentionOperands& operands,
                         int64_t num_queries) {
  const cpu::FloatType type = float_type(qkv.dtype(), "int8_attention", "qkv");
  const int64_t B = qkv.size(0), L = qkv.size(1), D = qkv.size(2) / 3, d = D / operands.num_heads;
  const Tensor rows = with_contiguous_rows(qkv);
  Tensor y = Tensor::empty({B, num_queries, D}, qkv.dtype());
  cpu::Int8AttentionArgs args{.qkv = rows.const_data_ptr(),
                              .stride_b = rows.stride(0),
                              .stride_l = rows.stride(1),
                              .type = type,
                              .L = L,
                              .H = operands.num_heads,
                              .d = d,
                              .is_causal = operands.causal,
                              .root = static_cast<float>(1.0 / std::sqrt(static_cast<double>(d))),
                              .y = y.mutable_data_ptr(),
                              .y_stride = num_queries * D};
  operands.fill(args, 0);
  run(args, B, num_queries);
  return y;
}

namespace {

Tensor int8_attention(const Tensor& qkv, int64_t num_heads, bool causal, const OptionalTensor& rope,
                      const OptionalTensor& key_mask) {
  LRAEE_CHECK_VALUE(qkv.dim() == 3 && qkv.size(1) >= 1 && num_heads >= 1 && qkv.size(2) > 0 &&
                        qkv.size(2) % (3 * num_heads) == 0,
                    "int8_attention: qkv must have shape [B, L >= 1, 3 * num_heads * d] with "
                    "num_heads = ",
                    num_heads, ", got ", qkv.sizes());
  const int64_t d = qkv.size(2) / (3 * num_heads);
  const AttentionOperands operands("int8_attention", qkv.size(0), qkv.size(1), d, num_heads, causal,
                                   rope, key_mask);
  return int8_attention_of(qkv, operands, qkv.size(1));
}

const CpuOperators operators{LRAEE_OPERATOR(int8_attention)};

}  // namespace
}  // namespace lraee
