// parallax_attention for PyTorch, real and fake.
#include "heed/parallax_attention.h"

#include <torch/library.h>

#include <tuple>

#include "torch/adapt.h"

namespace heed::ops {
namespace {

using MaybeTensor = std::optional<at::Tensor>;
using FourTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

constexpr const char* kParallax = "parallax_attention";

#define HEED_PARALLAX_ARGS                                                            \
  bool causal, int64_t window_left, int64_t window_right, const MaybeTensor &lengths, \
      std::optional<double> scale
#define HEED_PARALLAX_NAMES causal, window_left, window_right, lengths, scale

void check_inputs(const at::Tensor& q, const at::Tensor& r, const at::Tensor& k,
                  const at::Tensor& v) {
  check_qkv({kParallax, "q", q}, {kParallax, "k", k}, {kParallax, "v", v});
  check_floating({kParallax, "r", r}, 4, q.device(), q.scalar_type());
}

FourTensors empty_parallax(const at::Tensor& q, const at::Tensor& v, bool statistics) {
  auto [out, v_mean, lse] = empty_wide_results(q, v, statistics);
  return {out, v_mean, empty_statistic(q, lse.sym_sizes(), statistics), lse};
}

FourTensors parallax_cpu(const at::Tensor& q, const at::Tensor& r, const at::Tensor& k,
                         const at::Tensor& v, HEED_PARALLAX_ARGS, bool statistics) {
  check_inputs(q, r, k, v);
  const HeldMasks held(kParallax, causal, window_left, window_right, lengths, q.device());
  FourTensors results = empty_parallax(q, v, statistics);
  const auto& [out, v_mean, t_mean, lse] = results;
  guarded([&, &out = out, &v_mean = v_mean, &t_mean = t_mean, &lse = lse] {
    parallax_attention(view(q), view(r), view(k), view(v), view(out),
                       {view_wanted(v_mean, statistics), view_wanted(t_mean, statistics),
                        view_wanted(lse, statistics)},
                       {held.masks, scale}, run_options());
  });
  return results;
}

FourTensors parallax_backward_cpu(const at::Tensor& grad_out, const MaybeTensor& grad_lse,
                                  const at::Tensor& q, const at::Tensor& r, const at::Tensor& k,
                                  const at::Tensor& v, const at::Tensor& out,
                                  const at::Tensor& v_mean, const at::Tensor& t_mean,
                                  const at::Tensor& lse, HEED_PARALLAX_ARGS) {
  if (is_left_out(lse)) {
    const auto [_, made_v_mean, made_t_mean, made_lse] =
        parallax_cpu(q, r, k, v, HEED_PARALLAX_NAMES, true);
    return parallax_backward_cpu(grad_out, {}, q, r, k, v, out, made_v_mean, made_t_mean, made_lse,
                                 HEED_PARALLAX_NAMES);
  }
  check_inputs(q, r, k, v);
  const HeldMasks held(kParallax, causal, window_left, window_right, lengths, q.device());
  const at::Tensor g = gradient_input(grad_out);
  const MaybeTensor g_lse = gradient_input(grad_lse);
  ParallaxGradients to;
  guarded([&] {
    to = parallax_attention_backward(view(g), view(g_lse), view(q), view(r), view(k), view(v),
                                     view(out), {view(v_mean), view(t_mean), view(lse)},
                                     {held.masks, scale}, run_options());
  });
  return {take(std::move(to.q), q), take(std::move(to.r), r), take(std::move(to.k), k),
          take(std::move(to.v), v)};
}

// NOLINTBEGIN(performance-unnecessary-value-param): the dispatcher passes SymInt by value
FourTensors parallax_meta(const at::Tensor& q, const at::Tensor& r, const at::Tensor& k,
                          const at::Tensor& v, bool, c10::SymInt, c10::SymInt,
                          const MaybeTensor& lengths, std::optional<double>, bool statistics) {
  check_inputs(q, r, k, v);
  check_qkv_shapes({kParallax, "q", q}, {kParallax, "k", k}, {kParallax, "v", v});
  TORCH_CHECK_VALUE(r.sym_sizes() == q.sym_sizes(), kParallax, ": r has shape ", r.sym_sizes(),
                    " but q has ", q.sym_sizes());
  check_optional(kParallax, "lengths", lengths, 1, q.device());
  return empty_parallax(q, v, statistics);
}
// NOLINTEND(performance-unnecessary-value-param)

}  // namespace
}  // namespace heed::ops

TORCH_LIBRARY_IMPL(heed, CPU, m) {
  m.impl("parallax_attention", &heed::ops::parallax_cpu);
  m.impl("parallax_attention_backward", &heed::ops::parallax_backward_cpu);
}

TORCH_LIBRARY_IMPL(heed, Meta, m) { m.impl("parallax_attention", &heed::ops::parallax_meta); }
