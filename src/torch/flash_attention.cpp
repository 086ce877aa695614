// flash_attention and flash_attention_varlen for PyTorch, real and fake.
#include "heed/flash_attention.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <array>
#include <tuple>

#include "torch/adapt.h"
#include "torch/types.h"

namespace heed::ops {
namespace {

using Results = std::tuple<at::Tensor, at::Tensor>;
using MaybeTensor = std::optional<at::Tensor>;

constexpr const char* kFlash = "flash_attention";
constexpr const char* kVarlen = "flash_attention_varlen";

// The optional arguments of flash_attention, in the order of its schema.
#define HEED_FLASH_ARGS                                                                        \
  bool causal, int64_t window_left, int64_t window_right, const MaybeTensor &lengths,          \
      std::optional<double> scale, double softcap, const MaybeTensor &alibi_slopes,            \
      const MaybeTensor &mask, const MaybeTensor &bias, const MaybeTensor &sink,               \
      const MaybeTensor &block_mask, int64_t block_rows, int64_t block_keys, double dropout_p, \
      int64_t seed, const MaybeTensor &drawn_seed, bool from_start
#define HEED_FLASH_NAMES                                                                      \
  causal, window_left, window_right, lengths, scale, softcap, alibi_slopes, mask, bias, sink, \
      block_mask, block_rows, block_keys, dropout_p, seed, drawn_seed, from_start

// A mask and a bias have any shape that broadcasts to the scores.
void check_score_inputs(const MaybeTensor& mask, const MaybeTensor& bias, c10::Device device) {
  const auto check = [&](const char* name, const MaybeTensor& given, const char* needed) {
    if (!given || !given->defined()) return;
    TORCH_CHECK_TYPE(heed_type(given->scalar_type()), kFlash, ": ", name, " has type ",
                     given->scalar_type(), ", needed is ", needed);
    check_tensor({kFlash, name, *given}, 0, 4, device);
  };
  check("mask", mask, "bool (True = attend), or a floating type as bias");
  check("bias", bias, "a floating type");
}

// As it lies wherever rows can be read: a copy of one that is expanded over the batch, heads or queries has
// memory for every score.
MaybeTensor score_input(const MaybeTensor& given) {
  if (!given || !given->defined()) return std::nullopt;
  const bool as_it_lies = given->dim() == 0 || given->size(-1) <= 1 || given->stride(-1) <= 1;
  return as_it_lies ? *given : given->contiguous();
}

uint64_t seed_of(const char* op, int64_t seed, const MaybeTensor& drawn) {
  if (!drawn || !drawn->defined()) return static_cast<uint64_t>(seed);
  check_tensor({op, "drawn_seed", *drawn}, 0, at::kCPU);
  TORCH_CHECK_TYPE(drawn->scalar_type() == at::kLong, op, ": drawn_seed has type ",
                   drawn->scalar_type(), ", needed is int64");
  return static_cast<uint64_t>(*drawn->const_data_ptr<int64_t>());
}

// Options and what their views point to.
struct HeldFlash {
  HeldFlash(const at::Tensor& q, HEED_FLASH_ARGS)
      : masks(kFlash, causal, window_left, window_right, lengths, q.device()),
        held{held_slopes(kFlash, alibi_slopes, q), score_input(mask), score_input(bias),
             held_per_head(kFlash, "sink", sink, q),
             held_input(kFlash, "block_mask", block_mask, 3, q.device())} {
    options.masks = masks.masks;
    options.masks.from_start = from_start;
    options.scale = scale;
    options.softcap = softcap;
    options.alibi_slopes = view(held[0]);
    options.mask = view(held[1]);
    options.bias = view(held[2]);
    options.sink = view(held[3]);
    options.block_mask = view(held[4]);
    options.block_size = {block_rows, block_keys};
    options.dropout_p = dropout_p;
    options.seed = seed_of(kFlash, seed, drawn_seed);
  }
  HeldMasks masks;
  MaybeTensor held[5];
  FlashOptions options;
};

Results flash_cpu(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, HEED_FLASH_ARGS) {
  check_qkv({kFlash, "q", q}, {kFlash, "k", k}, {kFlash, "v", v});
  check_score_inputs(mask, bias, q.device());
  const HeldFlash held(q, HEED_FLASH_NAMES);
  auto [out, lse] = empty_results(q, v);
  guarded([&, &out = out, &lse = lse] {
    flash_attention(view(q), view(k), view(v), view(out), view(lse), held.options, run_options());
  });
  return {out, lse};
}

using Gradients =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Gradients flash_backward_cpu(const at::Tensor& grad_out, const MaybeTensor& grad_lse,
                             const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                             const at::Tensor& out, const at::Tensor& lse, HEED_FLASH_ARGS,
                             std::array<bool, 6> output_mask) {
  check_qkv({kFlash, "q", q}, {kFlash, "k", k}, {kFlash, "v", v});
  check_score_inputs(mask, bias, q.device());
  const HeldFlash held(q, HEED_FLASH_NAMES);
  const at::Tensor g = gradient_input(grad_out);
  const MaybeTensor g_lse = gradient_input(grad_lse);
  FlashGradients to;
  guarded([&] {
    to = flash_attention_backward(view(g), view(g_lse), view(q), view(k), view(v), view(out),
                                  view(lse), held.options, run_options(),
                                  {.bias = output_mask[4], .alibi_slopes = output_mask[3]});
  });
  return {take_wanted(std::move(to.q), output_mask[0], q),
          take_wanted(std::move(to.k), output_mask[1], k),
          take_wanted(std::move(to.v), output_mask[2], v),
          take_gradient(std::move(to.alibi_slopes), alibi_slopes, q),
          take_gradient(std::move(to.bias), bias, q),
          take_gradient(output_mask[5] ? std::move(to.sink) : Array(), sink, q)};
}

// NOLINTBEGIN(performance-unnecessary-value-param): the dispatcher passes SymInt by value
Results flash_meta(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, bool, c10::SymInt,
                   c10::SymInt, const MaybeTensor& lengths, std::optional<double>, double,
                   const MaybeTensor& alibi_slopes, const MaybeTensor& mask,
                   const MaybeTensor& bias, const MaybeTensor& sink, const MaybeTensor& block_mask,
                   int64_t, int64_t, double, c10::SymInt, const MaybeTensor& drawn_seed, bool) {
  const Arg args[] = {{kFlash, "q", q}, {kFlash, "k", k}, {kFlash, "v", v}};
  check_qkv(args[0], args[1], args[2]);
  check_qkv_shapes(args[0], args[1], args[2]);
  check_optional(kFlash, "lengths", lengths, 1, q.device());
  check_slopes(kFlash, alibi_slopes, q.device());
  check_score_inputs(mask, bias, q.device());
  check_optional(kFlash, "sink", sink, 1, q.device());
  check_optional(kFlash, "block_mask", block_mask, 3, q.device());
  check_optional(kFlash, "drawn_seed", drawn_seed, 0, q.device());
  return empty_results(q, v);
}
// NOLINTEND(performance-unnecessary-value-param)

#define HEED_VARLEN_ARGS                                                                          \
  bool causal, int64_t window_left, int64_t window_right, std::optional<double> scale,            \
      double softcap, const MaybeTensor &alibi_slopes, const MaybeTensor &sink, double dropout_p, \
      int64_t seed, const MaybeTensor &drawn_seed
#define HEED_VARLEN_NAMES \
  causal, window_left, window_right, scale, softcap, alibi_slopes, sink, dropout_p, seed, drawn_seed

struct HeldVarlen {
  HeldVarlen(const at::Tensor& q, const at::Tensor& cu_q, const at::Tensor& cu_k, HEED_VARLEN_ARGS)
      : held{held_slopes(kVarlen, alibi_slopes, q), held_per_head(kVarlen, "sink", sink, q)} {
    check_tensor({kVarlen, "cu_seqlens_q", cu_q}, 1, q.device());
    check_tensor({kVarlen, "cu_seqlens_k", cu_k}, 1, q.device());
    queries = small_input(cu_q);
    keys = small_input(cu_k);
    options.causal = causal;
    options.window = {window_side(kVarlen, "window[0]", window_left),
                      window_side(kVarlen, "window[1]", window_right)};
    options.scale = scale;
    options.softcap = softcap;
    options.alibi_slopes = view(held[0]);
    options.sink = view(held[1]);
    options.dropout_p = dropout_p;
    options.seed = seed_of(kVarlen, seed, drawn_seed);
  }
  MaybeTensor held[2];
  at::Tensor queries, keys;
  VarlenOptions options;
};

void check_packed(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  check_given({kVarlen, "q", q});
  for (const Arg& arg : {Arg{kVarlen, "q", q}, Arg{kVarlen, "k", k}, Arg{kVarlen, "v", v}}) {
    check_floating(arg, 3, q.device(), q.scalar_type());
  }
}

// As check_qkv_shapes, for rows [T,H,D].
void check_packed_shapes(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  const auto by_head = [](const at::Tensor& t) { return t.unsqueeze(0).transpose(1, 2); };
  const at::Tensor q4 = by_head(q), k4 = by_head(k), v4 = by_head(v);
  check_qkv_shapes({kVarlen, "q", q4}, {kVarlen, "k", k4}, {kVarlen, "v", v4});
}

Results varlen_cpu(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                   const at::Tensor& cu_seqlens_q, const at::Tensor& cu_seqlens_k,
                   HEED_VARLEN_ARGS) {
  check_packed(q, k, v);
  const HeldVarlen held(q, cu_seqlens_q, cu_seqlens_k, HEED_VARLEN_NAMES);
  AttentionResult result;
  guarded([&] {
    result = flash_attention_varlen(view(q), view(k), view(v), view(held.queries), view(held.keys),
                                    held.options, run_options());
  });
  return {take(std::move(result.out), q), take(std::move(result.lse), q)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> varlen_backward_cpu(
    const at::Tensor& grad_out, const MaybeTensor& grad_lse, const at::Tensor& q,
    const at::Tensor& k, const at::Tensor& v, const at::Tensor& out, const at::Tensor& lse,
    const at::Tensor& cu_seqlens_q, const at::Tensor& cu_seqlens_k, HEED_VARLEN_ARGS,
    std::array<bool, 5> output_mask) {
  check_packed(q, k, v);
  const HeldVarlen held(q, cu_seqlens_q, cu_seqlens_k, HEED_VARLEN_NAMES);
  const at::Tensor g = gradient_input(grad_out);
  const MaybeTensor g_lse = gradient_input(grad_lse);
  FlashGradients to;
  guarded([&] {
    to = flash_attention_varlen_backward(
        view(g), view(g_lse), view(q), view(k), view(v), view(out), view(lse), view(held.queries),
        view(held.keys), held.options, run_options(), {.alibi_slopes = output_mask[3]});
  });
  return {take_wanted(std::move(to.q), output_mask[0], q),
          take_wanted(std::move(to.k), output_mask[1], k),
          take_wanted(std::move(to.v), output_mask[2], v),
          take_gradient(std::move(to.alibi_slopes), alibi_slopes, q),
          take_gradient(output_mask[4] ? std::move(to.sink) : Array(), sink, q)};
}

// NOLINTBEGIN(performance-unnecessary-value-param): the dispatcher passes SymInt by value
Results varlen_meta(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                    const at::Tensor& cu_seqlens_q, const at::Tensor& cu_seqlens_k, bool,
                    c10::SymInt, c10::SymInt, std::optional<double>, double,
                    const MaybeTensor& alibi_slopes, const MaybeTensor& sink, double, c10::SymInt,
                    const MaybeTensor& drawn_seed) {
  check_packed(q, k, v);
  check_packed_shapes(q, k, v);
  check_tensor({kVarlen, "cu_seqlens_q", cu_seqlens_q}, 1, q.device());
  check_tensor({kVarlen, "cu_seqlens_k", cu_seqlens_k}, 1, q.device());
  check_slopes(kVarlen, alibi_slopes, q.device());
  check_optional(kVarlen, "sink", sink, 1, q.device());
  check_optional(kVarlen, "drawn_seed", drawn_seed, 0, q.device());
  const c10::SymInt out[] = {q.sym_size(0), q.sym_size(1), v.sym_size(2)};
  const c10::SymInt lse[] = {q.sym_size(1), q.sym_size(0)};
  return {at::empty_symint(out, q.options()),
          at::empty_symint(lse, q.options().dtype(statistics_type(q.scalar_type())))};
}
// NOLINTEND(performance-unnecessary-value-param)

}  // namespace
}  // namespace heed::ops

TORCH_LIBRARY_IMPL(heed, CPU, m) {
  m.impl("flash_attention", &heed::ops::flash_cpu);
  m.impl("flash_attention_backward", &heed::ops::flash_backward_cpu);
  m.impl("flash_attention_varlen", &heed::ops::varlen_cpu);
  m.impl("flash_attention_varlen_backward", &heed::ops::varlen_backward_cpu);
}

TORCH_LIBRARY_IMPL(heed, Meta, m) {
  m.impl("flash_attention", &heed::ops::flash_meta);
  m.impl("flash_attention_varlen", &heed::ops::varlen_meta);
}
