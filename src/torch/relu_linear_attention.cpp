// relu_linear_attention for PyTorch, real and fake.
#include "heed/relu_linear_attention.h"

#include <torch/library.h>

#include <tuple>

#include "torch/adapt.h"

namespace heed::ops {
namespace {

constexpr const char* kReluLinear = "relu_linear_attention";

#define HEED_RELU_LINEAR_INPUTS \
  const at::Tensor &q, const at::Tensor &k, const at::Tensor &v, const at::Tensor &temperature

void check_inputs(HEED_RELU_LINEAR_INPUTS) {
  check_qkv({kReluLinear, "q", q}, {kReluLinear, "k", k}, {kReluLinear, "v", v});
  check_tensor({kReluLinear, "temperature", temperature}, 1, q.device());
}

at::Tensor relu_linear_cpu(HEED_RELU_LINEAR_INPUTS, double clamp) {
  check_inputs(q, k, v, temperature);
  const at::Tensor out = empty_results(q, v).first, plain = parameter_input(temperature, q);
  guarded([&] {
    relu_linear_attention(view(q), view(k), view(v), view(plain), view(out), {clamp},
                          run_options());
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> relu_linear_backward_cpu(
    const at::Tensor& grad_out, HEED_RELU_LINEAR_INPUTS, double clamp) {
  check_inputs(q, k, v, temperature);
  const at::Tensor g = gradient_input(grad_out), plain = parameter_input(temperature, q);
  ReluLinearGradients to;
  guarded([&] {
    to = relu_linear_attention_backward(view(g), view(q), view(k), view(v), view(plain), {clamp},
                                        run_options());
  });
  return {take(std::move(to.q), q), take(std::move(to.k), q), take(std::move(to.v), q),
          take_gradient(std::move(to.temperature), temperature, q)};
}

at::Tensor relu_linear_meta(HEED_RELU_LINEAR_INPUTS, double /*clamp*/) {
  check_inputs(q, k, v, temperature);
  check_qkv_shapes({kReluLinear, "q", q}, {kReluLinear, "k", k}, {kReluLinear, "v", v});
  return empty_results(q, v).first;
}

}  // namespace
}  // namespace heed::ops

TORCH_LIBRARY_IMPL(heed, CPU, m) {
  m.impl("relu_linear_attention", &heed::ops::relu_linear_cpu);
  m.impl("relu_linear_attention_backward", &heed::ops::relu_linear_backward_cpu);
}

TORCH_LIBRARY_IMPL(heed, Meta, m) { m.impl("relu_linear_attention", &heed::ops::relu_linear_meta); }
