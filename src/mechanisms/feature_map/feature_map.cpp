#include "heed/feature_map.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <type_traits>
#include <vector>

#include "base/parallel.h"
#include "engine/operands.h"
#include "kernels/feature_rows.h"
#include "kernels/matrix.h"
#include "mechanisms/feature_map/layer.h"
#include "mechanisms/parameter.h"

namespace heed {

namespace {

using features::HalfLayer;
using features::WideLayer;
using kernels::Block;
using kernels::MatrixKernels;
using kernels::Rows;

constexpr const char* kOp = "feature_map";
// One checked call. `width` is D', or M for performer: what a row of z holds.
struct Call {
  Tensor x, weight, bias, forward_features;
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

// Whether the backward reads the features of the forward. In float64 the floor hides digits of those
// below it, features of 16 bits have too few digits for gradients in float32, and the largest of z is
// not found in any.
bool reads_features(const Call& call) {
  const bool floor =
      call.kind == FeatureKind::hedgehog_softmax || call.kind == FeatureKind::hedgehog_joint;
  const auto has_digits = [&](const Tensor& parameter) {
    return !parameter.defined() || parameter.dtype() == call.dtype();
  };
  return call.forward_features.defined() && !(floor && call.dtype() == DType::f64) &&
         call.kind != FeatureKind::hedgehog_exp_max && has_digits(call.weight) &&
         has_digits(call.bias);
}

// --- parameters ----------------------------------------------------------------------------------

double input_factor(const Call& call) {  // y = x / D^(1/4) of performer
  return call.performer() ? 1 / std::sqrt(std::sqrt(static_cast<double>(call.dim))) : 1;
}

// The parameters of all heads, once a call. Performer's factor D^(-1/4) is in the layer.
template <class T>
struct Layer {
  WideLayer<T> wide;
  HalfLayer half;  // instead, where the path says so
  std::vector<T> bias;
  bool has_weight = false;

  Layer(const Call& call, const Candidate& path, const MatrixKernels<T>& kernels, bool for_backward)
      : has_weight(call.weight.defined()) {
    if (call.bias.defined()) bias = contiguous_values<T>(call.bias);
    if (!has_weight) return;
    if (path.half_operands) {
      half = HalfLayer(*kernels::half_tile_kernels(path.isa), call.weight, for_backward);
    } else {
      wide = WideLayer<T>(kernels, call.weight, call.performer(),
                          static_cast<T>(input_factor(call)), for_backward);
    }
  }
};

// Rows of tokens [first, first + count) of one head.
Rows rows_of(const Tensor& t, int64_t b, int64_t h, int64_t first, int64_t count) {
  return {t.at({b, h, first}), t.dtype(), t.stride(2), count, t.size(3)};
}
kernels::RowsOut results_of(const Tensor& t, int64_t b, int64_t h, int64_t first, int64_t count) {
  return {t.at({b, h, first}), t.dtype(), t.stride(2), count, t.size(3)};
}

// Whether a feature is made of one element of x alone.
bool is_element_map(const Call& call) {
  return kernels::element_by_element(call.kind) && !call.weight.defined() && !call.bias.defined();
}

Candidate path_of(const Call& call, const RunOptions& run) {
  return choose_candidate(call.dtype(), features::no_half_operands(call.kind, call.weight), run);
}

// --- tiles ---------------------------------------------------------------------------------------

// Tokens of one head that are computed together: few enough for the second-level cache.
template <class T>
int64_t tile_rows(const Call& call, const Layer<T>& layer) {
  constexpr int64_t kBytes = 256 * 1024;
  const int64_t row_bytes =
      (call.dim + call.width + call.features) * static_cast<int64_t>(sizeof(T));
  const int64_t rows = std::clamp<int64_t>(kBytes / row_bytes, 1, layer.half ? 48 : 64);
  return layer.half ? round_up(rows, layer.half.row_multiple()) : rows;
}

// Scratch matrices of one worker, and the steps from x to the features of a tile.
template <class T>
class Tile {
 public:
  Tile(const Call& call, const MatrixKernels<T>& kernels, const Layer<T>& layer, int64_t rows,
       bool gradients)
      : call_(call),
        kernels_(kernels),
        layer_(layer),
        x_stride_(stride_of(call.dim)),
        z_stride_(stride_of(call.width)),
        phi_stride_(kernels::row_stride(kernels, call.features)),
        scratch_(bytes(rows, gradients)) {
    x_block_ = {scratch_.take<T>(rows * x_stride_), x_stride_};
    z = {scratch_.take<T>(rows * z_stride_), z_stride_};
    phi = {scratch_.take<T>(rows * phi_stride_), phi_stride_};
    shift = scratch_.take<T>(rows);
    row_sums = scratch_.take<T>(rows);
    if (gradients) {
      dphi = {scratch_.take<T>(rows * phi_stride_), phi_stride_};
      dz = {scratch_.take<T>(rows * z_stride_), z_stride_};
      dx = {scratch_.take<T>(rows * x_stride_), x_stride_};
    }
    if (!layer.half) return;
    half.x = scratch_.take<std::byte>(layer.half.x_bytes(rows));
    if (!gradients) return;
    half.dz = scratch_.take<std::byte>(layer.half.dz_bytes(rows));
    half.columns = scratch_.take<std::byte>(layer.half.column_bytes(rows));
    half.pairs = scratch_.take<uint32_t>(ceil_div(rows, 2) * z_stride_);
  }

  Block<const T> x;
  Block<T> z, dx, phi, dphi, dz;
  T *shift, *row_sums;
  HalfLayer::Memory half;

  // Reads x of tokens [first, first + rows), unless its layer reads it itself.
  void load(const Rows& from) {
    if (!layer_.half) x = kernels::whole_rows(kernels_, from, x_block_);
  }

  // Applies weight and bias to what load has read.
  kernels::FeatureRows<T> apply(const Rows& from, int64_t h) {
    const int64_t rows = from.count;
    const T* bias = layer_.bias.empty() ? nullptr : layer_.bias.data() + h * call_.width;
    kernels::FeatureRows<T> in = features(rows);
    in.z = {z.data, z.stride};
    if (layer_.half) {
      if constexpr (std::is_same_v<T, float>) {
        std::fill_n(z.data, rows * z.stride, T{0});
        layer_.half.apply(from, h, z, half);
      }
    } else if (layer_.has_weight) {
      layer_.wide.apply(x, h, rows, z);
    } else if (bias != nullptr) {
      kernels_.load_rows(from, z);
    } else {
      in.z = x;
    }
    for (int64_t r = 0; r < rows && bias != nullptr; ++r) kernels_.add(z.row(r), bias, call_.width);
    if (call_.performer()) {
      const double s = input_factor(call_);
      const T factor = static_cast<T>(s * s / 2);
      for (int64_t r = 0; r < rows; ++r) {
        shift[r] = factor * kernels_.dot(x.row(r), x.row(r), call_.dim);
      }
    }
    return in;
  }

  kernels::FeatureRows<T> features(int64_t rows) const {
    kernels::FeatureRows<T> in;
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
  int64_t stride_of(int64_t columns) const {
    if (layer_.half) columns = round_up(columns, HalfLayer::kColumns);
    return kernels::row_stride(kernels_, columns);
  }

  size_t bytes(int64_t rows, bool gradients) const {
    const auto rounded = [](int64_t count, size_t size) {
      return Scratch::rounded(static_cast<size_t>(count) * size);
    };
    const size_t x_bytes = rounded(rows * x_stride_, sizeof(T));
    const size_t z_bytes = rounded(rows * z_stride_, sizeof(T));
    size_t sum = (gradients ? 2 : 1) * (x_bytes + z_bytes) +
                 (gradients ? 2 : 1) * rounded(rows * phi_stride_, sizeof(T)) +
                 2 * rounded(rows, sizeof(T));
    if (!layer_.half) return sum;
    sum += rounded(layer_.half.x_bytes(rows), 1);
    if (!gradients) return sum;
    return sum + rounded(layer_.half.dz_bytes(rows), 1) +
           rounded(layer_.half.column_bytes(rows), 1) +
           rounded(ceil_div(rows, 2) * z_stride_, sizeof(uint32_t));
  }

  const Call& call_;
  const MatrixKernels<T>& kernels_;
  const Layer<T>& layer_;
  int64_t x_stride_, z_stride_, phi_stride_;
  Scratch scratch_;
  Block<T> x_block_;
};

template <class T>
void forward(const Call& call, const Tensor& out, const RunOptions& run) {
  const Candidate path = path_of(call, run);
  const auto& kernels = kernels::matrix_kernels<T>(path.isa);
  const auto& features = kernels::feature_kernels<T>(path.isa);
  const Layer<T> layer(call, path, kernels, false);
  const int64_t most = tile_rows(call, layer), tiles = ceil_div(call.tokens, most);
  const int64_t items = call.batch * call.heads * tiles;
  parallel_for(items, threads_for(run, items), [&](int64_t item, int) {
    const int64_t pair = item / tiles, first = item % tiles * most;
    const int64_t b = pair / call.heads, h = pair % call.heads;
    const int64_t rows = std::min(most, call.tokens - first);
    const Rows x = rows_of(call.x, b, h, first, rows);
    const kernels::RowsOut to = results_of(out, b, h, first, rows);
    if (is_element_map(call)) return features.forward_rows(call.kind, x, to);
    Tile<T> tile(call, kernels, layer, most, false);
    tile.load(x);
    const auto in = tile.apply(x, h);
    kernels::make_rows<T>(kernels, to, tile.phi, [&](Block<T> phi) { features.forward(in, phi); });
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
    // Padded as the sums of HalfLayer are.
    rows = round_up(call.performer() ? call.width : call.dim, HalfLayer::kColumns);
    stride = kernels::row_stride(
        kernels, round_up(call.performer() ? call.dim : call.width, HalfLayer::kColumns));
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
        path_(path_of(call, run)),
        kernels_(kernels::matrix_kernels<T>(path_.isa)),
        features_(kernels::feature_kernels<T>(path_.isa)),
        layer_(call, path_, kernels_, true),
        tile_rows_(tile_rows(call, layer_)),
        tiles_(ceil_div(call.tokens, tile_rows_)),
        tiles_of_head_(call.batch * tiles_),
        shares_(shares(run)),
        sums_(call, kernels_, call.heads * shares_, wanted) {}

  void run(const RunOptions& run) {
    const int64_t items = call_.heads * shares_;
    parallel_for(items, threads_for(run, items), [&](int64_t item, int) {
      const int64_t h = item / shares_, share = item % shares_;
      Tile<T> tile(call_, kernels_, layer_, tile_rows_, true);
      const int64_t end = share_begin(tiles_of_head_, share + 1, shares_);
      for (int64_t t = share_begin(tiles_of_head_, share, shares_); t < end; ++t) {
        const int64_t first = t % tiles_ * tile_rows_;
        run_tile(tile, item, t / tiles_, h, first, std::min(tile_rows_, call_.tokens - first));
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
    const Rows x = rows_of(call_.x, b, h, first, rows), dout = rows_of(dout_, b, h, first, rows);
    const auto to = [&] { return results_of(wanted_.x, b, h, first, rows); };
    Rows given;
    if (reads_features(call_)) given = rows_of(call_.forward_features, b, h, first, rows);
    if (given.data != nullptr && is_element_map(call_)) {
      if (wanted_.x.defined()) features_.backward_rows(call_.kind, given, dout, to());
      return;
    }
    tile.load(x);
    auto in = tile.features(rows);
    const Block<const T> dphi = kernels::whole_rows(kernels_, dout, tile.dphi);
    Block<const T> phi{tile.phi.data, tile.phi.stride};
    if (given.data != nullptr) {
      phi = kernels::whole_rows(kernels_, given, tile.phi);
    } else {
      const T floor = in.floor;
      in = tile.apply(x, h);
      in.floor = 0;  // the backward tells what is below it
      features_.forward(in, tile.phi);
      in.floor = floor;
    }
    if (!layer_.has_weight && !wanted_.bias.defined()) {  // dx is dz, and all there is
      if (!wanted_.x.defined()) return;
      return kernels::make_rows<T>(kernels_, to(), tile.dz, [&](Block<T> dx) {
        features_.backward(in, phi, dphi, dx, tile.row_sums);
      });
    }
    features_.backward(in, phi, dphi, tile.dz, tile.row_sums);
    if (wanted_.bias.defined()) {
      for (int64_t r = 0; r < rows; ++r)
        kernels_.add(sums_.bias_of(item), tile.dz.row(r), call_.width);
    }
    if (wanted_.weight.defined()) add_weight(tile, item, x);
    if (!wanted_.x.defined()) return;
    const Block<const T> dz{tile.dz.data, tile.dz.stride};
    if (!layer_.has_weight) return kernels_.store_rows(dz, to());
    if (layer_.half) {
      if constexpr (std::is_same_v<T, float>) layer_.half.pull(dz, h, rows, tile.dx, tile.half);
      return kernels_.store_rows({tile.dx.data, tile.dx.stride}, to());
    }
    kernels::make_rows<T>(kernels_, to(), tile.dx, [&](Block<T> dx) {
      layer_.wide.pull(dz, h, rows, dx);
      if (!call_.performer()) return;
      const double s = input_factor(call_);  // of |y|^2 / 2
      for (int64_t r = 0; r < rows; ++r) {
        const T pull = static_cast<T>(s * s) * tile.row_sums[r];
        for (int64_t i = 0; i < call_.dim; ++i) dx.row(r)[i] -= pull * tile.x.row(r)[i];
      }
    });
  }

  void add_weight(Tile<T>& tile, int64_t item, const Rows& x) {
    const Block<T> sum = sums_.weight_of(item);
    if (layer_.half) {
      if constexpr (std::is_same_v<T, float>) {
        layer_.half.add_outer(x, {tile.dz.data, tile.dz.stride}, sum, tile.half);
      }
    } else if (call_.performer()) {  // dz^T x
      kernels_.multiply({tile.dz.data, 1, tile.dz.stride}, tile.x, x.count, sum, call_.width,
                        call_.dim, true);
    } else {  // x^T dz
      kernels_.multiply({tile.x.data, 1, tile.x.stride}, {tile.dz.data, tile.dz.stride}, x.count,
                        sum, call_.dim, call_.width, true);
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
  const Candidate path_;
  const MatrixKernels<T>& kernels_;
  const kernels::FeatureKernels<T>& features_;
  const Layer<T> layer_;
  const int64_t tile_rows_, tiles_, tiles_of_head_, shares_;
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
