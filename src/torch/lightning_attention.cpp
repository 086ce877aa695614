// lightning_attention and lightning_slopes for PyTorch, real and fake.
#include "heed/lightning_attention.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <array>
#include <string_view>
#include <tuple>

#include "torch/adapt.h"

namespace heed::ops {
namespace {

using MaybeTensor = std::optional<at::Tensor>;
using Results = std::tuple<at::Tensor, at::Tensor>;

constexpr const char* kLightning = "lightning_attention";

#define HEED_LIGHTNING_INPUTS                                                               \
  const at::Tensor &q, const at::Tensor &k, const at::Tensor &v, const MaybeTensor &slopes, \
      const MaybeTensor &initial_state
#define HEED_LIGHTNING_NAMES q, k, v, slopes, initial_state

void check_inputs(HEED_LIGHTNING_INPUTS) {
  check_qkv({kLightning, "q", q}, {kLightning, "k", k}, {kLightning, "v", v});
  check_optional(kLightning, "slopes", slopes, 1, q.device());
  check_optional(kLightning, "initial_state", initial_state, 4, q.device());
}

Results empty_lightning(const at::Tensor& q, const at::Tensor& v, bool return_state) {
  return {empty_out(q, v), empty_statistic(q, state_shape(q, q.sym_size(3), v), return_state)};
}

Results lightning_cpu(HEED_LIGHTNING_INPUTS, bool return_state) {
  check_inputs(HEED_LIGHTNING_NAMES);
  const Results results = empty_lightning(q, v, return_state);
  guarded([&] {
    const auto& [out, state] = results;
    lightning_attention(view(q), view(k), view(v), view(out), view_wanted(state, return_state),
                        {view(slopes), view(initial_state)}, run_options());
  });
  return results;
}

// Memory for the gradients that are wanted.
LightningGradients empty_gradients(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                   const LightningOptions& options,
                                   const std::array<bool, 5>& wanted) {
  const DType statistics = q.scalar_type() == at::kDouble ? DType::f64 : DType::f32;
  const auto array = [&](bool want, const Tensor& like, DType dtype) {
    return want && like.defined() ? Array(dtype, like.shape()) : Array();
  };
  const Tensor inputs[] = {view(q), view(k), view(v)};
  return {array(wanted[0], inputs[0], inputs[0].dtype()),
          array(wanted[1], inputs[1], inputs[1].dtype()),
          array(wanted[2], inputs[2], inputs[2].dtype()),
          array(wanted[3], options.slopes, statistics),
          array(wanted[4], options.initial_state, statistics)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> lightning_backward_cpu(
    const MaybeTensor& grad_out, const MaybeTensor& grad_state, HEED_LIGHTNING_INPUTS,
    bool return_state, std::array<bool, 5> output_mask) {
  check_inputs(HEED_LIGHTNING_NAMES);
  const at::Tensor g = out_gradient(grad_out, q, v);
  LightningGradients to;
  guarded([&] {
    const LightningOptions options{view(slopes), view(initial_state)};
    to = empty_gradients(q, k, v, options, output_mask);
    lightning_attention_backward(
        view(q), view(k), view(v), view(g), view_wanted(grad_state, return_state),
        {to.q, to.k, to.v, to.slopes, to.initial_state}, options, run_options());
  });
  return {take(std::move(to.q), q), take(std::move(to.k), q), take(std::move(to.v), q),
          take_gradient(std::move(to.slopes), slopes, q),
          take_gradient(std::move(to.initial_state), initial_state, q)};
}

Results lightning_meta(HEED_LIGHTNING_INPUTS, bool return_state) {
  check_inputs(HEED_LIGHTNING_NAMES);
  check_qkv_shapes({kLightning, "q", q}, {kLightning, "k", k}, {kLightning, "v", v});
  return empty_lightning(q, v, return_state);
}

at::Tensor slopes_cpu(int64_t num_heads, std::optional<int64_t> layer,
                      std::optional<int64_t> num_layers, c10::string_view form,
                      std::optional<c10::Device> device) {
  check_cpu("lightning_slopes", device);
  Array slopes;
  guarded([&] {
    slopes = lightning_slopes(num_heads, layer, num_layers,
                              parse_lightning_slopes(std::string_view(form.data(), form.size())));
  });
  return take(std::move(slopes), at::empty({0}, at::kFloat));
}

at::Tensor slopes_meta(c10::SymInt num_heads, std::optional<int64_t> /*layer*/,
                       std::optional<int64_t> /*num_layers*/, c10::string_view /*form*/,
                       std::optional<c10::Device> /*device*/) {
  return empty_parameter({std::move(num_heads)});
}

}  // namespace
}  // namespace heed::ops

TORCH_LIBRARY_IMPL(heed, CPU, m) {
  m.impl("lightning_attention", &heed::ops::lightning_cpu);
  m.impl("lightning_attention_backward", &heed::ops::lightning_backward_cpu);
}

TORCH_LIBRARY_IMPL(heed, Meta, m) {
  m.impl("lightning_attention", &heed::ops::lightning_meta);
  m.impl("lightning_slopes", &heed::ops::slopes_meta);
}

// No argument is a tensor, so no device chooses the kernel.
TORCH_LIBRARY_IMPL(heed, CompositeExplicitAutograd, m) {
  m.impl("lightning_slopes", &heed::ops::slopes_cpu);
}
