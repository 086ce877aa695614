#include "heed/feature_map.h"

#include <string>

#include "base/parallel.h"
#include "mechanisms/feature_map/tile.h"
#include "mechanisms/results.h"

namespace heed {

namespace {

using features::Call;
using kernels::Rows;

constexpr const char* kOp = "feature_map";

int64_t checked_width(const Tensor& x, FeatureKind kind, const FeatureMapOptions& options) {
  const Tensor& w = options.weight;
  const std::string heads = std::to_string(x.size(1)), dim = std::to_string(x.size(3));
  if (kind == FeatureKind::performer) {
    const std::string shape = "[" + heads + ",M," + dim + "]";
    if (!w.defined()) fail(kOp, "weight is missing", "performer needs a projection " + shape);
    if (options.bias.defined()) fail(kOp, describe("bias", options.bias), "performer takes none");
    if (w.rank() != 3 || w.size(1) < 1)
      fail(kOp, describe("weight", w), shape + " is needed, M >= 1");
    check_parameter(kOp, "weight", w, {x.size(1), w.size(1), x.size(3)}, x.dtype());
    return w.size(1);
  }
  int64_t width = x.size(3);
  if (w.defined()) {
    const std::string shape = "[" + heads + "," + dim + ",D']";
    if (w.rank() != 3 || w.size(2) < 1)
      fail(kOp, describe("weight", w), shape + " is needed, D' >= 1");
    check_parameter(kOp, "weight", w, {x.size(1), x.size(3), w.size(2)}, x.dtype());
    width = w.size(2);
  }
  if (options.bias.defined()) {
    check_parameter(kOp, "bias", options.bias, {x.size(1), width}, x.dtype());
  }
  return width;
}

Call checked_call(const Tensor& x, FeatureKind kind, const FeatureMapOptions& options) {
  check_head_rows(kOp, "x", x);
  const int64_t width = checked_width(x, kind, options);
  const Call call{x,
                  options.weight,
                  options.bias,
                  options.forward_features,
                  kind,
                  x.size(0),
                  x.size(1),
                  x.size(2),
                  x.size(3),
                  width,
                  feature_count(kind, width)};
  if (call.forward_features.defined()) {
    check_rows_like(kOp, "forward_features", call.forward_features, call.out_shape(), call.dtype());
  }
  return call;
}

template <class T>
void forward(const Call& call, const Tensor& out, const RunOptions& run) {
  const Candidate path = features::path_of(call, run);
  const auto& kernels = kernels::matrix_kernels<T>(path.isa);
  const auto& maps = kernels::feature_kernels<T>(path.isa);
  const features::Layer<T> layer(call, path, kernels, false);
  const int64_t most = features::tile_rows(call, layer), tiles = ceil_div(call.tokens, most);
  const int64_t items = call.batch * call.heads * tiles;
  const double products = features::is_element_map(call) ? 0 : static_cast<double>(call.x.size(3));
  const double nanoseconds =
      static_cast<double>(out.count()) * (kElementNanoseconds + products * kMultiplyAddNanoseconds);
  parallel_for(items, threads_for(run, items, nanoseconds), [&](int64_t item, int) {
    const int64_t pair = item / tiles, first = item % tiles * most;
    const RowBlock at{pair / call.heads, pair % call.heads, first,
                      std::min(most, call.tokens - first)};
    const Rows x = rows_of(call.x, at);
    const kernels::RowsOut to = out_rows(out, at);
    if (features::is_element_map(call)) {
      return kernels::element_map_kernels<T>(path.isa).map_rows(call.kind, x, to);
    }
    features::Tile<T> tile(call, kernels, layer, most, false);
    tile.load(x);
    const auto in = tile.apply(x, at.head);
    kernels::make_rows<T>(kernels, to, tile.phi,
                          [&](kernels::Block<T> phi) { maps.forward(in, phi); });
  });
}

void check_gradients(const Call& call, const FeatureMapGradientViews& wanted) {
  if (wanted.x.defined()) {
    check_rows_like(kOp, "gradient of x", wanted.x, call.x.shape(), call.dtype());
  }
  if (wanted.weight.defined()) {
    check_parameter_gradient(kOp, "gradient of weight", wanted.weight, call.weight);
  }
  if (wanted.bias.defined()) {
    check_parameter_gradient(kOp, "gradient of bias", wanted.bias, call.bias);
  }
}

}  // namespace

void feature_map(const Tensor& x, FeatureKind kind, const Tensor& out,
                 const FeatureMapOptions& options, const RunOptions& run) {
  const Call call = checked_call(x, kind, options);
  check_rows_like(kOp, "out", out, call.out_shape(), call.dtype());
  with_wide_type(call.dtype(), [&]<class T>(T) { forward<T>(call, out, run); });
}

Array feature_map(const Tensor& x, FeatureKind kind, const FeatureMapOptions& options,
                  const RunOptions& run) {
  Array out(x.dtype(), checked_call(x, kind, options).out_shape());
  feature_map(x, kind, out, options, run);
  return out;
}

void feature_map_backward(const Tensor& grad_out, const Tensor& x, FeatureKind kind,
                          const FeatureMapOptions& options,
                          const FeatureMapGradientViews& gradients, const RunOptions& run) {
  const Call call = checked_call(x, kind, options);
  check_rows_like(kOp, "grad_out", grad_out, call.out_shape(), call.dtype());
  check_gradients(call, gradients);
  with_wide_type(call.dtype(),
                 [&]<class T>(T) { features::backward<T>(call, grad_out, gradients, run); });
}

FeatureMapGradients feature_map_backward(const Tensor& grad_out, const Tensor& x, FeatureKind kind,
                                         const FeatureMapOptions& options, const RunOptions& run) {
  checked_call(x, kind, options);
  FeatureMapGradients result{empty_like(x), empty_like(options.weight), empty_like(options.bias)};
  feature_map_backward(grad_out, x, kind, options, {result.x, result.weight, result.bias}, run);
  return result;
}

}  // namespace heed
