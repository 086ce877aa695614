// stochastic_attention and random_permutation for PyTorch, real and fake.
#include "heed/stochastic_attention.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "torch/adapt.h"

namespace heed::ops {
namespace {

using MaybeTensor = std::optional<at::Tensor>;
using Results = std::tuple<at::Tensor, at::Tensor>;

constexpr const char* kStochastic = "stochastic_attention";

void check_inputs(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                  const at::Tensor& permutation) {
  check_qkv({kStochastic, "q", q}, {kStochastic, "k", k}, {kStochastic, "v", v});
  check_tensor({kStochastic, "permutation", permutation}, 1, 3, q.device());
}

Results stochastic_cpu(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                       const at::Tensor& permutation, int64_t window, bool causal,
                       std::optional<double> scale) {
  check_inputs(q, k, v, permutation);
  auto [out, lse] = empty_results(q, v);
  guarded([&, &out = out, &lse = lse] {
    stochastic_attention(view(q), view(k), view(v), view(permutation), view(out), view(lse),
                         {window, causal, scale}, run_options());
  });
  return {out, lse};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> stochastic_backward_cpu(
    const at::Tensor& grad_out, const MaybeTensor& grad_lse, const at::Tensor& q,
    const at::Tensor& k, const at::Tensor& v, const at::Tensor& permutation, const at::Tensor& out,
    const at::Tensor& lse, int64_t window, bool causal, std::optional<double> scale) {
  check_inputs(q, k, v, permutation);
  const at::Tensor g = gradient_input(grad_out);
  const MaybeTensor g_lse = gradient_input(grad_lse);
  StochasticGradients to;
  guarded([&] {
    to = stochastic_attention_backward(view(g), view(g_lse), view(q), view(k), view(v),
                                       view(permutation), view(out), view(lse),
                                       {window, causal, scale}, run_options());
  });
  return {take(std::move(to.q), q), take(std::move(to.k), q), take(std::move(to.v), q)};
}

// NOLINTBEGIN(performance-unnecessary-value-param): the dispatcher passes SymInt by value
Results stochastic_meta(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                        const at::Tensor& permutation, c10::SymInt, bool, std::optional<double>) {
  check_inputs(q, k, v, permutation);
  check_qkv_shapes({kStochastic, "q", q}, {kStochastic, "k", k}, {kStochastic, "v", v});
  TORCH_CHECK_VALUE(k.sym_size(2) == q.sym_size(2), kStochastic, ": k has length ", k.sym_size(2),
                    " but q has ", q.sym_size(2));
  TORCH_CHECK_VALUE(permutation.sym_size(-1) == q.sym_size(2), kStochastic,
                    ": permutation has length ", permutation.sym_size(-1), " but q has ",
                    q.sym_size(2));
  return empty_results(q, v);
}
// NOLINTEND(performance-unnecessary-value-param)

at::Tensor permutation_cpu(int64_t seed, at::IntArrayRef shape, std::optional<c10::Device> device) {
  check_cpu("random_permutation", device);
  Array slots;
  guarded([&] {
    slots = random_permutation(static_cast<uint64_t>(seed), Dims({shape.data(), shape.size()}));
  });
  return take(std::move(slots), at::empty({0}, at::kLong));
}

at::Tensor permutation_meta(const c10::SymInt& /*seed*/, c10::SymIntArrayRef shape,
                            std::optional<c10::Device> /*device*/) {
  return empty_parameter(shape, at::kLong);
}

}  // namespace
}  // namespace heed::ops

TORCH_LIBRARY_IMPL(heed, CPU, m) {
  m.impl("stochastic_attention", &heed::ops::stochastic_cpu);
  m.impl("stochastic_attention_backward", &heed::ops::stochastic_backward_cpu);
}

TORCH_LIBRARY_IMPL(heed, Meta, m) {
  m.impl("stochastic_attention", &heed::ops::stochastic_meta);
  m.impl("random_permutation", &heed::ops::permutation_meta);
}

// No argument is a tensor, so no device chooses the kernel.
TORCH_LIBRARY_IMPL(heed, CompositeExplicitAutograd, m) {
  m.impl("random_permutation", &heed::ops::permutation_cpu);
}
