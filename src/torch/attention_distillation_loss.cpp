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

at::Tensor distillation_cpu(HEED_DISTILLATION_INPUTS, bool causal, std::optional<double> scale) {
  check_inputs(q, k, feature_q, feature_k);
  const at::Tensor loss = empty_statistic(q, {});
  guarded([&] {
    attention_distillation_loss(view(q), view(k), view(feature_q), view(feature_k), view(loss),
                                {causal, scale}, run_options());
  });
  return loss;
}

std::tuple<at::Tensor, at::Tensor> distillation_backward_cpu(const at::Tensor& grad_loss,
                                                             HEED_DISTILLATION_INPUTS, bool causal,
                                                             std::optional<double> scale) {
  check_inputs(q, k, feature_q, feature_k);
  DistillationGradients to;
  guarded([&] {
    to = attention_distillation_loss_backward(view(grad_loss), view(q), view(k), view(feature_q),
                                              view(feature_k), {causal, scale}, run_options());
  });
  return {take(std::move(to.feature_q), feature_q), take(std::move(to.feature_k), feature_k)};
}

at::Tensor distillation_meta(HEED_DISTILLATION_INPUTS, bool, std::optional<double>) {
  check_inputs(q, k, feature_q, feature_k);
  check_qkv_shapes({kDistillation, "q", q}, {kDistillation, "k", k}, {kDistillation, "k", k});
  check_qkv_shapes({kDistillation, "feature_q", feature_q}, {kDistillation, "feature_k", feature_k},
                   {kDistillation, "feature_k", feature_k});
  return empty_statistic(q, {});
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
