// decode_attention and merge_attention for PyTorch, real and fake.
#include <torch/library.h>

#include <tuple>

#include "heed/flash_attention.h"
#include "torch/adapt.h"

namespace heed::ops {
namespace {

using Results = std::tuple<at::Tensor, at::Tensor>;
using MaybeTensor = std::optional<at::Tensor>;

constexpr const char* kDecode = "decode_attention";
constexpr const char* kMerge = "merge_attention";

void check_decode(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                  const at::Tensor& lengths) {
  check_qkv({kDecode, "q", q}, {kDecode, "k_cache", k}, {kDecode, "v_cache", v});
  check_tensor({kDecode, "lengths", lengths}, 1, q.device());
}

Results decode_cpu(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                   const at::Tensor& lengths, std::optional<double> scale, int64_t window,
                   const MaybeTensor& sink, int64_t splits, double softcap,
                   const MaybeTensor& alibi_slopes) {
  check_decode(q, k, v, lengths);
  const MaybeTensor held[] = {held_per_head(kDecode, "sink", sink, q),
                              held_slopes(kDecode, alibi_slopes, q)};
  const DecodeOptions options{.scale = scale,
                              .window = window_side(kDecode, "window", window),
                              .splits = splits,
                              .sink = view(held[0]),
                              .softcap = softcap,
                              .alibi_slopes = view(held[1])};
  const at::Tensor plain_lengths = small_input(lengths);
  auto [out, lse] = empty_results(q, v);
  guarded([&, &out = out, &lse = lse] {
    decode_attention(view(q), view(k), view(v), view(plain_lengths), view(out), view(lse), options,
                     run_options());
  });
  return {out, lse};
}

// NOLINTBEGIN(performance-unnecessary-value-param): the dispatcher passes SymInt by value
Results decode_meta(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                    const at::Tensor& lengths, std::optional<double>, c10::SymInt,
                    const MaybeTensor& sink, int64_t, double, const MaybeTensor& alibi_slopes) {
  check_optional(kDecode, "sink", sink, 1, q.device());
  check_slopes(kDecode, alibi_slopes, q.device());
  check_decode(q, k, v, lengths);
  check_qkv_shapes({kDecode, "q", q}, {kDecode, "k_cache", k}, {kDecode, "v_cache", v});
  return empty_results(q, v);
}
// NOLINTEND(performance-unnecessary-value-param)

void check_merge(const at::Tensor& out_a, const at::Tensor& lse_a, const at::Tensor& out_b,
                 const at::Tensor& lse_b) {
  check_given({kMerge, "out_a", out_a});
  const at::ScalarType type = out_a.scalar_type();
  check_floating({kMerge, "out_a", out_a}, 4, out_a.device(), type);
  check_tensor({kMerge, "lse_a", lse_a}, 3, out_a.device());
  check_floating({kMerge, "out_b", out_b}, 4, out_a.device(), type);
  check_tensor({kMerge, "lse_b", lse_b}, 3, out_a.device());
}

Results empty_merged(const at::Tensor& out_a) { return empty_results(out_a, out_a); }

Results merge_cpu(const at::Tensor& out_a, const at::Tensor& lse_a, const at::Tensor& out_b,
                  const at::Tensor& lse_b) {
  check_merge(out_a, lse_a, out_b, lse_b);
  const at::Tensor plain[] = {small_input(out_a), small_input(lse_a), small_input(out_b),
                              small_input(lse_b)};
  auto [out, lse] = empty_merged(out_a);
  guarded([&, &out = out, &lse = lse] {
    merge_attention(view(plain[0]), view(plain[1]), view(plain[2]), view(plain[3]), view(out),
                    view(lse), run_options());
  });
  return {out, lse};
}

Results merge_meta(const at::Tensor& out_a, const at::Tensor& lse_a, const at::Tensor& out_b,
                   const at::Tensor& lse_b) {
  check_merge(out_a, lse_a, out_b, lse_b);
  TORCH_CHECK_VALUE(out_b.sym_sizes() == out_a.sym_sizes(), kMerge, ": out_b has shape ",
                    out_b.sym_sizes(), " but out_a has ", out_a.sym_sizes());
  return empty_merged(out_a);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> merge_backward_cpu(
    const at::Tensor& grad_out, const MaybeTensor& grad_lse, const at::Tensor& out_a,
    const at::Tensor& lse_a, const at::Tensor& out_b, const at::Tensor& lse_b) {
  check_merge(out_a, lse_a, out_b, lse_b);
  const at::Tensor plain[] = {small_input(out_a), small_input(lse_a), small_input(out_b),
                              small_input(lse_b), grad_out.contiguous()};
  const MaybeTensor g_lse = gradient_input(grad_lse);
  MergeGradients to;
  guarded([&] {
    to = merge_attention_backward(view(plain[4]), view(g_lse), view(plain[0]), view(plain[1]),
                                  view(plain[2]), view(plain[3]), run_options());
  });
  return {take(std::move(to.out_a), out_a), take(std::move(to.lse_a), lse_a),
          take(std::move(to.out_b), out_b), take(std::move(to.lse_b), lse_b)};
}

}  // namespace
}  // namespace heed::ops

TORCH_LIBRARY_IMPL(heed, CPU, m) {
  m.impl("decode_attention", &heed::ops::decode_cpu);
  m.impl("merge_attention", &heed::ops::merge_cpu);
  m.impl("merge_attention_backward", &heed::ops::merge_backward_cpu);
}

TORCH_LIBRARY_IMPL(heed, Meta, m) {
  m.impl("decode_attention", &heed::ops::decode_meta);
  m.impl("merge_attention", &heed::ops::merge_meta);
}
