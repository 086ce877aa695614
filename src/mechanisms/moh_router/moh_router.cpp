// Tokens go through the router in tiles: logits by one matrix product, then each token on its own. The
// backward keeps the logits of all tokens, because the loss needs the load of every head first. All of it
// is float64: beside the projections of a layer it costs nothing, and the choice of heads hangs on it.
#include "heed/moh_router.h"

#include <algorithm>
#include <string>

#include "base/parallel.h"
#include "kernels/matrix.h"
#include "mechanisms/moh_router/routing.h"
#include "mechanisms/parameter.h"

namespace heed {

namespace {

constexpr const char* kOp = "moh_router";
constexpr int64_t kTileTokens = 64;
// Partial sums of the weights' gradients: at most so many, and no more elements than this together.
// Fixed, so that results do not depend on the threads.
constexpr int64_t kParts = 16;
constexpr int64_t kPartElements = 1 << 22;

moh::RouterShape check_inputs(const Tensor& x, const Tensor& wg, const Tensor& wg_shared,
                              const Tensor& wg_group, const MohRouterOptions& options) {
  if (x.rank() != 3 || !is_floating(x.dtype())) {
    fail(kOp, describe("x", x), "[B,L,C] of float64, float32, bfloat16 or float16 is needed");
  }
  const int64_t channels = x.size(2);
  if (wg.rank() != 2) fail(kOp, describe("wg", wg), "[E,C] is needed, E routed heads");
  check_parameter(kOp, "wg", wg, {wg.size(0), channels}, x.dtype());
  moh::RouterShape shape;
  shape.routed = wg.size(0);
  shape.top_k = options.top_k;
  shape.code = options.form == MohForm::code;
  shape.grouped = wg_group.defined();
  shape.shared_logits = wg_shared.defined();
  if (shape.shared_logits) {
    if (wg_shared.rank() != 2 || wg_shared.size(0) < 1) {
      fail(kOp, describe("wg_shared", wg_shared), "[hs,C] with hs >= 1 is needed");
    }
    check_parameter(kOp, "wg_shared", wg_shared, {wg_shared.size(0), channels}, x.dtype());
  }
  if (shape.grouped) check_parameter(kOp, "wg_group", wg_group, {2, channels}, x.dtype());
  shape.shared = shape.shared_logits ? wg_shared.size(0) : shape.grouped ? 1 : 0;

  const std::string routed = std::to_string(shape.routed);
  if (shape.routed == 0) {
    if (!shape.shared_logits)
      fail(kOp, "wg has no heads and wg_shared is missing", "give some heads");
    if (shape.grouped) fail(kOp, "wg_group is given but wg has no heads", "leave wg_group out");
  } else if (shape.shared_logits && !shape.grouped) {
    fail(kOp, "wg_shared is given without wg_group",
         "wg_group [2," + std::to_string(channels) + "] is needed beside shared and routed heads");
  }
  const int64_t least = shape.routed == 0 ? 0 : 1;
  if (shape.top_k < least || shape.top_k > shape.routed) {
    fail(kOp, "top_k is " + std::to_string(shape.top_k) + " but wg has " + routed + " heads",
         std::to_string(least) + " to " + routed + " is needed");
  }
  return shape;
}

void store(std::byte* p, DType dtype, double value) {
  switch (dtype) {
    case DType::f64:
      *reinterpret_cast<double*>(p) = value;
      return;
    case DType::f32:
      *reinterpret_cast<float*>(p) = static_cast<float>(value);
      return;
    case DType::bf16:
      *reinterpret_cast<bfloat16*>(p) = to_bfloat16(static_cast<float>(value));
      return;
    default:
      *reinterpret_cast<float16*>(p) = to_float16(static_cast<float>(value));
  }
}

/// Tokens [begin, begin + count) of [B,L,C] as rows of one matrix.
struct Tile {
  int64_t batch = 0, begin = 0, count = 0;
};

class Router {
  using Block = kernels::Block<double>;

 public:
  Router(const moh::RouterShape& shape, const Tensor& x, std::vector<Tensor> weights,
         const RunOptions& run)
      : shape_(shape),
        x_(with_unit_stride(x, storage_)),
        run_(run),
        kernels_(kernels::matrix_kernels<double>(chosen_isa(run))),
        narrow_(kernels::matrix_kernels<float>(chosen_isa(run))),
        tokens_(x.size(0) * x.size(1)),
        channels_(x.size(2)),
        channel_stride_(row_stride(kernels_, channels_)),
        logit_stride_(row_stride(kernels_, shape.logits())),
        half_stride_(kernels::row_stride(narrow_, std::max<int64_t>(1, channels_))),
        given_(std::move(weights)) {
    // A batch whose sequences follow one another is one long sequence.
    const bool one = x_.size(0) == 1 || x_.stride(0) == x_.size(1) * x_.stride(1);
    const int64_t batches = one ? 1 : x_.size(0), length = one ? tokens_ : x_.size(1);
    for (int64_t b = 0; b < batches && tokens_ > 0; ++b) {
      for (int64_t t = 0; t < length; t += kTileTokens) {
        tiles_.push_back({b, t, std::min(kTileTokens, length - t)});
      }
    }
    load_weights();
  }

  MohRouting forward() const {
    MohRouting result;
    result.gates = Array(x_.dtype(), {x_.size(0), shape_.heads(), x_.size(1)});
    const auto tiles = static_cast<int64_t>(tiles_.size());
    const auto heads = static_cast<size_t>(shape_.routed);
    std::vector<double> sums(2 * heads * tiles_.size());  // per tile: probabilities, loads
    parallel_for(tiles, threads_for(run_, tiles), [&](int64_t i, int) {
      double* of_tile = sums.data() + static_cast<size_t>(i) * 2 * heads;
      route_tile(tiles_[static_cast<size_t>(i)], result.gates, of_tile, of_tile + heads);
    });
    double loss = 0;
    for (size_t e = 0; e < heads; ++e) {
      double probability = 0, load = 0;
      for (size_t i = 0; i < tiles_.size(); ++i) {
        probability += sums[i * 2 * heads + e];
        load += sums[i * 2 * heads + heads + e];
      }
      if (tokens_ > 0) loss += loss_factor() * mean(probability) * mean(load);
    }
    result.load_balance_loss = Array(wide_type(x_.dtype()), Dims{});
    store(result.load_balance_loss.as<std::byte>(), wide_type(x_.dtype()), loss);
    return result;
  }

  /// Gradients of x and of the weights, in the order in which they were given.
  std::vector<Array> backward(const Tensor& grad_gates, double grad_loss) const {
    Array logits(DType::f64, {std::max<int64_t>(1, tokens_), logit_stride_});
    const Block all{logits.as<double>(), logit_stride_};
    const std::vector<double> gradient = probability_gradient(all, grad_loss);
    std::vector<Array> results;
    results.emplace_back(x_.dtype(), x_.shape());
    const auto tiles = static_cast<int64_t>(tiles_.size());
    const int64_t size = shape_.logits() * channel_stride_;
    const int64_t parts =
        std::clamp<int64_t>(std::min(kPartElements / (size + 1), tiles), 1, kParts);
    Array sums = Array::zeros(DType::f64, {parts, size});
    parallel_for(parts, threads_for(run_, parts), [&](int64_t part, int) {
      run_part(tiles * part / parts, tiles * (part + 1) / parts, all, gradient, grad_gates,
               results[0], sums.as<double>() + part * size);
    });
    for (int64_t part = 1; part < parts; ++part) {
      const double* from = sums.as<double>() + part * size;
      for (int64_t i = 0; i < size; ++i) sums.as<double>()[i] += from[i];
    }
    int64_t row = 0;
    for (const Tensor& weight : given_) {
      const Tensor rows(sums.as<double>() + row * channel_stride_, DType::f64, weight.shape(),
                        {channel_stride_, 1});
      results.push_back(convert(rows, weight.dtype()));
      row += weight.size(0);
    }
    return results;
  }

 private:
  static int64_t row_stride(const kernels::MatrixKernels<double>& kernels, int64_t columns) {
    return kernels::row_stride(kernels, std::max<int64_t>(1, columns));
  }
  double mean(double sum) const { return sum / static_cast<double>(tokens_); }
  double loss_factor() const { return shape_.code ? static_cast<double>(shape_.routed) : 1; }
  int64_t flat(const Tile& tile, int64_t t) const {
    return tile.batch * x_.size(1) + tile.begin + t;
  }

  /// weights_ [logits, C] and turned_ [C, logits].
  void load_weights() {
    weights_ = Array::zeros(DType::f64, {std::max<int64_t>(1, shape_.logits()), channel_stride_});
    turned_ = Array::zeros(DType::f64, {std::max<int64_t>(1, channels_), logit_stride_});
    int64_t row = 0;
    for (const Tensor& weight : given_) {
      Array held;
      const Tensor rows = with_unit_stride(weight, held);
      kernels_.load_rows({rows.data(), rows.dtype(), rows.stride(0), rows.size(0), channels_},
                         {weights_.as<double>() + row * channel_stride_, channel_stride_});
      row += rows.size(0);
    }
    kernels_.transpose({weights_.as<double>(), channel_stride_}, shape_.logits(), channels_,
                       {turned_.as<double>(), logit_stride_});
  }

  /// `half` has as many elements as a tile of tokens.
  void load_tokens(const Tile& tile, float* half, Block to) const {
    const kernels::Rows from{x_.at({tile.batch, tile.begin}), x_.dtype(), x_.stride(1), tile.count,
                             channels_};
    if (!is_half(x_.dtype())) return kernels_.load_rows(from, to);
    narrow_.load_rows(from, {half, half_stride_});
    for (int64_t t = 0; t < tile.count; ++t) {
      std::copy_n(half + t * half_stride_, channels_, to.row(t));
    }
  }

  void store_tokens(Block from, const Tile& tile, float* half, const Tensor& to) const {
    const int64_t offset = flat(tile, 0) * channels_ * static_cast<int64_t>(size_of(to.dtype()));
    const kernels::RowsOut rows{to.as<std::byte>() + offset, to.dtype(), channels_, tile.count,
                                channels_};
    if (!is_half(to.dtype())) return kernels_.store_rows({from.data, from.stride}, rows);
    for (int64_t t = 0; t < tile.count; ++t) {
      for (int64_t c = 0; c < channels_; ++c) {
        half[t * half_stride_ + c] = static_cast<float>(from.row(t)[c]);
      }
    }
    narrow_.store_rows({half, half_stride_}, rows);
  }

  void multiply_logits(const Tile& tile, Block x, Block logits) const {
    kernels_.multiply({x.data, x.stride, 1}, {turned_.as<double>(), logit_stride_}, channels_,
                      logits, tile.count, shape_.logits(), false);
  }

  /// Of one matrix of a tile's tokens in float64, and of the one that load_tokens needs.
  static size_t tile_bytes(int64_t stride) {
    return Scratch::rounded(static_cast<size_t>(kTileTokens * stride) * sizeof(double));
  }
  size_t half_bytes() const {
    return Scratch::rounded(static_cast<size_t>(kTileTokens * half_stride_) * sizeof(float));
  }

  void route_tile(const Tile& tile, const Tensor& gates, double* probabilities,
                  double* loads) const {
    Scratch scratch(tile_bytes(channel_stride_) + tile_bytes(logit_stride_) + half_bytes());
    const Block x{scratch.take<double>(kTileTokens * channel_stride_), channel_stride_};
    const Block logits{scratch.take<double>(kTileTokens * logit_stride_), logit_stride_};
    load_tokens(tile, scratch.take<float>(kTileTokens * half_stride_), x);
    multiply_logits(tile, x, logits);
    moh::TokenRouting routing;
    for (int64_t t = 0; t < tile.count; ++t) {
      moh::route_token(shape_, logits.row(t), routing);
      const int64_t at = flat(tile, t), b = at / x_.size(1), token = at % x_.size(1);
      for (int64_t h = 0; h < shape_.heads(); ++h) {
        const bool shared = h < shape_.shared;
        const double gate =
            shared
                ? routing.weight[0] * routing.shared_gates[static_cast<size_t>(h)]
                : routing.weight[1] * routing.routed_gates[static_cast<size_t>(h - shape_.shared)];
        store(gates.at({b, h, token}), gates.dtype(), gate);
      }
      for (size_t e = 0; e < routing.chosen.size(); ++e) {
        probabilities[e] += routing.probabilities[e];
        loads[e] += routing.chosen[e];
      }
    }
  }

  /// Writes all logits; returns the gradient of a token's probabilities from the loss.
  std::vector<double> probability_gradient(Block logits, double grad_loss) const {
    const auto tiles = static_cast<int64_t>(tiles_.size());
    const auto heads = static_cast<size_t>(shape_.routed);
    std::vector<double> loads(heads * tiles_.size());
    parallel_for(tiles, threads_for(run_, tiles), [&](int64_t i, int) {
      const Tile& tile = tiles_[static_cast<size_t>(i)];
      Scratch scratch(tile_bytes(channel_stride_) + half_bytes());
      const Block x{scratch.take<double>(kTileTokens * channel_stride_), channel_stride_};
      load_tokens(tile, scratch.take<float>(kTileTokens * half_stride_), x);
      const Block own{logits.row(flat(tile, 0)), logits.stride};
      multiply_logits(tile, x, own);
      std::vector<char> chosen;
      for (int64_t t = 0; t < tile.count; ++t) {
        moh::choose_heads(own.row(t), shape_.routed, shape_.top_k, chosen);
        for (size_t e = 0; e < heads; ++e) loads[static_cast<size_t>(i) * heads + e] += chosen[e];
      }
    });
    std::vector<double> gradient(heads);
    for (size_t e = 0; e < heads; ++e) {
      double load = 0;
      for (size_t i = 0; i < tiles_.size(); ++i) load += loads[i * heads + e];
      if (tokens_ > 0) gradient[e] = grad_loss * loss_factor() * mean(mean(load));
    }
    return gradient;
  }

  /// Tiles [first, last): gradients of their tokens, and their sums of the weights' gradients.
  void run_part(int64_t first, int64_t last, Block logits, const std::vector<double>& gradient,
                const Tensor& grad_gates, const Tensor& grad_x, double* sums) const {
    Scratch scratch(2 * tile_bytes(channel_stride_) + tile_bytes(logit_stride_) + half_bytes());
    const Block x{scratch.take<double>(kTileTokens * channel_stride_), channel_stride_};
    const Block dx{scratch.take<double>(kTileTokens * channel_stride_), channel_stride_};
    const Block dz{scratch.take<double>(kTileTokens * logit_stride_), logit_stride_};
    auto* half = scratch.take<float>(kTileTokens * half_stride_);
    for (int64_t i = first; i < last; ++i) {
      const Tile& tile = tiles_[static_cast<size_t>(i)];
      load_tokens(tile, half, x);
      logit_gradients(tile, logits, gradient, grad_gates, dz);
      kernels_.multiply({dz.data, dz.stride, 1}, {weights_.as<double>(), channel_stride_},
                        shape_.logits(), dx, tile.count, channels_, false);
      store_tokens(dx, tile, half, grad_x);
      kernels_.multiply({dz.data, 1, dz.stride}, {x.data, x.stride}, tile.count,
                        {sums, channel_stride_}, shape_.logits(), channels_, true);
    }
  }

  void logit_gradients(const Tile& tile, Block logits, const std::vector<double>& gradient,
                       const Tensor& grad_gates, Block dz) const {
    moh::TokenRouting routing;
    std::vector<double> gates(static_cast<size_t>(shape_.heads()));
    for (int64_t t = 0; t < tile.count; ++t) {
      const int64_t at = flat(tile, t), b = at / x_.size(1), token = at % x_.size(1);
      moh::route_token(shape_, logits.row(at), routing);
      for (int64_t h = 0; h < shape_.heads() && grad_gates.defined(); ++h) {
        gates[static_cast<size_t>(h)] =
            *reinterpret_cast<const double*>(grad_gates.at({b, h, token}));
      }
      moh::token_gradient(shape_, routing, gates.data(), gradient.data(), dz.row(t));
    }
  }

  Array storage_;  // before x_, which may view it
  const moh::RouterShape shape_;
  const Tensor x_;
  const RunOptions run_;
  const kernels::MatrixKernels<double>& kernels_;
  const kernels::MatrixKernels<float>& narrow_;  // between 16-bit rows and float32
  const int64_t tokens_, channels_, channel_stride_, logit_stride_, half_stride_;
  const std::vector<Tensor> given_;  // the weights, in the order of the logits
  std::vector<Tile> tiles_;
  Array weights_, turned_;
};

std::vector<Tensor> defined_weights(const Tensor& wg, const Tensor& wg_shared,
                                    const Tensor& wg_group) {
  std::vector<Tensor> weights = {wg};
  for (const Tensor& weight : {wg_shared, wg_group}) {
    if (weight.defined()) weights.push_back(weight);
  }
  return weights;
}

double loss_gradient(const Tensor& grad_loss, DType dtype) {
  if (!grad_loss.defined()) return 0;
  if (grad_loss.rank() != 0 || grad_loss.dtype() != wide_type(dtype)) {
    fail(kOp, describe("grad_loss", grad_loss),
         std::string("[] ") + name_of(wide_type(dtype)) + " is needed");
  }
  return *convert(grad_loss, DType::f64).as<double>();
}

}  // namespace

MohForm parse_moh_form(std::string_view name) {
  if (name == "code") return MohForm::code;
  if (name == "paper") return MohForm::paper;
  fail(kOp, "form is '" + std::string(name) + "'", "'code' or 'paper' is needed");
}

MohRouting moh_router(const Tensor& x, const Tensor& wg, const Tensor& wg_shared,
                      const Tensor& wg_group, const MohRouterOptions& options,
                      const RunOptions& run) {
  const moh::RouterShape shape = check_inputs(x, wg, wg_shared, wg_group, options);
  std::vector<Tensor> weights = defined_weights(wg, wg_shared, wg_group);
  return Router(shape, x, std::move(weights), run).forward();
}

MohRouterGradients moh_router_backward(const Tensor& grad_gates, const Tensor& grad_loss,
                                       const Tensor& x, const Tensor& wg, const Tensor& wg_shared,
                                       const Tensor& wg_group, const MohRouterOptions& options,
                                       const RunOptions& run) {
  const moh::RouterShape shape = check_inputs(x, wg, wg_shared, wg_group, options);
  Array wide;
  Tensor gates;
  if (grad_gates.defined()) {
    check_parameter(kOp, "grad_gates", grad_gates, {x.size(0), shape.heads(), x.size(1)},
                    x.dtype());
    wide = convert(grad_gates, DType::f64);
    gates = wide;
  }
  const double loss = loss_gradient(grad_loss, x.dtype());
  std::vector<Tensor> weights = defined_weights(wg, wg_shared, wg_group);
  std::vector<Array> gradients = Router(shape, x, std::move(weights), run).backward(gates, loss);
  MohRouterGradients result;
  size_t next = 0;
  result.x = std::move(gradients[next++]);
  result.wg = std::move(gradients[next++]);
  if (wg_shared.defined()) result.wg_shared = std::move(gradients[next++]);
  if (wg_group.defined()) result.wg_group = std::move(gradients[next]);
  return result;
}

}  // namespace heed
