// na1d, na2d and na3d for PyTorch, real and fake.
#include "heed/neighborhood_attention.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <string>
#include <tuple>

#include "torch/adapt.h"

namespace heed::ops {
namespace {

using MaybeTensor = std::optional<at::Tensor>;
using Results = std::tuple<at::Tensor, at::Tensor>;
using Gradients =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

template <int kAxes>
struct Grid;
template <>
struct Grid<1> {
  static constexpr const char* kName = "na1d";
  static constexpr auto kForward =
      static_cast<void (*)(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                           const Tensor&, const NeighborhoodOptions&, const RunOptions&)>(&na1d);
  static constexpr auto kBackward = &na1d_backward;
};
template <>
struct Grid<2> {
  static constexpr const char* kName = "na2d";
  static constexpr auto kForward =
      static_cast<void (*)(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                           const Tensor&, const NeighborhoodOptions&, const RunOptions&)>(&na2d);
  static constexpr auto kBackward = &na2d_backward;
};
template <>
struct Grid<3> {
  static constexpr const char* kName = "na3d";
  static constexpr auto kForward =
      static_cast<void (*)(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                           const Tensor&, const NeighborhoodOptions&, const RunOptions&)>(&na3d);
  static constexpr auto kBackward = &na3d_backward;
};

#define HEED_GRID_OPTIONS                                                                         \
  at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef dilation,                  \
      at::IntArrayRef is_causal, std::optional<double> scale, const MaybeTensor &additional_keys, \
      const MaybeTensor &additional_values, const MaybeTensor &rpb

void check_inputs(const char* op, int64_t axes, const at::Tensor& query, const at::Tensor& key,
                  const at::Tensor& value, const MaybeTensor& additional_keys,
                  const MaybeTensor& additional_values, const MaybeTensor& rpb) {
  check_given({op, "query", query});
  const auto device = query.device();
  const auto dtype = query.scalar_type();
  check_floating({op, "query", query}, axes + 3, device, dtype);
  check_floating({op, "key", key}, axes + 3, device, dtype);
  check_floating({op, "value", value}, axes + 3, device, dtype);
  check_optional(op, "additional_keys", additional_keys, 4, device);
  check_optional(op, "additional_values", additional_values, 4, device);
  check_optional(op, "rpb", rpb, axes + 1, device);
}

/// Options of a call; holds what their views point to.
struct HeldOptions {
  HeldOptions(const char* op, int64_t axes, const at::Tensor& query, HEED_GRID_OPTIONS)
      : keys(held_input(op, "additional_keys", additional_keys, 4, query.device())),
        values(held_input(op, "additional_values", additional_values, 4, query.device())),
        table(held_input(op, "rpb", rpb, axes + 1, query.device())) {
    options.kernel_size = kernel_size.vec();
    options.stride = stride.vec();
    options.dilation = dilation.vec();
    options.is_causal.assign(is_causal.begin(), is_causal.end());
    options.scale = scale;
    options.additional_keys = view(keys);
    options.additional_values = view(values);
    options.rpb = view(table);
  }
  MaybeTensor keys, values, table;
  NeighborhoodOptions options;
};

Results empty_grid_results(const at::Tensor& query, const at::Tensor& value) {
  std::vector<c10::SymInt> shape(query.sym_sizes().begin(), query.sym_sizes().end());
  shape.back() = value.sym_sizes().back();
  const at::Tensor out = empty_result(shape, query, query.scalar_type());
  shape.pop_back();
  return {out, empty_statistic(query, shape, true)};
}

template <int kAxes>
Results grid_cpu(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                 HEED_GRID_OPTIONS) {
  constexpr const char* kOp = Grid<kAxes>::kName;
  check_inputs(kOp, kAxes, query, key, value, additional_keys, additional_values, rpb);
  const HeldOptions held(kOp, kAxes, query, kernel_size, stride, dilation, is_causal, scale,
                         additional_keys, additional_values, rpb);
  Results results = empty_grid_results(query, value);
  const auto& [out, lse] = results;
  guarded([&, &out = out, &lse = lse] {
    Grid<kAxes>::kForward(view(query), view(key), view(value), view(out), view(lse), held.options,
                          run_options());
  });
  return results;
}

template <int kAxes>
Gradients grid_backward_cpu(const at::Tensor& grad_out, const MaybeTensor& grad_lse,
                            const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                            const at::Tensor& out, const at::Tensor& lse, HEED_GRID_OPTIONS) {
  constexpr const char* kOp = Grid<kAxes>::kName;
  check_inputs(kOp, kAxes, query, key, value, additional_keys, additional_values, rpb);
  const HeldOptions held(kOp, kAxes, query, kernel_size, stride, dilation, is_causal, scale,
                         additional_keys, additional_values, rpb);
  const at::Tensor g = gradient_input(grad_out);
  const MaybeTensor g_lse = gradient_input(grad_lse);
  NeighborhoodGradients to;
  guarded([&] {
    to = Grid<kAxes>::kBackward(view(g), view(g_lse), view(query), view(key), view(value),
                                view(out), view(lse), held.options, run_options());
  });
  return {take(std::move(to.query), query),
          take(std::move(to.key), query),
          take(std::move(to.value), query),
          take(std::move(to.additional_keys), query),
          take(std::move(to.additional_values), query),
          take(std::move(to.rpb), query)};
}

template <int kAxes>
Results grid_meta(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                  HEED_GRID_OPTIONS) {
  constexpr const char* kOp = Grid<kAxes>::kName;
  check_inputs(kOp, kAxes, query, key, value, additional_keys, additional_values, rpb);
  const auto same = [&](const char* name, const at::Tensor& t, int64_t axis, const at::Tensor& like,
                        const char* like_name, const std::string& what) {
    TORCH_CHECK_VALUE(t.sym_size(axis) == like.sym_size(axis), kOp, ": ", name, " has ", what, " ",
                      t.sym_size(axis), " but ", like_name, " has ", like.sym_size(axis));
  };
  for (int64_t axis = 0; axis <= kAxes; ++axis) {
    const std::string what =
        axis == 0 ? "batch size" : "length of grid axis " + std::to_string(axis - 1);
    same("key", key, axis, query, "query", what);
    same("value", value, axis, query, "query", what);
  }
  same("value", value, kAxes + 1, key, "key", "number of heads");
  same("key", key, kAxes + 2, query, "query", "head dim");
  const c10::SymInt heads = query.sym_size(kAxes + 1), kv_heads = key.sym_size(kAxes + 1);
  TORCH_CHECK_VALUE(kv_heads > 0 ? heads % kv_heads == 0 : heads == 0, kOp, ": query has ", heads,
                    " heads, needed is a multiple of the ", kv_heads, " heads of key");
  for (const at::IntArrayRef values : {kernel_size, stride, dilation, is_causal}) {
    TORCH_CHECK_VALUE(values.size() == 1 || values.size() == kAxes, kOp, ": an option has ",
                      values.size(), " values, needed is one per grid axis (", kAxes,
                      ") or one for all");
  }
  (void)scale;
  return empty_grid_results(query, value);
}

template <int kAxes>
void implement_cpu(torch::Library& m) {
  const std::string name = Grid<kAxes>::kName;
  m.impl(name.c_str(), &grid_cpu<kAxes>);
  m.impl((name + "_backward").c_str(), &grid_backward_cpu<kAxes>);
}

}  // namespace
}  // namespace heed::ops

TORCH_LIBRARY_IMPL(heed, CPU, m) {
  heed::ops::implement_cpu<1>(m);
  heed::ops::implement_cpu<2>(m);
  heed::ops::implement_cpu<3>(m);
}

TORCH_LIBRARY_IMPL(heed, Meta, m) {
  m.impl("na1d", &heed::ops::grid_meta<1>);
  m.impl("na2d", &heed::ops::grid_meta<2>);
  m.impl("na3d", &heed::ops::grid_meta<3>);
}
