// recurrent_softmax_attention for PyTorch, real and fake.
#include "heed/recurrent_softmax_attention.h"

#include <torch/library.h>

#include <string_view>
#include <tuple>

#include "torch/adapt.h"

namespace heed::ops {
namespace {

using MaybeTensor = std::optional<at::Tensor>;
using Results = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

constexpr const char* kRecurrent = "recurrent_softmax_attention";

#define HEED_RECURRENT_ARGS                                                                    \
  c10::string_view normalizer, std::optional<int64_t> order, bool causal,                      \
      std::optional<double> scale, const MaybeTensor &gate, std::optional<double> score_clamp, \
      double eps
#define HEED_RECURRENT_NAMES normalizer, order, causal, scale, gate, score_clamp, eps

Normalizer normalizer_of(c10::string_view name) {
  Normalizer parsed = Normalizer::softmax;
  guarded([&] { parsed = parse_normalizer(std::string_view(name.data(), name.size())); });
  return parsed;
}

MaybeTensor checked_gate(const MaybeTensor& gate, const at::Tensor& q) {
  check_optional(kRecurrent, "gate", gate, 3, q.device());
  return parameter_input(gate, q);
}

// `gate` is held by the caller.
RecurrentSoftmaxOptions options_of(HEED_RECURRENT_ARGS) {
  return {.normalizer = normalizer_of(normalizer),
          .order = order,
          .causal = causal,
          .scale = scale,
          .gate = view(gate),
          .score_clamp = score_clamp,
          .eps = eps};
}

Results recurrent_cpu(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                      HEED_RECURRENT_ARGS, bool statistics) {
  check_qkv({kRecurrent, "q", q}, {kRecurrent, "k", k}, {kRecurrent, "v", v});
  const MaybeTensor plain = checked_gate(gate, q);
  const RecurrentSoftmaxOptions options =
      options_of(normalizer, order, causal, scale, plain, score_clamp, eps);
  const Results results = empty_wide_results(q, v, statistics);
  guarded([&] {
    const auto& [out, core, statistic] = results;
    recurrent_softmax_attention(view(q), view(k), view(v), view(out), view_wanted(core, statistics),
                                view_wanted(statistic, statistics), options, run_options());
  });
  return results;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> recurrent_backward_cpu(
    const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
    const at::Tensor& core, const at::Tensor& statistic, HEED_RECURRENT_ARGS) {
  if (is_left_out(statistic)) {
    const auto [_, made_core, made_statistic] = recurrent_cpu(q, k, v, HEED_RECURRENT_NAMES, true);
    return recurrent_backward_cpu(grad_out, q, k, v, made_core, made_statistic,
                                  HEED_RECURRENT_NAMES);
  }
  check_qkv({kRecurrent, "q", q}, {kRecurrent, "k", k}, {kRecurrent, "v", v});
  const MaybeTensor plain = checked_gate(gate, q);
  const RecurrentSoftmaxOptions options =
      options_of(normalizer, order, causal, scale, plain, score_clamp, eps);
  const at::Tensor g = gradient_input(grad_out);
  RecurrentSoftmaxGradients to;
  guarded([&] {
    to = recurrent_softmax_attention_backward(view(g), view(q), view(k), view(v), view(core),
                                              view(statistic), options, run_options());
  });
  return {take(std::move(to.q), q), take(std::move(to.k), k), take(std::move(to.v), v),
          take_gradient(std::move(to.gate), gate, q)};
}

// NOLINTBEGIN(performance-unnecessary-value-param): the dispatcher passes views by value
Results recurrent_meta(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                       c10::string_view normalizer, std::optional<int64_t>, bool,
                       std::optional<double>, const MaybeTensor& gate, std::optional<double>,
                       double, bool statistics) {
  check_qkv({kRecurrent, "q", q}, {kRecurrent, "k", k}, {kRecurrent, "v", v});
  check_qkv_shapes({kRecurrent, "q", q}, {kRecurrent, "k", k}, {kRecurrent, "v", v});
  check_optional(kRecurrent, "gate", gate, 3, q.device());
  normalizer_of(normalizer);
  return empty_wide_results(q, v, statistics);
}
// NOLINTEND(performance-unnecessary-value-param)

}  // namespace
}  // namespace heed::ops

TORCH_LIBRARY_IMPL(heed, CPU, m) {
  m.impl("recurrent_softmax_attention", &heed::ops::recurrent_cpu);
  m.impl("recurrent_softmax_attention_backward", &heed::ops::recurrent_backward_cpu);
}

TORCH_LIBRARY_IMPL(heed, Meta, m) {
  m.impl("recurrent_softmax_attention", &heed::ops::recurrent_meta);
}
