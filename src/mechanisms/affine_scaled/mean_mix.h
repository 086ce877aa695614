// What affine-scaled attention adds to softmax attention: means of visible values, mixed into the result,
// and the way back. T is float or double.
#pragma once
#include <vector>

#include "base/parallel.h"
#include "base/round_up.h"
#include "engine/tiled/plan.h"
#include "kernels/row_maps.h"
#include "mechanisms/row_blocks.h"

namespace heed::affine_scaled {

/// Shapes as in affine_scaled_attention.h.
struct Inputs {
  Tensor q, k, v, alpha, alpha_mean;
  std::vector<tiled::TilePlan> plans;  // one per batch entry
  RunOptions run;
};

template <class T>
class MeanMix {
 public:
  explicit MeanMix(const Inputs& inputs);

  /// out = alpha * softmax_out + (alpha_mean - alpha) * mean of the visible values; the two tensors may
  /// be one.
  void mix(const Tensor& softmax_out, const Tensor& out) const;

  /// Everything of the backward ahead of the one of softmax attention: gradients of alpha and alpha_mean,
  /// and that of the softmax result, alpha * grad_out, in `scaled` [B,H,Lq,Dv].
  void scale_gradients(const Tensor& grad_out, const Tensor& softmax_out, const Tensor& scaled);
  /// grad_v = through_softmax + what arrives by the means; the two may be one tensor.
  void add_mean_gradients(const Tensor& through_softmax, const Tensor& grad_v) const;
  Array alpha_gradient() const;
  Array alpha_mean_gradient() const;

 private:
  using Block = kernels::Block<T>;
  static constexpr DType kType = dtype_of<T>;
  static constexpr int64_t kItemRows = 256;  // between two sums from scratch
  static constexpr int64_t kBlockRows = 64;  // whose means stay in the first-level cache

  /// Rows [begin, begin + count) of a key head.
  struct Rows {
    int64_t batch = 0, kv_head = 0, begin = 0, count = 0;
  };
  /// Means of a block of rows and the sums they came from.
  struct Means {
    Block rows;
    kernels::RowWindow at;
    void* sums;
    kernels::RowWindow* windows;
    T* factors;
  };

  int64_t head(const Rows& rows, int64_t g) const { return rows.kv_head * group_ + g; }
  const T* alpha_of(int64_t batch, int64_t head) const {
    return alpha_.as<T>() + (batch * heads_ + head) * alpha_stride_;
  }
  kernels::Rows rows_of(const Tensor& t, const Rows& rows, int64_t head) const {
    return heed::rows_of(t, {rows.batch, head, rows.begin, rows.count});
  }
  kernels::RowsOut out_rows(const Tensor& t, const Rows& rows, int64_t head) const {
    return heed::out_rows(t, {rows.batch, head, rows.begin, rows.count});
  }

  /// Calls body(rows, memory of the means) for items of up to kItemRows rows of each key head.
  template <class Body>
  void for_items(int64_t length, const Body& body) const;
  void set_windows(const Rows& rows, const Means& means) const;
  void sum_rows(const kernels::Rows& from, int64_t count, Means& means) const;
  void gradients_of_block(const Rows& rows, const Tensor& grad_out, const Tensor& softmax_out,
                          const Tensor& scaled, const Means& means, double* mean_sums);

  const Inputs& in_;
  const int64_t heads_, kv_heads_, group_, queries_, keys_, width_, padded_, alpha_stride_;
  const kernels::RowMapKernels<T>& maps_;
  Array alpha_;                     // [B * H, Lq]
  std::vector<double> alpha_mean_;  // [H]
  Array grad_alpha_;                // like alpha_
  std::vector<double> grad_mean_;   // [H]
  Array means_gradient_;            // [B * Hkv, Lq, Dv]: of the sum of visible values of each row
};

}  // namespace heed::affine_scaled
