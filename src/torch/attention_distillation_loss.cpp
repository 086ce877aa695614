// attention_distillation_loss for PyTorch, real and fake.
#include "heed/attention_distillation_loss.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "torch/adapt.h"

namespace heed::ops {
namespace {

constexpr const char* kDistillation = "attention_distillation_loss";

#define HEED_DISTILLATION_INPUTS \
  const at::Tensor &q, const at::Tensor &k, const at::Tensor &feature_q, const at::Tensor &feature_k

// Features may be of another type than q: the kernels check it.
void check_inputs(HEED_DISTILLATION_INPUTS) {
  check_given({kDistillation, "q", q});
  check_floating({kDistillation, "q", q}, 4, q.device(), q.scalar_type());
  check_floating({kDistillation, "k", k}, 4, q.device(), q.scalar_type());
  check_tensor({kDistillation, "feature_q", feature_q}, 4, q.device());
  check_tensor({kDistillation, "feature_k", feature_k}, 4, q.device());
}

// The loss and its gradients for a gradient of 1, in the loss's type; [0] where they are not asked for.
using Results = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
Results empty_distillation(const at::Tensor& q, const at::Tensor& feature_q,
                           const at::Tensor& feature_k, bool gradients) {
  return {empty_statistic(q, {}), empty_statistic(q, feature_q.sym_sizes(), gradients),
          empty_statistic(q, feature_k.sym_sizes(), gradients)};
}

Results distillation_cpu(HEED_DISTILLATION_INPUTS, bool causal, std::optional<double> scale,
                         bool gradients) {
  check_inputs(q, k, feature_q, feature_k);
  const Results results = empty_distillation(q, feature_q, feature_k, gradients);
  const auto& [loss, unit_q, unit_k] = results;
  guarded([&] {
    const DistillationOptions options{causal, scale};
    if (gradients) {
      attention_distillation_loss_with_gradients(view(q), view(k), view(feature_q), view(feature_k),
                                                 view(loss), {view(unit_q), view(unit_k)}, options,
                                                 run_options());
    } else {
      attention_distillation_loss(view(q), view(k), view(feature_q), view(feature_k), view(loss),
                                  options, run_options());
    }
  });
  return results;
}

std::tuple<at::Tensor, at::Tensor> distillation_backward_cpu(const at::Tensor& grad_loss,
                                                             const at::Tensor& unit_feature_q,
                                                             const at::Tensor& unit_feature_k,
                                                             HEED_DISTILLATION_INPUTS, bool causal,
                                                             std::optional<double> scale) {
  check_inputs(q, k, feature_q, feature_k);
  if (unit_feature_q.sizes() == feature_q.sizes() && unit_feature_k.sizes() == feature_k.sizes()) {
    return {unit_feature_q.mul(grad_loss).to(feature_q.scalar_type()),
            unit_feature_k.mul(grad_loss).to(feature_k.scalar_type())};
  }
  DistillationGradients to;
  guarded([&] {
    to = attention_distillation_loss_backward(view(grad_loss), view(q), view(k), view(feature_q),
                                              view(feature_k), {causal, scale}, run_options());
  });
  return {take(std::move(to.feature_q), feature_q), take(std::move(to.feature_k), feature_k)};
}

Results distillation_meta(HEED_DISTILLATION_INPUTS, bool, std::optional<double>, bool gradients) {
  check_inputs(q, k, feature_q, feature_k);
  check_qkv_shapes({kDistillation, "q", q}, {kDistillation, "k", k}, {kDistillation, "k", k});
  check_qkv_shapes({kDistillation, "feature_q", feature_q}, {kDistillation, "feature_k", feature_k},
                   {kDistillation, "feature_k", feature_k});
  return empty_distillation(q, feature_q, feature_k, gradients);
}

}  // namespace
}  // namespace heed::ops

TORCH_LIBRARY_IMPL(heed, CPU, m) {
  m.impl("attention_distillation_loss", &heed::ops::distillation_cpu);
  m.impl("attention_distillation_loss_backward", &heed::ops::distillation_backward_cpu);
}

TORCH_LIBRARY_IMPL(heed, Meta, m) {
  m.impl("attention_distillation_loss", &heed::ops::distillation_meta);
}
