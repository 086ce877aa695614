// depthwise_causal_conv for PyTorch, real and fake.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "heed/depthwise_conv.h"
#include "torch/adapt.h"

namespace heed::ops {
namespace {

using MaybeTensor = std::optional<at::Tensor>;

constexpr const char* kConv = "depthwise_causal_conv";

void check_inputs(const at::Tensor& x, const at::Tensor& weight, const MaybeTensor& bias) {
  check_given({kConv, "x", x});
  check_floating({kConv, "x", x}, 4, x.device(), x.scalar_type());
  check_tensor({kConv, "weight", weight}, 2, 3, x.device());
  if (bias && bias->defined()) check_tensor({kConv, "bias", *bias}, 1, 2, x.device());
}

at::Tensor conv_cpu(const at::Tensor& x, const at::Tensor& weight, const MaybeTensor& bias) {
  check_inputs(x, weight, bias);
  const MaybeTensor plain[] = {parameter_input(weight, x), parameter_input(bias, x)};
  Array out;
  guarded(
      [&] { out = depthwise_causal_conv(view(x), view(plain[0]), view(plain[1]), run_options()); });
  return take(std::move(out), x);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> conv_backward_cpu(const at::Tensor& grad_out,
                                                                 const at::Tensor& x,
                                                                 const at::Tensor& weight,
                                                                 const MaybeTensor& bias) {
  check_inputs(x, weight, bias);
  const MaybeTensor plain[] = {parameter_input(weight, x), parameter_input(bias, x)};
  DepthwiseConvGradients to;
  guarded([&] {
    to = depthwise_causal_conv_backward(view(grad_out), view(x), view(plain[0]), view(plain[1]),
                                        run_options());
  });
  return {take(std::move(to.x), x), take_gradient(std::move(to.weight), weight, x),
          take_gradient(std::move(to.bias), bias, x)};
}

at::Tensor conv_meta(const at::Tensor& x, const at::Tensor& weight, const MaybeTensor& bias) {
  check_inputs(x, weight, bias);
  return at::empty_symint(x.sym_sizes(), x.options());
}

}  // namespace
}  // namespace heed::ops

TORCH_LIBRARY_IMPL(heed, CPU, m) {
  m.impl("depthwise_causal_conv", &heed::ops::conv_cpu);
  m.impl("depthwise_causal_conv_backward", &heed::ops::conv_backward_cpu);
}

TORCH_LIBRARY_IMPL(heed, Meta, m) { m.impl("depthwise_causal_conv", &heed::ops::conv_meta); }
