// kernelized_rpe_attention for PyTorch, real and fake.
#include "heed/kernelized_rpe_attention.h"

#include <torch/library.h>

#include <string_view>
#include <tuple>

#include "torch/adapt.h"

namespace heed::ops {
namespace {

using MaybeTensor = std::optional<at::Tensor>;

constexpr const char* kRpe = "kernelized_rpe_attention";

#define HEED_RPE_INPUTS                                                                 \
  const at::Tensor &q, const at::Tensor &k, const at::Tensor &v, const at::Tensor &rpb, \
      const MaybeTensor &projection, c10::string_view features, bool causal
#define HEED_RPE_NAMES q, k, v, rpb, projection, features, causal

// `on_grid`: a grid of `numbers` numbers is given.
KernelizedRpeOptions checked_options(HEED_RPE_INPUTS, bool on_grid, size_t numbers,
                                     c10::string_view path) {
  check_qkv({kRpe, "q", q}, {kRpe, "k", k}, {kRpe, "v", v});
  TORCH_CHECK_VALUE(!on_grid || numbers == 2, kRpe, ": grid has ", numbers,
                    " numbers, needed are two: rows and columns");
  check_tensor({kRpe, "rpb", rpb}, on_grid ? 3 : 2, q.device());
  check_optional(kRpe, "projection", projection, 3, q.device());
  KernelizedRpeOptions options;
  options.causal = causal;
  guarded([&] {
    options.features = parse_rpe_features(std::string_view(features.data(), features.size()));
    options.path = parse_rpe_path(std::string_view(path.data(), path.size()));
  });
  return options;
}

KernelizedRpeOptions options_of(HEED_RPE_INPUTS, at::OptionalIntArrayRef grid,
                                c10::string_view path) {
  const size_t numbers = grid ? grid->size() : 0;
  KernelizedRpeOptions options = checked_options(HEED_RPE_NAMES, grid.has_value(), numbers, path);
  if (grid) options.grid = std::array<int64_t, 2>{(*grid)[0], (*grid)[1]};
  return options;
}

at::Tensor rpe_cpu(HEED_RPE_INPUTS, at::OptionalIntArrayRef grid, c10::string_view path) {
  const KernelizedRpeOptions options = options_of(HEED_RPE_NAMES, grid, path);
  const MaybeTensor plain[] = {parameter_input(rpb, q), parameter_input(projection, q)};
  const at::Tensor out = empty_out(q, v);
  guarded([&] {
    kernelized_rpe_attention(view(q), view(k), view(v), view(plain[0]), view(plain[1]), view(out),
                             options, run_options());
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> rpe_backward_cpu(
    const at::Tensor& grad_out, HEED_RPE_INPUTS, at::OptionalIntArrayRef grid,
    c10::string_view path) {
  const KernelizedRpeOptions options = options_of(HEED_RPE_NAMES, grid, path);
  const at::Tensor g = gradient_input(grad_out);
  const MaybeTensor plain[] = {parameter_input(rpb, q), parameter_input(projection, q)};
  KernelizedRpeGradients to;
  guarded([&] {
    to = kernelized_rpe_attention_backward(view(g), view(q), view(k), view(v), view(plain[0]),
                                           view(plain[1]), options, run_options());
  });
  return {take(std::move(to.q), q), take(std::move(to.k), q), take(std::move(to.v), q),
          take_gradient(std::move(to.rpb), rpb, q)};
}

// NOLINTBEGIN(performance-unnecessary-value-param): the dispatcher passes views by value
at::Tensor rpe_meta(HEED_RPE_INPUTS, at::OptionalSymIntArrayRef grid, c10::string_view path) {
  checked_options(HEED_RPE_NAMES, grid.has_value(), grid ? grid->size() : 0, path);
  check_qkv_shapes({kRpe, "q", q}, {kRpe, "k", k}, {kRpe, "v", v});
  TORCH_CHECK_VALUE(k.sym_size(2) == q.sym_size(2), kRpe, ": k has length ", k.sym_size(2),
                    " but q has ", q.sym_size(2));
  return empty_out(q, v);
}
// NOLINTEND(performance-unnecessary-value-param)

}  // namespace
}  // namespace heed::ops

TORCH_LIBRARY_IMPL(heed, CPU, m) {
  m.impl("kernelized_rpe_attention", &heed::ops::rpe_cpu);
  m.impl("kernelized_rpe_attention_backward", &heed::ops::rpe_backward_cpu);
}

TORCH_LIBRARY_IMPL(heed, Meta, m) { m.impl("kernelized_rpe_attention", &heed::ops::rpe_meta); }
