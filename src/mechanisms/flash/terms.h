// Boolean masks, additive bias and block masks as score terms of the tiled engine.
#pragma once
#include <vector>

#include "engine/tiled/problem.h"
#include "heed/flash_attention.h"

namespace heed {

class FlashTerms final : public tiled::ScoreTerms {
 public:
  /// For calls of this type. Throws Error unless the options' tensors fit [B,H,Lq,Lk].
  FlashTerms(const FlashOptions& options, const Dims& scores, DType type, const RunOptions& run);

  bool needed() const;
  tiled::Visit visit(const tiled::TileAt& at) const override;
  void shape(const tiled::TileAt& at, kernels::Block<float> s) const override;
  void shape(const tiled::TileAt& at, kernels::Block<double> s) const override;

  bool has_gradient() const override { return bias_.defined(); }
  tiled::GradientOverlap gradient_overlap() const override;
  void begin_gradient(int lanes) override;
  void add_gradient(int lane, const tiled::TileAt& at, kernels::Block<const float> ds,
                    kernels::Block<float> dq) const override;
  void add_gradient(int lane, const tiled::TileAt& at, kernels::Block<const double> ds,
                    kernels::Block<double> dq) const override;
  /// The gradient of the bias, in its shape and type; once.
  Array bias_gradient();

 private:
  template <class T>
  void add_bias(const tiled::TileAt& at, kernels::Block<T> s) const;
  template <class T>
  void shape_tile(const tiled::TileAt& at, kernels::Block<T> s) const;
  template <class T>
  void add_tile(int lane, const tiled::TileAt& at, kernels::Block<const T> ds) const;
  template <class T>
  Array sum_of_lanes() const;
  tiled::Visit visit_mask(const tiled::TileAt& at) const;
  tiled::Visit visit_blocks(const tiled::TileAt& at) const;
  bool block_alive(int64_t head, int64_t row_block, int64_t key_block) const;

  const RunOptions run_;
  const Isa isa_;
  Tensor mask_, bias_;  // [B,H,Lq,Lk] with stride 0 where broadcast
  Tensor block_mask_;   // [H,row blocks,key blocks], likewise
  int64_t block_rows_ = 1, block_keys_ = 1;
  Dims bias_shape_;      // as given
  Dims bias_strides_;    // of the gradient, contiguous, 0 where broadcast or of one element
  bool stores_ = false;  // the gradient has an element for every score, in a type that tiles are
                         // rounded to: no sums are needed
  std::vector<Array> sums_;  // one a lane
};

}  // namespace heed
