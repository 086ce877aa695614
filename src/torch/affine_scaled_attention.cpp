// affine_scaled_attention for PyTorch, real and fake.
#include "heed/affine_scaled_attention.h"

#include <torch/library.h>

#include <tuple>

#include "torch/adapt.h"

namespace heed::ops {
namespace {

using MaybeTensor = std::optional<at::Tensor>;
using Results = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

constexpr const char* kAffine = "affine_scaled_attention";

#define HEED_AFFINE_INPUTS                                                                \
  const at::Tensor &q, const at::Tensor &k, const at::Tensor &v, const at::Tensor &alpha, \
      const at::Tensor &alpha_mean

void check_inputs(HEED_AFFINE_INPUTS) {
  check_qkv({kAffine, "q", q}, {kAffine, "k", k}, {kAffine, "v", v});
  check_tensor({kAffine, "alpha", alpha}, 3, q.device());
  check_tensor({kAffine, "alpha_mean", alpha_mean}, 1, q.device());
}

Results affine_cpu(HEED_AFFINE_INPUTS, bool causal, int64_t window_left, int64_t window_right,
                   const MaybeTensor& lengths, std::optional<double> scale, bool statistics) {
  check_inputs(q, k, v, alpha, alpha_mean);
  const HeldMasks held(kAffine, causal, window_left, window_right, lengths, q.device());
  const at::Tensor plain[] = {parameter_input(alpha, q), parameter_input(alpha_mean, q)};
  const Results results = empty_wide_results(q, v, statistics);
  guarded([&] {
    const auto& [out, softmax_out, lse] = results;
    affine_scaled_attention(view(q), view(k), view(v), view(plain[0]), view(plain[1]), view(out),
                            view_wanted(softmax_out, statistics), view_wanted(lse, statistics),
                            {held.masks, scale}, run_options());
  });
  return results;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> affine_backward_cpu(
    const at::Tensor& grad_out, HEED_AFFINE_INPUTS, const at::Tensor& softmax_out,
    const at::Tensor& lse, bool causal, int64_t window_left, int64_t window_right,
    const MaybeTensor& lengths, std::optional<double> scale) {
  if (is_left_out(lse)) {
    const auto [_, made_softmax_out, made_lse] = affine_cpu(
        q, k, v, alpha, alpha_mean, causal, window_left, window_right, lengths, scale, true);
    return affine_backward_cpu(grad_out, q, k, v, alpha, alpha_mean, made_softmax_out, made_lse,
                               causal, window_left, window_right, lengths, scale);
  }
  check_inputs(q, k, v, alpha, alpha_mean);
  const HeldMasks held(kAffine, causal, window_left, window_right, lengths, q.device());
  const at::Tensor g = gradient_input(grad_out);
  const at::Tensor plain[] = {parameter_input(alpha, q), parameter_input(alpha_mean, q)};
  AffineScaledGradients to;
  guarded([&] {
    to = affine_scaled_attention_backward(view(g), view(q), view(k), view(v), view(plain[0]),
                                          view(plain[1]), view(softmax_out), view(lse),
                                          {held.masks, scale}, run_options());
  });
  return {take(std::move(to.q), q), take(std::move(to.k), k), take(std::move(to.v), v),
          take_gradient(std::move(to.alpha), alpha, q),
          take_gradient(std::move(to.alpha_mean), alpha_mean, q)};
}

// NOLINTBEGIN(performance-unnecessary-value-param): the dispatcher passes SymInt by value
Results affine_meta(HEED_AFFINE_INPUTS, bool, c10::SymInt, c10::SymInt, const MaybeTensor& lengths,
                    std::optional<double>, bool statistics) {
  check_inputs(q, k, v, alpha, alpha_mean);
  check_qkv_shapes({kAffine, "q", q}, {kAffine, "k", k}, {kAffine, "v", v});
  check_optional(kAffine, "lengths", lengths, 1, q.device());
  return empty_wide_results(q, v, statistics);
}
// NOLINTEND(performance-unnecessary-value-param)

}  // namespace
}  // namespace heed::ops

TORCH_LIBRARY_IMPL(heed, CPU, m) {
  m.impl("affine_scaled_attention", &heed::ops::affine_cpu);
  m.impl("affine_scaled_attention_backward", &heed::ops::affine_backward_cpu);
}

TORCH_LIBRARY_IMPL(heed, Meta, m) { m.impl("affine_scaled_attention", &heed::ops::affine_meta); }
