// The learned layer in front of a feature map, z = x W + bias, and random projections: their matrices
// packed once a call, in the type of the computation or for products of bfloat16.
#pragma once
#include <string>
#include <vector>

#include "base/round_up.h"
#include "heed/feature_map.h"
#include "kernels/matrix.h"
#include "kernels/tile.h"
#include "mechanisms/parameter.h"

namespace heed::features {

/// Why the layer of a call is not multiplied in bfloat16; empty if it is where x is bfloat16.
inline std::string no_half_operands(FeatureKind kind, const Tensor& weight) {
  if (!weight.defined()) return "the call has no layer";
  if (kind == FeatureKind::performer) return "random features are made in float32";
  return weight.dtype() == DType::bf16 ? "" : "the layer's weight is float32";
}

/// z = x right[h] and dx = dz left[h] with every matrix times `factor`, the left the right's transpose.
/// A weight is [H,D,D'], a projection of random features [H,M,D].
template <class T>
class WideLayer {
 public:
  WideLayer() = default;
  WideLayer(const kernels::MatrixKernels<T>& kernels, const Tensor& weight, bool projection,
            T factor, bool for_backward)
      : kernels_(&kernels),
        dim_(weight.size(projection ? 2 : 1)),
        width_(weight.size(projection ? 1 : 2)),
        right_stride_(kernels::row_stride(kernels, width_)),
        left_stride_(kernels::row_stride(kernels, dim_)) {
    const int64_t heads = weight.size(0);
    right_.resize(static_cast<size_t>(heads * dim_ * right_stride_));
    if (for_backward || projection)
      left_.resize(static_cast<size_t>(heads * width_ * left_stride_));
    Array storage;
    const Tensor rows = with_unit_stride(weight, storage);
    for (int64_t h = 0; h < heads; ++h) {
      const kernels::Rows from{rows.at({h}), rows.dtype(), rows.stride(1), rows.size(1),
                               rows.size(2)};
      const kernels::Block<T> right{right_.data() + h * dim_ * right_stride_, right_stride_};
      const kernels::Block<T> left{left_.data() + h * width_ * left_stride_, left_stride_};
      kernels.load_rows(from, projection ? left : right);
      if (projection) {
        kernels.transpose({left.data, left.stride}, width_, dim_, right);
      } else if (for_backward) {
        kernels.transpose({right.data, right.stride}, dim_, width_, left);
      }
    }
    if (factor == 1) return;
    for (T& x : right_) x *= factor;
    for (T& x : left_) x *= factor;
  }

  /// z[r] = x[r] right[h]
  void apply(kernels::Block<const T> x, int64_t h, int64_t rows, kernels::Block<T> z) const {
    kernels_->multiply({x.data, x.stride, 1},
                       {right_.data() + h * dim_ * right_stride_, right_stride_}, dim_, z, rows,
                       width_, false);
  }
  /// dx[r] = dz[r] left[h]
  void pull(kernels::Block<const T> dz, int64_t h, int64_t rows, kernels::Block<T> dx) const {
    kernels_->multiply({dz.data, dz.stride, 1},
                       {left_.data() + h * width_ * left_stride_, left_stride_}, width_, dx, rows,
                       dim_, false);
  }

 private:
  const kernels::MatrixKernels<T>* kernels_ = nullptr;
  int64_t dim_ = 0, width_ = 0, right_stride_ = 0, left_stride_ = 0;
  std::vector<T> right_, left_;
};

/// The same for weights [H,D,D'] and rows x of bfloat16. Blocks have rows padded to row_multiple() and
/// columns to kColumns.
class HalfLayer {
 public:
  static constexpr int64_t kColumns = 32;

  HalfLayer() = default;
  HalfLayer(const kernels::TileKernels<float>& kernels, const Tensor& weight, bool for_backward)
      : kernels_(&kernels),
        dim_(weight.size(1)),
        width_(weight.size(2)),
        value_bytes_(kernels.value_bytes(dim_, width_)),
        key_bytes_(for_backward ? kernels.key_bytes(dim_, width_) : 0) {
    const int64_t heads = weight.size(0);
    packed_ = Array(DType::bf16, {heads * (value_bytes_ + key_bytes_) / 2});
    Array storage;
    const Tensor rows = with_unit_stride(weight, storage);
    for (int64_t h = 0; h < heads; ++h) {
      const kernels::Rows from{rows.at({h}), rows.dtype(), rows.stride(1), dim_, width_};
      kernels.pack_values(from, values(h));
      if (for_backward) kernels.pack_keys(from, keys(h));
    }
  }

  explicit operator bool() const { return kernels_ != nullptr; }
  int64_t row_multiple() const { return kernels_->row_multiple; }

  /// Scratch for the operands of a tile of rows, padded as they are.
  struct Memory {
    void *x = nullptr, *dz = nullptr, *columns = nullptr, *pairs = nullptr;
  };
  int64_t x_bytes(int64_t rows) const { return kernels_->query_bytes(rows, dim_); }
  int64_t dz_bytes(int64_t rows) const { return kernels_->query_bytes(rows, width_); }
  int64_t column_bytes(int64_t rows) const { return kernels_->column_bytes(rows, dim_); }

  /// z[r] += x[r] W[h]
  void apply(const kernels::Rows& x, int64_t h, kernels::Block<float> z, const Memory& m) const {
    kernels_->pack_queries(x, false, m.x);
    kernels_->accumulate(m.x, round_up(dim_, kColumns), x.count, values(h), dim_, width_, nullptr,
                         nullptr, z, nullptr);
  }
  /// dx[r] = dz[r] W[h]^T
  void pull(kernels::Block<const float> dz, int64_t h, int64_t rows, kernels::Block<float> dx,
            const Memory& m) const {
    kernels_->round_weights(dz, rows, width_, m.dz, round_up(width_, kColumns));
    kernels_->scores(m.dz, rows, keys(h), dim_, width_, nullptr, dx, nullptr);
  }
  /// sum[i][j] += sum_r x[r][i] dz[r][j]
  void add_outer(const kernels::Rows& x, kernels::Block<const float> dz, kernels::Block<float> sum,
                 const Memory& m) const {
    kernels_->pack_columns(x, false, m.columns);
    kernels_->pair_weights(dz, x.count, width_, m.pairs, sum.stride);
    kernels_->accumulate_columns(m.columns, x.count, dim_, m.pairs, sum.stride, width_, nullptr,
                                 sum);
  }

 private:
  std::byte* part(int64_t h) const {
    return packed_.as<std::byte>() + h * (value_bytes_ + key_bytes_);
  }
  std::byte* values(int64_t h) const { return part(h); }
  std::byte* keys(int64_t h) const { return part(h) + value_bytes_; }

  const kernels::TileKernels<float>* kernels_ = nullptr;
  int64_t dim_ = 0, width_ = 0, value_bytes_ = 0, key_bytes_ = 0;
  Array packed_;
};

}  // namespace heed::features
