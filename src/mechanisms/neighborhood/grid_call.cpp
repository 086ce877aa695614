#include "mechanisms/neighborhood/grid_call.h"

#include <cmath>
#include <string>

#include "engine/operands.h"
#include "engine/tiled/problem.h"

namespace heed::na {

namespace {

using tiled::kGridAxes;

std::string layout(int rank) {
  const char* grid = rank == 1 ? "X" : rank == 2 ? "Y,X" : "Z,Y,X";
  return std::string("[B,") + grid + ",H,D]";
}

void check_grid_rows(const char* op, const char* name, const Tensor& t, int rank,
                     const std::string& axes, DType dtype) {
  check_operand(op, name, t, rank, axes, axes);
  check_same_type(op, name, t, "query", dtype);
  check_head_dim(op, name, t);
}

void check_heads(const char* op, const Tensor& query, const Tensor& key, int axis) {
  const int64_t heads = query.size(axis), kv_heads = key.size(axis);
  if (kv_heads == 0 ? heads == 0 : heads % kv_heads == 0) return;
  fail(op,
       "query has " + std::to_string(heads) + " heads, key and value have " +
           std::to_string(kv_heads),
       "the heads of query must be a multiple of those of key and value");
}

void check_grid_operands(const char* op, int rank, const Tensor& query, const Tensor& key,
                         const Tensor& value, const Tensor& out, const Tensor& lse) {
  check_grid_rows(op, "query", query, rank + 3, layout(rank), query.dtype());
  check_grid_rows(op, "key", key, rank + 3, layout(rank), query.dtype());
  check_grid_rows(op, "value", value, rank + 3, layout(rank), query.dtype());
  for (int axis = 0; axis <= rank; ++axis) {
    const std::string what =
        axis == 0 ? "batch size" : "length of grid axis " + std::to_string(axis - 1);
    check_equal(op, "query", query, axis, "key", key, axis, what);
    check_equal(op, "query", query, axis, "value", value, axis, what);
    if (out.defined() && out.rank() == rank + 3) {
      check_equal(op, "query", query, axis, "out", out, axis, what);
    }
  }
  check_equal(op, "key", key, rank + 1, "value", value, rank + 1, "number of heads");
  check_equal(op, "query", query, rank + 2, "key", key, rank + 2, "head dim");
  check_heads(op, query, key, rank + 1);
  if (out.defined()) {
    check_grid_rows(op, "out", out, rank + 3, layout(rank), query.dtype());
    check_equal(op, "query", query, rank + 1, "out", out, rank + 1, "number of heads");
    check_equal(op, "value", value, rank + 2, "out", out, rank + 2, "head dim");
  }
  const Dims rows(query.shape().span().first(static_cast<size_t>(rank + 2)));
  check_result(op, "lse", lse, rows, wide_type(query.dtype()));
}

void check_additional(const char* op, int rank, const Tensor& query, const Tensor& key,
                      const Tensor& value, const Tensor& keys, const Tensor& values) {
  if (!keys.defined() && !values.defined()) return;
  constexpr const char *kKeys = "additional_keys", *kValues = "additional_values";
  if (!keys.defined() || !values.defined()) {
    fail(op, std::string(keys.defined() ? kValues : kKeys) + " is missing",
         std::string(kKeys) + " and " + kValues + " are given together or not at all");
  }
  check_grid_rows(op, kKeys, keys, 4, "[B,n,Hkv,D]", query.dtype());
  check_grid_rows(op, kValues, values, 4, "[B,n,Hkv,Dv]", query.dtype());
  check_equal(op, "query", query, 0, kKeys, keys, 0, "batch size");
  check_equal(op, "query", query, 0, kValues, values, 0, "batch size");
  check_equal(op, kKeys, keys, 1, kValues, values, 1, "number of keys");
  check_equal(op, "key", key, rank + 1, kKeys, keys, 2, "number of heads");
  check_equal(op, "key", key, rank + 1, kValues, values, 2, "number of heads");
  check_equal(op, "query", query, rank + 2, kKeys, keys, 3, "head dim");
  check_equal(op, "value", value, rank + 2, kValues, values, 3, "head dim");
}

template <class T>
T per_axis(const char* op, const char* name, const std::vector<T>& values, int axis, int rank) {
  if (values.size() == 1) return values[0];
  if (values.size() == static_cast<size_t>(rank)) return values[static_cast<size_t>(axis)];
  fail(op, std::string(name) + " has " + std::to_string(values.size()) + " values",
       rank == 1 ? "1 is needed"
                 : std::to_string(rank) + " are needed, one per grid axis, or 1 for all of them");
}

tiled::Neighborhood checked_grid(const char* op, int rank, const Tensor& query, const Tensor& key,
                                 const Tensor& value, const Tensor& out, const Tensor& lse,
                                 const NeighborhoodOptions& options) {
  check_grid_operands(op, rank, query, key, value, out, lse);
  std::vector<tiled::NeighborhoodAxis> axes;
  for (int a = 0; a < rank; ++a) {
    axes.push_back({query.size(a + 1), per_axis(op, "kernel_size", options.kernel_size, a, rank),
                    per_axis(op, "stride", options.stride, a, rank),
                    per_axis(op, "dilation", options.dilation, a, rank),
                    per_axis(op, "is_causal", options.is_causal, a, rank)});
  }
  return {op, axes};
}

void check_rpb(const char* op, int rank, const Tensor& rpb, const tiled::Neighborhood& grid,
               int64_t heads) {
  if (!rpb.defined()) return;
  Dims wanted(std::vector<int64_t>(static_cast<size_t>(rank + 1), heads));
  for (int a = 0; a < rank; ++a) {
    const auto& axis = grid.axis(kGridAxes - rank + a);
    wanted[a + 1] = 2 * axis.kernel - 1;
    if (axis.stride != 1 || axis.causal) {
      fail(op,
           "rpb is given but axis " + std::to_string(a) +
               (axis.causal ? " is causal" : " has stride " + std::to_string(axis.stride)),
           "relative biases are defined for stride 1 and axes that are not causal");
    }
  }
  if (!is_floating(rpb.dtype()) || !(rpb.shape() == wanted)) {
    fail(op, describe("rpb", rpb),
         to_string(wanted) + " of a floating type is needed: heads, 2 kernel_size - 1 per axis");
  }
}

}  // namespace

Tensor six_axes(const Tensor& t, int rank) {
  Dims shape{1, 1, 1, 1, 1, 1}, strides{0, 0, 0, 0, 0, 0};
  const int missing = kGridAxes - rank;
  for (int a = 0; a < t.rank(); ++a) {
    const int to = a == 0 ? 0 : a + missing;
    shape[to] = t.size(a);
    strides[to] = t.stride(a);
  }
  return {t.data(), t.dtype(), shape, strides};
}

Tensor six_axes_of_sums(const Tensor& lse, int rank) {
  if (!lse.defined()) return {};
  Dims shape{1, 1, 1, 1, 1, 1}, strides{0, 0, 0, 0, 0, 1};
  const int missing = kGridAxes - rank;
  for (int a = 0; a < lse.rank(); ++a) {
    const int to = a == 0 ? 0 : a + missing;
    shape[to] = lse.size(a);
    strides[to] = lse.stride(a);
  }
  return {lse.data(), lse.dtype(), shape, strides};
}

Tensor heads_first(const Tensor& t) {
  return {t.data(),
          t.dtype(),
          {t.size(0), t.size(2), t.size(1), t.size(3)},
          {t.stride(0), t.stride(2), t.stride(1), t.stride(3)}};
}

GridCall::GridCall(const char* op, int axes, const Tensor& query_in, const Tensor& key_in,
                   const Tensor& value_in, const Tensor& out_in, const Tensor& lse_in,
                   const NeighborhoodOptions& options)
    : rank(axes),
      grid(checked_grid(op, axes, query_in, key_in, value_in, out_in, lse_in, options)),
      query(six_axes(query_in, axes)),
      key(six_axes(key_in, axes)),
      value(six_axes(value_in, axes)),
      out(out_in.defined() ? six_axes(out_in, axes) : Tensor()),
      lse(six_axes_of_sums(lse_in, axes)),
      rpb(options.rpb),
      scale(tiled::resolve_scale(op, options.scale, query_in.shape().back())) {
  check_additional(op, rank, query_in, key_in, value_in, options.additional_keys,
                   options.additional_values);
  check_rpb(op, rank, rpb, grid, heads());
  if (options.additional_keys.defined()) {
    additional_keys = heads_first(options.additional_keys);
    additional_values = heads_first(options.additional_values);
  }
}

}  // namespace heed::na
