// What forward and backward of a feature map share: the checked call, the parameters of all heads, and the
// steps from x to the features of a tile of tokens.
#pragma once
#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "engine/candidates.h"
#include "engine/operands.h"
#include "heed/feature_map.h"
#include "kernels/feature_rows.h"
#include "kernels/matrix.h"
#include "mechanisms/feature_map/layer.h"
#include "mechanisms/parameter.h"
#include "mechanisms/row_blocks.h"

namespace heed::features {

using kernels::Block;
using kernels::MatrixKernels;
using kernels::Rows;

// One checked call. `width` is D', or M for performer: what a row of z holds.
struct Call {
  Tensor x, weight, bias, forward_features;
  FeatureKind kind;
  int64_t batch, heads, tokens, dim, width, features;
  DType dtype() const { return x.dtype(); }
  bool performer() const { return kind == FeatureKind::performer; }
  Dims out_shape() const { return {batch, heads, tokens, features}; }
};

inline double input_factor(const Call& call) {  // y = x / D^(1/4) of performer
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

// Whether a feature is made of one element of x alone.
inline bool is_element_map(const Call& call) {
  return kernels::element_by_element(call.kind) && !call.weight.defined() && !call.bias.defined();
}

inline Candidate path_of(const Call& call, const RunOptions& run) {
  return choose_candidate(call.dtype(), no_half_operands(call.kind, call.weight), run);
}

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
        scratch_(counted(rows, gradients)) {
    Cutter cut(scratch_.take<std::byte>(0));
    lay_out(cut, rows, gradients);
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

  size_t counted(int64_t rows, bool gradients) {
    Cutter cut;
    lay_out(cut, rows, gradients);
    return cut.used();
  }
  void lay_out(Cutter& cut, int64_t rows, bool gradients) {
    x_block_ = {cut.take<T>(rows * x_stride_), x_stride_};
    z = {cut.take<T>(rows * z_stride_), z_stride_};
    phi = {cut.take<T>(rows * phi_stride_), phi_stride_};
    shift = cut.take<T>(rows);
    row_sums = cut.take<T>(rows);
    if (gradients) {
      dphi = {cut.take<T>(rows * phi_stride_), phi_stride_};
      dz = {cut.take<T>(rows * z_stride_), z_stride_};
      dx = {cut.take<T>(rows * x_stride_), x_stride_};
    }
    if (!layer_.half) return;
    half.x = cut.take<std::byte>(layer_.half.x_bytes(rows));
    if (!gradients) return;
    half.dz = cut.take<std::byte>(layer_.half.dz_bytes(rows));
    half.columns = cut.take<std::byte>(layer_.half.column_bytes(rows));
    half.pairs = cut.take<uint32_t>(ceil_div(rows, 2) * z_stride_);
  }

  const Call& call_;
  const MatrixKernels<T>& kernels_;
  const Layer<T>& layer_;
  int64_t x_stride_, z_stride_, phi_stride_;
  Block<T> x_block_;
  Scratch scratch_;
};

// backward.cpp
template <class T>
void backward(const Call& call, const Tensor& grad_out, const FeatureMapGradientViews& wanted,
              const RunOptions& run);

}  // namespace heed::features
