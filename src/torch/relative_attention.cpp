// relative_attention for PyTorch, real and fake.
#include "heed/relative_attention.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "torch/adapt.h"

namespace heed::ops {
namespace {

using MaybeTensor = std::optional<at::Tensor>;
using Results = std::tuple<at::Tensor, at::Tensor>;

constexpr const char* kRelative = "relative_attention";

#define HEED_RELATIVE_INPUTS                                                                \
  const at::Tensor &q, const at::Tensor &k, const at::Tensor &v, const at::Tensor &rel_key, \
      const at::Tensor &rel_bias, const at::Tensor &content_bias

void check_inputs(HEED_RELATIVE_INPUTS) {
  check_qkv({kRelative, "q", q}, {kRelative, "k", k}, {kRelative, "v", v});
  check_tensor({kRelative, "rel_key", rel_key}, 3, q.device());
  check_tensor({kRelative, "rel_bias", rel_bias}, 2, q.device());
  check_tensor({kRelative, "content_bias", content_bias}, 2, q.device());
}

// The kernels check types and sizes of the tables; views of any strides will do.
Results relative_cpu(HEED_RELATIVE_INPUTS, bool causal, std::optional<double> scale) {
  check_inputs(q, k, v, rel_key, rel_bias, content_bias);
  const at::Tensor plain[] = {parameter_input(rel_key, q), parameter_input(rel_bias, q),
                              parameter_input(content_bias, q)};
  auto [out, lse] = empty_results(q, v);
  guarded([&, &out = out, &lse = lse] {
    relative_attention(view(q), view(k), view(v), view(plain[0]), view(plain[1]), view(plain[2]),
                       view(out), view(lse), {causal, scale}, run_options());
  });
  return {out, lse};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
relative_backward_cpu(const at::Tensor& grad_out, const MaybeTensor& grad_lse, HEED_RELATIVE_INPUTS,
                      const at::Tensor& out, const at::Tensor& lse, bool causal,
                      std::optional<double> scale) {
  check_inputs(q, k, v, rel_key, rel_bias, content_bias);
  const at::Tensor g = gradient_input(grad_out);
  const MaybeTensor g_lse = gradient_input(grad_lse);
  const at::Tensor plain[] = {parameter_input(rel_key, q), parameter_input(rel_bias, q),
                              parameter_input(content_bias, q)};
  RelativeGradients to;
  guarded([&] {
    to = relative_attention_backward(view(g), view(g_lse), view(q), view(k), view(v),
                                     view(plain[0]), view(plain[1]), view(plain[2]), view(out),
                                     view(lse), {causal, scale}, run_options());
  });
  return {take(std::move(to.q), q),
          take(std::move(to.k), k),
          take(std::move(to.v), v),
          take_gradient(std::move(to.rel_key), rel_key, q),
          take_gradient(std::move(to.rel_bias), rel_bias, q),
          take_gradient(std::move(to.content_bias), content_bias, q)};
}

Results relative_meta(HEED_RELATIVE_INPUTS, bool causal, std::optional<double>) {
  check_inputs(q, k, v, rel_key, rel_bias, content_bias);
  check_qkv_shapes({kRelative, "q", q}, {kRelative, "k", k}, {kRelative, "v", v});
  const c10::SymInt rows = rel_key.sym_size(0);
  const auto same = [&](const char* name, const at::Tensor& t, c10::SymIntArrayRef shape) {
    TORCH_CHECK_VALUE(t.sym_sizes() == shape, kRelative, ": ", name, " has shape ", t.sym_sizes(),
                      ", needed is ", shape);
  };
  const c10::SymInt distances = rows / 2, queries = q.sym_size(2), keys = k.sym_size(2);
  const bool enough = queries == 0 || keys == 0 ||
                      (distances >= keys - 1 && distances >= (causal ? c10::SymInt(1) : queries));
  TORCH_CHECK_VALUE(rows % 2 == 0 && enough, kRelative, ": rel_key has ", rows,
                    " rows, needed are 2P with P >= Lk - 1 = ", keys - 1,
                    causal ? "" : " and, without the causal mask, P >= Lq");
  const c10::SymInt shape[] = {rows, q.sym_size(1), q.sym_size(3)};
  same("rel_key", rel_key, shape);
  same("rel_bias", rel_bias, c10::SymIntArrayRef(shape, 2));
  same("content_bias", content_bias, c10::SymIntArrayRef(shape + 1, 2));
  return empty_results(q, v);
}

}  // namespace
}  // namespace heed::ops

TORCH_LIBRARY_IMPL(heed, CPU, m) {
  m.impl("relative_attention", &heed::ops::relative_cpu);
  m.impl("relative_attention_backward", &heed::ops::relative_backward_cpu);
}

TORCH_LIBRARY_IMPL(heed, Meta, m) { m.impl("relative_attention", &heed::ops::relative_meta); }
