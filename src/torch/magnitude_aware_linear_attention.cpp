// magnitude_aware_linear_attention for PyTorch, real and fake.
#include "heed/magnitude_aware_linear_attention.h"

#include <torch/library.h>

#include <string_view>
#include <tuple>

#include "torch/adapt.h"

namespace heed::ops {
namespace {

using MaybeTensor = std::optional<at::Tensor>;
using Results = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

constexpr const char* kMagnitudeAware = "magnitude_aware_linear_attention";

#define HEED_MAGNITUDE_AWARE_STATE                                \
  const MaybeTensor &initial_s, const MaybeTensor &initial_k_sum, \
      const MaybeTensor &initial_v_sum, const MaybeTensor &initial_count
#define HEED_MAGNITUDE_AWARE_INPUTS                                                     \
  const at::Tensor &q, const at::Tensor &k, const at::Tensor &v, bool causal,           \
      c10::string_view form, at::OptionalIntArrayRef rope, std::optional<double> scale, \
      double eps, HEED_MAGNITUDE_AWARE_STATE, bool return_state
#define HEED_MAGNITUDE_AWARE_NAMES \
  q, k, v, causal, form, rope, scale, eps, initial_s, initial_k_sum, initial_v_sum, initial_count

MagnitudeAwareForm parse_form(c10::string_view form) {
  MagnitudeAwareForm parsed{};
  guarded([&] { parsed = parse_magnitude_aware_form(std::string_view(form.data(), form.size())); });
  return parsed;
}

void check_inputs(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                  HEED_MAGNITUDE_AWARE_STATE) {
  check_qkv({kMagnitudeAware, "q", q}, {kMagnitudeAware, "k", k}, {kMagnitudeAware, "v", v});
  check_optional(kMagnitudeAware, "initial_state s", initial_s, 4, q.device());
  check_optional(kMagnitudeAware, "initial_state k_sum", initial_k_sum, 3, q.device());
  check_optional(kMagnitudeAware, "initial_state v_sum", initial_v_sum, 3, q.device());
  check_optional(kMagnitudeAware, "initial_state count", initial_count, 1, q.device());
}

void check_rope(size_t numbers) {
  TORCH_CHECK_VALUE(numbers == 2, kMagnitudeAware, ": rope has ", numbers,
                    " numbers, needed are two: the height and width of the grid");
}

MagnitudeAwareOptions options_of(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                 bool causal, c10::string_view form, at::OptionalIntArrayRef rope,
                                 std::optional<double> scale, double eps,
                                 HEED_MAGNITUDE_AWARE_STATE) {
  check_inputs(q, k, v, initial_s, initial_k_sum, initial_v_sum, initial_count);
  MagnitudeAwareOptions options;
  options.causal = causal;
  options.form = parse_form(form);
  if (rope) {
    check_rope(rope->size());
    options.rope = Grid{(*rope)[0], (*rope)[1]};
  }
  options.scale = scale;
  options.eps = eps;
  options.initial_state = {view(initial_s), view(initial_k_sum), view(initial_v_sum),
                           view(initial_count)};
  return options;
}

Results empty_magnitude_aware(const at::Tensor& q, const at::Tensor& v, bool return_state) {
  const auto shape = state_shape(q, q.sym_size(3), v);
  const c10::SymInt v_sum[] = {shape[0], shape[1], shape[3]};
  return {empty_out(q, v), empty_statistic(q, shape, return_state),
          empty_statistic(q, c10::SymIntArrayRef(shape).slice(0, 3), return_state),
          empty_statistic(q, v_sum, return_state),
          empty_statistic(q, c10::SymIntArrayRef(shape).slice(0, 1), return_state)};
}

Results magnitude_aware_cpu(HEED_MAGNITUDE_AWARE_INPUTS) {
  const MagnitudeAwareOptions options = options_of(HEED_MAGNITUDE_AWARE_NAMES);
  const Results results = empty_magnitude_aware(q, v, return_state);
  guarded([&] {
    const auto& [out, s, k_sum, v_sum, count] = results;
    magnitude_aware_linear_attention(
        view(q), view(k), view(v), view(out),
        {view_wanted(s, return_state), view_wanted(k_sum, return_state),
         view_wanted(v_sum, return_state), view_wanted(count, return_state)},
        options, run_options());
  });
  return results;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
magnitude_aware_backward_cpu(const MaybeTensor& grad_out, const MaybeTensor& grad_s,
                             const MaybeTensor& grad_k_sum, const MaybeTensor& grad_v_sum,
                             const MaybeTensor& s, const MaybeTensor& k_sum,
                             const MaybeTensor& v_sum, HEED_MAGNITUDE_AWARE_INPUTS) {
  MagnitudeAwareOptions options = options_of(HEED_MAGNITUDE_AWARE_NAMES);
  options.forward_state = {view_wanted(s, return_state),
                           view_wanted(k_sum, return_state),
                           view_wanted(v_sum, return_state),
                           {}};
  const at::Tensor g = out_gradient(grad_out, q, v);
  MagnitudeAwareGradients to;
  guarded([&] {
    // Without causal it is no state that a caller sees, but what spares this backward a sum.
    const bool state = return_state && causal;
    const MagnitudeAwareState state_gradient = {view_wanted(grad_s, state),
                                                view_wanted(grad_k_sum, state),
                                                view_wanted(grad_v_sum, state),
                                                {}};
    to = magnitude_aware_linear_attention_backward(view(q), view(k), view(v), view(g),
                                                   state_gradient, options, run_options());
  });
  return {take(std::move(to.q), q),
          take(std::move(to.k), q),
          take(std::move(to.v), q),
          take_gradient(std::move(to.s), initial_s, q),
          take_gradient(std::move(to.k_sum), initial_k_sum, q),
          take_gradient(std::move(to.v_sum), initial_v_sum, q)};
}

// NOLINTBEGIN(performance-unnecessary-value-param): the dispatcher passes views by value
Results magnitude_aware_meta(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                             bool /*causal*/, c10::string_view form,
                             at::OptionalSymIntArrayRef rope, std::optional<double>, double,
                             HEED_MAGNITUDE_AWARE_STATE, bool return_state) {
  check_inputs(q, k, v, initial_s, initial_k_sum, initial_v_sum, initial_count);
  check_qkv_shapes({kMagnitudeAware, "q", q}, {kMagnitudeAware, "k", k}, {kMagnitudeAware, "v", v});
  parse_form(form);
  if (rope) check_rope(rope->size());
  return empty_magnitude_aware(q, v, return_state);
}
// NOLINTEND(performance-unnecessary-value-param)

}  // namespace
}  // namespace heed::ops

TORCH_LIBRARY_IMPL(heed, CPU, m) {
  m.impl("magnitude_aware_linear_attention", &heed::ops::magnitude_aware_cpu);
  m.impl("magnitude_aware_linear_attention_backward", &heed::ops::magnitude_aware_backward_cpu);
}

TORCH_LIBRARY_IMPL(heed, Meta, m) {
  m.impl("magnitude_aware_linear_attention", &heed::ops::magnitude_aware_meta);
}
