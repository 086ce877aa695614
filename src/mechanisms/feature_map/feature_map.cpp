#include "heed/feature_map.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "base/parallel.h"
#include "engine/operands.h"
#include "kernels/feature_rows.h"
#include "kernels/matrix.h"
#include "mechanisms/parameter.h"

namespace heed {

namespace {

using kernels::Block;
using kernels::MatrixKernels;
using kernels::Rows;

constexpr const char* kOp = "feature_map";
// One checked call. `width` is D', or M for performer: what a row of z holds.
struct Call {
  Tensor x, weight, bias;
  FeatureKind kind;
  int64_t batch, heads, tokens, dim, width, features;
  DType dtype() const { return x.dtype(); }
  bool performer() const { return kind == FeatureKind::performer; }
  Dims out_shape() const { return {batch, heads, tokens, features}; }
};

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
  return {x,         options.weight, options.bias, kind,  x.size(0),
          x.size(1), x.size(2),      x.size(3),    width, feature_count(kind, width)};
}

// --- parameters ----------------------------------------------------------------------------------

// The parameters of all heads in the type of the computation, once a call.
template <class T>
struct Layer {
  // z = x right[h] + bias[h], dx = dz left[h]; both include performer's factor D^(-1/4).
  std::vector<T> right, left, bias;
  int64_t right_stride = 0, left_stride = 0, dim = 0, width = 0;
  bool has_weight = false;

  Block<const T> right_of(int64_t head) const {
    return {right.data() + head * dim * right_stride, right_stride};
  }
  Block<const T> left_of(int64_t head) const {
    return {left.data() + head * width * left_stride, left_stride};
  }
};

double input_factor(const Call& call) {  // y = x / D^(1/4) of performer
  return call.performer() ? 1 / std::sqrt(std::sqrt(static_cast<double>(call.dim))) : 1;
}

template <class T>
Layer<T> make_layer(const Call& call, const MatrixKernels<T>& kernels, bool for_backward) {
  Layer<T> layer;
  layer.dim = call.dim;
  layer.width = call.width;
  layer.has_weight = call.weight.defined();
  if (call.bias.defined()) layer.bias = contiguous_values<T>(call.bias);
  if (!layer.has_weight) return layer;
  const std::vector<T> weight = contiguous_values<T>(call.weight);
  const auto factor = static_cast<T>(input_factor(call));
  layer.right_stride = kernels::row_stride(kernels, call.width);
  layer.left_stride = kernels::row_stride(kernels, call.dim);
  layer.right.assign(static_cast<size_t>(call.heads * call.dim * layer.right_stride), T{0});
  if (for_backward) {
    layer.left.assign(static_cast<size_t>(call.heads * call.width * layer.left_stride), T{0});
  }
  for (int64_t h = 0; h < call.heads; ++h) {
    T* right = layer.right.data() + h * call.dim * layer.right_stride;
    T* left = for_backward ? layer.left.data() + h * call.width * layer.left_stride : nullptr;
    const T* w = weight.data() + h * call.dim * call.width;
    for (int64_t i = 0; i < call.dim; ++i) {
      for (int64_t j = 0; j < call.width; ++j) {
        const T value = factor * (call.performer() ? w[j * call.dim + i] : w[i * call.width + j]);
        right[i * layer.right_stride + j] = value;
        if (left != nullptr) left[j * layer.left_stride + i] = value;
      }
    }
  }
  return layer;
}

// --- tiles ---------------------------------------------------------------------------------------

// Tokens of one head that are computed together: few enough for the second-level cache.
struct Tiling {
  int64_t rows = 1, tiles = 0;
};
template <class T>
Tiling tiling_for(const Call& call) {
  constexpr int64_t kBytes = 256 * 1024;
  const int64_t row_bytes =
      (call.dim + call.width + call.features) * static_cast<int64_t>(sizeof(T));
  const int64_t rows = std::clamp<int64_t>(kBytes / row_bytes, 1, 64);
  return {rows, ceil_div(call.tokens, rows)};
}

// Scratch matrices of one worker, and the steps from x to the features of a tile.
template <class T>
class Tile {
 public:
  Tile(const Call& call, const MatrixKernels<T>& kernels,
       const kernels::FeatureKernels<T>& features, const Layer<T>& layer, int64_t rows,
       bool gradients)
      : call_(call),
        kernels_(kernels),
        features_(features),
        layer_(layer),
        x_stride_(kernels::row_stride(kernels, call.dim)),
        z_stride_(kernels::row_stride(kernels, call.width)),
        phi_stride_(kernels::row_stride(kernels, call.features)),
        scratch_(Scratch::rounded(static_cast<size_t>(rows * x_stride_) * sizeof(T)) +
                 (gradients ? 3 : 2) *
                     Scratch::rounded(static_cast<size_t>(rows * std::max(z_stride_, x_stride_)) *
                                      sizeof(T)) +
                 Scratch::rounded(static_cast<size_t>(rows * phi_stride_) * sizeof(T)) +
                 2 * Scratch::rounded(static_cast<size_t>(rows) * sizeof(T))) {
    x_block_ = {scratch_.take<T>(rows * x_stride_), x_stride_};
    z = {scratch_.take<T>(rows * z_stride_), z_stride_};
    dx = {scratch_.take<T>(rows * x_stride_), x_stride_};
    phi = {scratch_.take<T>(rows * phi_stride_), phi_stride_};
    shift = scratch_.take<T>(rows);
    row_sums = scratch_.take<T>(rows);
    if (gradients) dz = {scratch_.take<T>(rows * z_stride_), z_stride_};
  }

  Block<const T> x;
  Block<T> z, dx, phi, dz;
  T *shift, *row_sums;

  // Loads tokens [first, first + rows) and applies weight and bias.
  kernels::FeatureRows<T> load(int64_t b, int64_t h, int64_t first, int64_t rows) {
    const Rows from{call_.x.at({b, h, first}), call_.dtype(), call_.x.stride(2), rows, call_.dim};
    x = kernels::whole_rows(kernels_, from, x_block_);
    kernels::FeatureRows<T> in;
    in.z = x;
    if (layer_.has_weight) {
      kernels_.multiply({x.data, x.stride, 1}, layer_.right_of(h), call_.dim, z, rows, call_.width,
                        false);
      in.z = {z.data, z.stride};
    }
    if (!layer_.bias.empty()) {
      if (!layer_.has_weight) kernels_.load_rows(from, z);
      in.z = {z.data, z.stride};
      for (int64_t r = 0; r < rows; ++r) {
        kernels_.add(z.row(r), layer_.bias.data() + h * call_.width, call_.width);
      }
    }
    if (call_.performer()) {
      const double s = input_factor(call_);
      const T half = static_cast<T>(s * s / 2);
      for (int64_t r = 0; r < rows; ++r) {
        shift[r] = half * kernels_.dot(x.row(r), x.row(r), call_.dim);
      }
    }
    in.kind = call_.kind;
    in.rows = rows;
    in.width = call_.width;
    in.shift = shift;
    const auto width = static_cast<double>(call_.width);
    if (call_.performer()) in.factor = static_cast<T>(1 / std::sqrt(width));
    if (call_.kind == FeatureKind::taylor2) {
      in.factor = static_cast<T>(1 / std::sqrt(std::sqrt(width)));
    }
    in.floor = static_cast<T>(call_.dtype() == DType::f16 ? 6e-8 : 1e-12);
    return in;
  }

 private:
  const Call& call_;
  const MatrixKernels<T>& kernels_;
  const kernels::FeatureKernels<T>& features_;
  const Layer<T>& layer_;
  int64_t x_stride_, z_stride_, phi_stride_;
  Scratch scratch_;
  Block<T> x_block_;
};

template <class T>
void forward(const Call& call, const Tensor& out, const RunOptions& run) {
  const auto& kernels = kernels::matrix_kernels<T>(chosen_isa(run));
  const auto& features = kernels::feature_kernels<T>(chosen_isa(run));
  const Layer<T> layer = make_layer<T>(call, kernels, false);
  const Tiling tiling = tiling_for<T>(call);
  const int64_t items = call.batch * call.heads * tiling.tiles;
  parallel_for(items, threads_for(run, items), [&](int64_t item, int) {
    const int64_t pair = item / tiling.tiles, first = item % tiling.tiles * tiling.rows;
    const int64_t b = pair / call.heads, h = pair % call.heads;
    const int64_t rows = std::min(tiling.rows, call.tokens - first);
    Tile<T> tile(call, kernels, features, layer, tiling.rows, false);
    const auto in = tile.load(b, h, first, rows);
    kernels::make_rows<T>(kernels,
                          {out.at({b, h, first}), out.dtype(), out.stride(2), rows, call.features},
                          tile.phi, [&](Block<T> phi) { features.forward(in, phi); });
  });
}

// --- backward ------------------------------------------------------------------------------------

// Sums over tokens for the weight and the bias: one of each for every share of a head's tiles.
template <class T>
struct ParameterSums {
  std::vector<T> weight, bias;
  int64_t rows = 0, stride = 0, bias_stride = 0;  // [dim, width], performer: [width, dim]

  ParameterSums(const Call& call, const MatrixKernels<T>& kernels, int64_t shares,
                const FeatureMapGradientViews& wanted) {
    rows = call.performer() ? call.width : call.dim;
    stride = kernels::row_stride(kernels, call.performer() ? call.dim : call.width);
    bias_stride = kernels::row_stride(kernels, call.width);
    if (wanted.weight.defined()) weight.assign(static_cast<size_t>(shares * rows * stride), T{0});
    if (wanted.bias.defined()) bias.assign(static_cast<size_t>(shares * bias_stride), T{0});
  }
  Block<T> weight_of(int64_t share) { return {weight.data() + share * rows * stride, stride}; }
  T* bias_of(int64_t share) { return bias.data() + share * bias_stride; }
};

template <class T>
class Backward {
 public:
  Backward(const Call& call, const Tensor& grad_out, const FeatureMapGradientViews& wanted,
           const RunOptions& run)
      : call_(call),
        dout_(grad_out),
        wanted_(wanted),
        kernels_(kernels::matrix_kernels<T>(chosen_isa(run))),
        features_(kernels::feature_kernels<T>(chosen_isa(run))),
        layer_(make_layer<T>(call, kernels_, true)),
        tiling_(tiling_for<T>(call)),
        tiles_of_head_(call.batch * tiling_.tiles),
        shares_(shares(run)),
        sums_(call, kernels_, call.heads * shares_, wanted) {}

  void run(const RunOptions& run) {
    const int64_t items = call_.heads * shares_;
    parallel_for(items, threads_for(run, items), [&](int64_t item, int) {
      const int64_t h = item / shares_, share = item % shares_;
      Tile<T> tile(call_, kernels_, features_, layer_, tiling_.rows, true);
      const int64_t end = share_begin(tiles_of_head_, share + 1, shares_);
      for (int64_t t = share_begin(tiles_of_head_, share, shares_); t < end; ++t) {
        const int64_t first = t % tiling_.tiles * tiling_.rows;
        run_tile(tile, item, t / tiling_.tiles, h, first,
                 std::min(tiling_.rows, call_.tokens - first));
      }
    });
    if (!wanted_.weight.defined() && !wanted_.bias.defined()) return;
    parallel_for(call_.heads, threads_for(run, call_.heads),
                 [&](int64_t h, int) { finish_parameters(h); });
  }

 private:
  // Parts of a head's tokens that different threads take; the sums over them are added in order.
  int64_t shares(const RunOptions& run) const {
    const int64_t threads = run.threads.value_or(default_threads());
    return std::clamp<int64_t>(ceil_div(4 * threads, std::max<int64_t>(1, call_.heads)), 1,
                               std::max<int64_t>(1, tiles_of_head_));
  }

  void run_tile(Tile<T>& tile, int64_t item, int64_t b, int64_t h, int64_t first, int64_t rows) {
    const auto in = tile.load(b, h, first, rows);
    const Rows dout{dout_.at({b, h, first}), dout_.dtype(), dout_.stride(2), rows, call_.features};
    features_.backward(in, kernels::whole_rows(kernels_, dout, tile.phi), tile.dz, tile.row_sums);
    const kernels::Factor<T> dz{tile.dz.data, tile.dz.stride, 1};
    if (wanted_.bias.defined()) {
      for (int64_t r = 0; r < rows; ++r)
        kernels_.add(sums_.bias_of(item), tile.dz.row(r), call_.width);
    }
    if (wanted_.weight.defined()) add_weight(tile, item, rows);
    if (!wanted_.x.defined()) return;
    const kernels::RowsOut to{wanted_.x.at({b, h, first}), wanted_.x.dtype(), wanted_.x.stride(2),
                              rows, call_.dim};
    if (!layer_.has_weight) return kernels_.store_rows({tile.dz.data, tile.dz.stride}, to);
    kernels::make_rows<T>(kernels_, to, tile.dx, [&](Block<T> dx) {
      kernels_.multiply(dz, layer_.left_of(h), call_.width, dx, rows, call_.dim, false);
      if (!call_.performer()) return;
      const double s = input_factor(call_);  // of |y|^2 / 2
      for (int64_t r = 0; r < rows; ++r) {
        const T pull = static_cast<T>(s * s) * tile.row_sums[r];
        for (int64_t i = 0; i < call_.dim; ++i) dx.row(r)[i] -= pull * tile.x.row(r)[i];
      }
    });
  }

  void add_weight(Tile<T>& tile, int64_t item, int64_t rows) {
    if (call_.performer()) {  // dz^T x
      kernels_.multiply({tile.dz.data, 1, tile.dz.stride}, {tile.x.data, tile.x.stride}, rows,
                        sums_.weight_of(item), call_.width, call_.dim, true);
    } else {  // x^T dz
      kernels_.multiply({tile.x.data, 1, tile.x.stride}, {tile.dz.data, tile.dz.stride}, rows,
                        sums_.weight_of(item), call_.dim, call_.width, true);
    }
  }

  void finish_parameters(int64_t h) {
    const int64_t first = h * shares_;
    for (int64_t share = 1; share < shares_; ++share) {
      if (wanted_.weight.defined()) {
        kernels_.add(sums_.weight_of(first).data, sums_.weight_of(first + share).data,
                     sums_.rows * sums_.stride);
      }
      if (wanted_.bias.defined()) {
        kernels_.add(sums_.bias_of(first), sums_.bias_of(first + share), call_.width);
      }
    }
    if (wanted_.bias.defined()) {
      store({sums_.bias_of(first), sums_.bias_stride}, wanted_.bias.slice(0, h, h + 1));
    }
    if (wanted_.weight.defined()) {
      Block<T> sum = sums_.weight_of(first);
      const auto factor = static_cast<T>(input_factor(call_));
      for (int64_t i = 0; i < sums_.rows * sums_.stride; ++i) sum.data[i] *= factor;
      store(sum, wanted_.weight.select(0, h));
    }
  }

  void store(Block<T> from, const Tensor& to) {
    kernels_.store_rows({from.data, from.stride},
                        {to.data(), to.dtype(), to.stride(0), to.size(0), to.size(1)});
  }

  const Call& call_;
  const Tensor& dout_;
  const FeatureMapGradientViews& wanted_;
  const MatrixKernels<T>& kernels_;
  const kernels::FeatureKernels<T>& features_;
  Layer<T> layer_;
  Tiling tiling_;
  int64_t tiles_of_head_, shares_;
  ParameterSums<T> sums_;
};

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
  call.dtype() == DType::f64 ? forward<double>(call, out, run) : forward<float>(call, out, run);
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
  if (call.dtype() == DType::f64) {
    Backward<double>(call, grad_out, gradients, run).run(run);
  } else {
    Backward<float>(call, grad_out, gradients, run).run(run);
  }
}

FeatureMapGradients feature_map_backward(const Tensor& grad_out, const Tensor& x, FeatureKind kind,
                                         const FeatureMapOptions& options, const RunOptions& run) {
  checked_call(x, kind, options);
  FeatureMapGradients result;
  result.x = Array(x.dtype(), x.shape());
  const auto like = [](const Tensor& t) {
    return t.defined() ? Array(t.dtype(), t.shape()) : Array();
  };
  result.weight = like(options.weight);
  result.bias = like(options.bias);
  feature_map_backward(grad_out, x, kind, options, {result.x, result.weight, result.bias}, run);
  return result;
}

}  // namespace heed
