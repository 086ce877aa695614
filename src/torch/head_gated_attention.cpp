// head_gated_attention for PyTorch, real and fake.
#include "heed/head_gated_attention.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "torch/adapt.h"

namespace heed::ops {
namespace {

using MaybeTensor = std::optional<at::Tensor>;
using Results = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

constexpr const char* kGated = "head_gated_attention";

void check_inputs(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                  const at::Tensor& gates) {
  check_qkv({kGated, "q", q}, {kGated, "k", k}, {kGated, "v", v});
  check_tensor({kGated, "gates", gates}, 3, q.device());
}

Results empty_gated(const at::Tensor& q, const at::Tensor& v, bool statistics) {
  auto [out, lse] = empty_results(q, v, statistics);
  return {out, at::empty_symint(statistics ? out.sym_sizes() : lse.sym_sizes(), out.options()),
          lse};
}

Results gated_cpu(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                  const at::Tensor& gates, bool causal, int64_t window_left, int64_t window_right,
                  const MaybeTensor& lengths, std::optional<double> scale, bool statistics) {
  check_inputs(q, k, v, gates);
  const HeldMasks held(kGated, causal, window_left, window_right, lengths, q.device());
  const at::Tensor plain = parameter_input(gates, q);
  Results results = empty_gated(q, v, statistics);
  const auto& [out, attention, lse] = results;
  guarded([&, &out = out, &attention = attention, &lse = lse] {
    head_gated_attention(view(q), view(k), view(v), view(plain), view(out),
                         view_wanted(attention, statistics), view_wanted(lse, statistics),
                         {held.masks, scale}, run_options());
  });
  return results;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> gated_backward_cpu(
    const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
    const at::Tensor& gates, const at::Tensor& attention, const at::Tensor& lse, bool causal,
    int64_t window_left, int64_t window_right, const MaybeTensor& lengths,
    std::optional<double> scale) {
  if (is_left_out(lse)) {
    const auto [_, made_attention, made_lse] =
        gated_cpu(q, k, v, gates, causal, window_left, window_right, lengths, scale, true);
    return gated_backward_cpu(grad_out, q, k, v, gates, made_attention, made_lse, causal,
                              window_left, window_right, lengths, scale);
  }
  check_inputs(q, k, v, gates);
  const HeldMasks held(kGated, causal, window_left, window_right, lengths, q.device());
  const at::Tensor g = gradient_input(grad_out), plain = parameter_input(gates, q);
  HeadGatedGradients to;
  guarded([&] {
    to = head_gated_attention_backward(view(g), view(q), view(k), view(v), view(plain),
                                       view(attention), view(lse), {held.masks, scale},
                                       run_options());
  });
  return {take(std::move(to.q), q), take(std::move(to.k), q), take(std::move(to.v), q),
          take_gradient(std::move(to.gates), gates, q)};
}

// NOLINTBEGIN(performance-unnecessary-value-param): the dispatcher passes SymInt by value
Results gated_meta(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                   const at::Tensor& gates, bool, c10::SymInt, c10::SymInt,
                   const MaybeTensor& lengths, std::optional<double>, bool statistics) {
  check_inputs(q, k, v, gates);
  check_qkv_shapes({kGated, "q", q}, {kGated, "k", k}, {kGated, "v", v});
  check_optional(kGated, "lengths", lengths, 1, q.device());
  for (int64_t axis = 0; axis < 3; ++axis) {
    TORCH_CHECK_VALUE(gates.sym_size(axis) == q.sym_size(axis), kGated, ": gates has shape ",
                      gates.sym_sizes(), " but q has ", q.sym_sizes());
  }
  return empty_gated(q, v, statistics);
}
// NOLINTEND(performance-unnecessary-value-param)

}  // namespace
}  // namespace heed::ops

TORCH_LIBRARY_IMPL(heed, CPU, m) {
  m.impl("head_gated_attention", &heed::ops::gated_cpu);
  m.impl("head_gated_attention_backward", &heed::ops::gated_backward_cpu);
}

TORCH_LIBRARY_IMPL(heed, Meta, m) { m.impl("head_gated_attention", &heed::ops::gated_meta); }
