// Gradients of x, weight and bias. A head's tiles of tokens are dealt out in shares; each share has sums of
// its own for the parameters, added in a fixed order.
#include "base/parallel.h"
#include "mechanisms/feature_map/tile.h"

namespace heed::features {

namespace {

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
        run_tile(tile, item, {t / tiles_, h, first, std::min(tile_rows_, call_.tokens - first)});
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

  void run_tile(Tile<T>& tile, int64_t item, const RowBlock& at) {
    const int64_t h = at.head, rows = at.count;
    const Rows x = rows_of(call_.x, at), dout = rows_of(dout_, at);
    const auto to = [&] { return out_rows(wanted_.x, at); };
    Rows given;
    if (reads_features(call_)) given = rows_of(call_.forward_features, at);
    if (given.data != nullptr && is_element_map(call_)) {
      if (wanted_.x.defined()) {
        kernels::element_map_kernels<T>(path_.isa).pull_rows(call_.kind, given, dout, to());
      }
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

}  // namespace

template <class T>
void backward(const Call& call, const Tensor& grad_out, const FeatureMapGradientViews& wanted,
              const RunOptions& run) {
  Backward<T>(call, grad_out, wanted, run).run(run);
}
template void backward<float>(const Call&, const Tensor&, const FeatureMapGradientViews&,
                              const RunOptions&);
template void backward<double>(const Call&, const Tensor&, const FeatureMapGradientViews&,
                               const RunOptions&);

}  // namespace heed::features
