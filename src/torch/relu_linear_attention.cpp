// relu_linear_attention for PyTorch, real and fake.
#include "heed/relu_linear_attention.h"

#include <torch/library.h>

#include <tuple>

#include "torch/adapt.h"

namespace heed::ops {
namespace {

using Results = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

constexpr const char* kReluLinear = "relu_linear_attention";

#define HEED_RELU_LINEAR_INPUTS \
  const at::Tensor &q, const at::Tensor &k, const at::Tensor &v, const at::Tensor &temperature

void check_inputs(HEED_RELU_LINEAR_INPUTS) {
  check_qkv({kReluLinear, "q", q}, {kReluLinear, "k", k}, {kReluLinear, "v", v});
  check_tensor({kReluLinear, "temperature", temperature}, 1, q.device());
}

Results empty_relu_linear(const at::Tensor& q, const at::Tensor& v, bool return_state) {
  const auto shape = state_shape(q, q.sym_size(3), v);
  return {empty_out(q, v), empty_statistic(q, shape, return_state),
          empty_statistic(q, c10::SymIntArrayRef(shape).slice(0, 3), return_state)};
}

Results relu_linear_cpu(HEED_RELU_LINEAR_INPUTS, double clamp, bool return_state) {
  check_inputs(q, k, v, temperature);
  const at::Tensor plain = parameter_input(temperature, q);
  const Results results = empty_relu_linear(q, v, return_state);
  guarded([&] {
    const auto& [out, s, z] = results;
    relu_linear_attention(view(q), view(k), view(v), view(plain), view(out),
                          {view_wanted(s, return_state), view_wanted(z, return_state)}, {clamp, {}},
                          run_options());
  });
  return results;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> relu_linear_backward_cpu(
    const at::Tensor& grad_out, const at::Tensor& s, const at::Tensor& z, HEED_RELU_LINEAR_INPUTS,
    double clamp, bool return_state) {
  check_inputs(q, k, v, temperature);
  const at::Tensor g = gradient_input(grad_out), plain = parameter_input(temperature, q);
  ReluLinearGradients to;
  guarded([&] {
    to = relu_linear_attention_backward(
        view(g), view(q), view(k), view(v), view(plain),
        {clamp, {view_wanted(s, return_state), view_wanted(z, return_state)}}, run_options());
  });
  return {take(std::move(to.q), q), take(std::move(to.k), q), take(std::move(to.v), q),
          take_gradient(std::move(to.temperature), temperature, q)};
}

Results relu_linear_meta(HEED_RELU_LINEAR_INPUTS, double /*clamp*/, bool return_state) {
  check_inputs(q, k, v, temperature);
  check_qkv_shapes({kReluLinear, "q", q}, {kReluLinear, "k", k}, {kReluLinear, "v", v});
  return empty_relu_linear(q, v, return_state);
}

}  // namespace
}  // namespace heed::ops

TORCH_LIBRARY_IMPL(heed, CPU, m) {
  m.impl("relu_linear_attention", &heed::ops::relu_linear_cpu);
  m.impl("relu_linear_attention_backward", &heed::ops::relu_linear_backward_cpu);
}

TORCH_LIBRARY_IMPL(heed, Meta, m) { m.impl("relu_linear_attention", &heed::ops::relu_linear_meta); }
