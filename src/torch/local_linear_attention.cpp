// local_linear_attention for PyTorch, real and fake.
#include "heed/local_linear_attention.h"

#include <torch/library.h>

#include <tuple>

#include "torch/adapt.h"

namespace heed::ops {
namespace {

constexpr const char* kLocal = "local_linear_attention";

at::Tensor local_cpu(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, double ridge,
                     bool causal, std::optional<double> scale) {
  check_qkv({kLocal, "q", q}, {kLocal, "k", k}, {kLocal, "v", v});
  const at::Tensor out = empty_out(q, v);
  guarded([&] {
    local_linear_attention(view(q), view(k), view(v), view(out), {ridge, causal, scale},
                           run_options());
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> local_backward_cpu(
    const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
    double ridge, bool causal, std::optional<double> scale) {
  check_qkv({kLocal, "q", q}, {kLocal, "k", k}, {kLocal, "v", v});
  const at::Tensor g = gradient_input(grad_out);
  LocalLinearGradients to;
  guarded([&] {
    to = local_linear_attention_backward(view(g), view(q), view(k), view(v), {ridge, causal, scale},
                                         run_options());
  });
  return {take(std::move(to.q), q), take(std::move(to.k), k), take(std::move(to.v), v)};
}

at::Tensor local_meta(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, double, bool,
                      std::optional<double>) {
  check_qkv({kLocal, "q", q}, {kLocal, "k", k}, {kLocal, "v", v});
  check_qkv_shapes({kLocal, "q", q}, {kLocal, "k", k}, {kLocal, "v", v});
  return empty_out(q, v);
}

}  // namespace
}  // namespace heed::ops

TORCH_LIBRARY_IMPL(heed, CPU, m) {
  m.impl("local_linear_attention", &heed::ops::local_cpu);
  m.impl("local_linear_attention_backward", &heed::ops::local_backward_cpu);
}

TORCH_LIBRARY_IMPL(heed, Meta, m) { m.impl("local_linear_attention", &heed::ops::local_meta); }
