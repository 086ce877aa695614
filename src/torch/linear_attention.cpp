// linear_attention for PyTorch, real and fake.
#include "heed/linear_attention.h"

#include <torch/library.h>

#include <tuple>

#include "torch/adapt.h"

namespace heed::ops {
namespace {

using MaybeTensor = std::optional<at::Tensor>;
using Results = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

constexpr const char* kLinear = "linear_attention";

#define HEED_LINEAR_INPUTS                                                                    \
  const at::Tensor &q, const at::Tensor &k, const at::Tensor &v, bool causal, bool normalize, \
      double eps, const MaybeTensor &lengths, const MaybeTensor &initial_s,                   \
      const MaybeTensor &initial_z
#define HEED_LINEAR_NAMES q, k, v, causal, normalize, eps, lengths, initial_s, initial_z

void check_inputs(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                  const MaybeTensor& lengths, const MaybeTensor& initial_s,
                  const MaybeTensor& initial_z) {
  check_qkv({kLinear, "q", q}, {kLinear, "k", k}, {kLinear, "v", v});
  check_optional(kLinear, "lengths", lengths, 1, q.device());
  check_optional(kLinear, "initial_state s", initial_s, 4, q.device());
  check_optional(kLinear, "initial_state z", initial_z, 3, q.device());
}

LinearOptions checked_options(HEED_LINEAR_INPUTS) {
  check_inputs(q, k, v, lengths, initial_s, initial_z);
  return {causal, normalize, eps, view(lengths), {view(initial_s), view(initial_z)}, {}};
}

Results empty_linear(const at::Tensor& q, const at::Tensor& v, bool return_s, bool return_z) {
  const auto shape = state_shape(q, q.sym_size(3), v);
  return {empty_out(q, v), empty_statistic(q, shape, return_s),
          empty_statistic(q, c10::SymIntArrayRef(shape).slice(0, 3), return_z)};
}

Results linear_cpu(HEED_LINEAR_INPUTS, bool return_state) {
  const LinearOptions options = checked_options(HEED_LINEAR_NAMES);
  const bool return_z = return_state && normalize;
  const Results results = empty_linear(q, v, return_state, return_z);
  guarded([&] {
    const auto& [out, s, z] = results;
    linear_attention(view(q), view(k), view(v), view(out),
                     {view_wanted(s, return_state), view_wanted(z, return_z)}, options,
                     run_options());
  });
  return results;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> linear_backward_cpu(
    const MaybeTensor& grad_out, const MaybeTensor& grad_s, const MaybeTensor& grad_z,
    const MaybeTensor& s, const MaybeTensor& z, HEED_LINEAR_INPUTS, bool return_state) {
  LinearOptions options = checked_options(HEED_LINEAR_NAMES);
  options.forward_state = {view_wanted(s, return_state), view_wanted(z, return_state && normalize)};
  const at::Tensor g = out_gradient(grad_out, q, v);
  LinearGradients to;
  guarded([&] {
    to = linear_attention_backward(
        view(q), view(k), view(v), view(g),
        {view_wanted(grad_s, return_state), view_wanted(grad_z, return_state && normalize)},
        options, run_options());
  });
  return {take(std::move(to.q), q), take(std::move(to.k), q), take(std::move(to.v), q),
          take_gradient(std::move(to.s), initial_s, q),
          take_gradient(std::move(to.z), initial_z, q)};
}

Results linear_meta(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, bool /*causal*/,
                    bool normalize, double /*eps*/, const MaybeTensor& lengths,
                    const MaybeTensor& initial_s, const MaybeTensor& initial_z, bool return_state) {
  check_inputs(q, k, v, lengths, initial_s, initial_z);
  check_qkv_shapes({kLinear, "q", q}, {kLinear, "k", k}, {kLinear, "v", v});
  return empty_linear(q, v, return_state, return_state && normalize);
}

}  // namespace
}  // namespace heed::ops

TORCH_LIBRARY_IMPL(heed, CPU, m) {
  m.impl("linear_attention", &heed::ops::linear_cpu);
  m.impl("linear_attention_backward", &heed::ops::linear_backward_cpu);
}

TORCH_LIBRARY_IMPL(heed, Meta, m) { m.impl("linear_attention", &heed::ops::linear_meta); }
