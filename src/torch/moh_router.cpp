// moh_router for PyTorch, real and fake.
#include "heed/moh_router.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "torch/adapt.h"

namespace heed::ops {
namespace {

using MaybeTensor = std::optional<at::Tensor>;
using Results = std::tuple<at::Tensor, at::Tensor>;

constexpr const char* kRouter = "moh_router";

void check_inputs(const at::Tensor& x, const at::Tensor& wg, const MaybeTensor& wg_shared,
                  const MaybeTensor& wg_group) {
  check_given({kRouter, "x", x});
  check_floating({kRouter, "x", x}, 3, x.device(), x.scalar_type());
  check_tensor({kRouter, "wg", wg}, 2, x.device());
  check_optional(kRouter, "wg_shared", wg_shared, 2, x.device());
  check_optional(kRouter, "wg_group", wg_group, 2, x.device());
}

MohRouterOptions router_options(int64_t top_k, c10::string_view form) {
  MohRouterOptions options{.top_k = top_k};
  guarded([&] { options.form = parse_moh_form(std::string_view(form.data(), form.size())); });
  return options;
}

Results router_cpu(const at::Tensor& x, const at::Tensor& wg, const MaybeTensor& wg_shared,
                   const MaybeTensor& wg_group, int64_t top_k, c10::string_view form) {
  check_inputs(x, wg, wg_shared, wg_group);
  const MohRouterOptions options = router_options(top_k, form);
  const MaybeTensor plain[] = {parameter_input(wg, x), parameter_input(wg_shared, x),
                               parameter_input(wg_group, x)};
  MohRouting routing;
  guarded([&] {
    routing =
        moh_router(view(x), view(plain[0]), view(plain[1]), view(plain[2]), options, run_options());
  });
  return {take(std::move(routing.gates), x), take(std::move(routing.load_balance_loss), x)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> router_backward_cpu(
    const MaybeTensor& grad_gates, const MaybeTensor& grad_load_balance_loss, const at::Tensor& x,
    const at::Tensor& wg, const MaybeTensor& wg_shared, const MaybeTensor& wg_group, int64_t top_k,
    c10::string_view form) {
  check_inputs(x, wg, wg_shared, wg_group);
  const MohRouterOptions options = router_options(top_k, form);
  const MaybeTensor plain[] = {parameter_input(wg, x), parameter_input(wg_shared, x),
                               parameter_input(wg_group, x)};
  MohRouterGradients to;
  guarded([&] {
    to =
        moh_router_backward(view(grad_gates), view(grad_load_balance_loss), view(x), view(plain[0]),
                            view(plain[1]), view(plain[2]), options, run_options());
  });
  return {take(std::move(to.x), x), take_gradient(std::move(to.wg), wg, x),
          take_gradient(std::move(to.wg_shared), wg_shared, x),
          take_gradient(std::move(to.wg_group), wg_group, x)};
}

// NOLINTBEGIN(performance-unnecessary-value-param): the dispatcher passes views by value
Results router_meta(const at::Tensor& x, const at::Tensor& wg, const MaybeTensor& wg_shared,
                    const MaybeTensor& wg_group, int64_t top_k, c10::string_view form) {
  check_inputs(x, wg, wg_shared, wg_group);
  router_options(top_k, form);
  // One shared head needs no wg_shared; wg_group says that there is one.
  c10::SymInt shared = wg_group && wg_group->defined() ? 1 : 0;
  if (wg_shared && wg_shared->defined()) shared = wg_shared->sym_size(0);
  const c10::SymInt gates[] = {x.sym_size(0), shared + wg.sym_size(0), x.sym_size(1)};
  return {at::empty_symint(gates, x.options()),
          at::empty({}, x.options().dtype(statistics_type(x.scalar_type())))};
}
// NOLINTEND(performance-unnecessary-value-param)

}  // namespace
}  // namespace heed::ops

TORCH_LIBRARY_IMPL(heed, CPU, m) {
  m.impl("moh_router", &heed::ops::router_cpu);
  m.impl("moh_router_backward", &heed::ops::router_backward_cpu);
}

TORCH_LIBRARY_IMPL(heed, Meta, m) { m.impl("moh_router", &heed::ops::router_meta); }
