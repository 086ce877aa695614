// taylor_state_attention for PyTorch, real and fake.
#include "heed/taylor_state_attention.h"

#include <torch/library.h>

#include <tuple>

#include "torch/adapt.h"

namespace heed::ops {
namespace {

using MaybeTensor = std::optional<at::Tensor>;
using Results = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

constexpr const char* kTaylor = "taylor_state_attention";

#define HEED_TAYLOR_INPUTS                                                      \
  const at::Tensor &q, const at::Tensor &k, const at::Tensor &v, int64_t order, \
      std::optional<double> scale, const MaybeTensor &initial_s, const MaybeTensor &initial_z
#define HEED_TAYLOR_NAMES q, k, v, order, scale, initial_s, initial_z

// Order and head dim are checked here because they say how much memory the results need.
void check_inputs(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, int64_t order,
                  const MaybeTensor& initial_s, const MaybeTensor& initial_z) {
  check_qkv({kTaylor, "q", q}, {kTaylor, "k", k}, {kTaylor, "v", v});
  check_optional(kTaylor, "initial_state s", initial_s, 4, q.device());
  check_optional(kTaylor, "initial_state z", initial_z, 3, q.device());
  TORCH_CHECK_VALUE(order >= 0 && order <= 3, kTaylor, ": order is ", order, ", needed is 0 to 3");
  TORCH_CHECK_VALUE(q.sym_size(3) <= 256, kTaylor, ": q has head dim ", q.sym_size(3),
                    ", needed is 1 to 256");
}

TaylorOptions checked_options(HEED_TAYLOR_INPUTS) {
  check_inputs(q, k, v, order, initial_s, initial_z);
  return {order, scale, {view(initial_s), view(initial_z)}};
}

Results empty_taylor(const at::Tensor& q, const at::Tensor& v, int64_t order, bool return_state) {
  c10::SymInt monomials = 1;  // taylor_state_size, for symbolic head dims too
  for (int64_t i = 1; i <= order; ++i) monomials = monomials * (q.sym_size(3) + i) / i;
  const auto shape = state_shape(q, monomials, v);
  return {empty_out(q, v), empty_statistic(q, shape, return_state),
          empty_statistic(q, c10::SymIntArrayRef(shape).slice(0, 3), return_state)};
}

Results taylor_cpu(HEED_TAYLOR_INPUTS, bool return_state) {
  const TaylorOptions options = checked_options(HEED_TAYLOR_NAMES);
  const Results results = empty_taylor(q, v, order, return_state);
  guarded([&] {
    const auto& [out, s, z] = results;
    taylor_state_attention(view(q), view(k), view(v), view(out),
                           {view_wanted(s, return_state), view_wanted(z, return_state)}, options,
                           run_options());
  });
  return results;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> taylor_backward_cpu(
    const MaybeTensor& grad_out, const MaybeTensor& grad_s, const MaybeTensor& grad_z,
    HEED_TAYLOR_INPUTS, bool return_state) {
  const TaylorOptions options = checked_options(HEED_TAYLOR_NAMES);
  const at::Tensor g = out_gradient(grad_out, q, v);
  TaylorGradients to;
  guarded([&] {
    to = taylor_state_attention_backward(
        view(q), view(k), view(v), view(g),
        {view_wanted(grad_s, return_state), view_wanted(grad_z, return_state)}, options,
        run_options());
  });
  return {take(std::move(to.q), q), take(std::move(to.k), q), take(std::move(to.v), q),
          take_gradient(std::move(to.s), initial_s, q),
          take_gradient(std::move(to.z), initial_z, q)};
}

Results taylor_meta(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, int64_t order,
                    std::optional<double> /*scale*/, const MaybeTensor& initial_s,
                    const MaybeTensor& initial_z, bool return_state) {
  check_inputs(q, k, v, order, initial_s, initial_z);
  check_qkv_shapes({kTaylor, "q", q}, {kTaylor, "k", k}, {kTaylor, "v", v});
  return empty_taylor(q, v, order, return_state);
}

}  // namespace
}  // namespace heed::ops

TORCH_LIBRARY_IMPL(heed, CPU, m) {
  m.impl("taylor_state_attention", &heed::ops::taylor_cpu);
  m.impl("taylor_state_attention_backward", &heed::ops::taylor_backward_cpu);
}

TORCH_LIBRARY_IMPL(heed, Meta, m) { m.impl("taylor_state_attention", &heed::ops::taylor_meta); }
