// Relative positions as score terms of the tiled engine. A tile of query rows meets the rows of the table
// that its distances need in one product, from which every row takes its part shifted by one.
#pragma once
#include <vector>

#include "engine/tiled/problem.h"
#include "kernels/skew.h"

namespace heed {

struct RelativeInputs {
  Tensor q, k;          // [B,H,Lq,D] [B,Hkv,Lk,D]
  Tensor rel_key;       // [2P,H,D]
  Tensor rel_bias;      // [2P,H]
  Tensor content_bias;  // [H,D]
  bool causal = true;
  double scale = 1;
  int64_t centre() const { return rel_key.size(0) / 2; }  // P
  int64_t offset() const { return k.size(2) - q.size(2); }
};

template <class T>
class RelativeTerms final : public tiled::ScoreTerms {
 public:
  RelativeTerms(const RelativeInputs& inputs, const RunOptions& run);

  void shape(const tiled::TileAt& at, kernels::Block<float> s) const override;
  void shape(const tiled::TileAt& at, kernels::Block<double> s) const override;

  bool has_gradient() const override { return true; }
  void begin_gradient(int lanes) override;
  void add_gradient(int lane, const tiled::TileAt& at, kernels::Block<const float> ds,
                    kernels::Block<float> dq) const override;
  void add_gradient(int lane, const tiled::TileAt& at, kernels::Block<const double> ds,
                    kernels::Block<double> dq) const override;

  // After the backward, in the types of the inputs.
  Array rel_key_gradient() const;
  Array rel_bias_gradient() const;
  /// Also adds to dk [B,Hkv,Lk,D], contiguous of T, what it gets through the content bias.
  Array content_bias_gradient(const Tensor& dk) const;

 private:
  using Block = kernels::Block<T>;

  /// The rows of the table that a tile meets: [begin, begin + skew.columns).
  struct Window {
    int64_t begin = 0;
    kernels::Skew skew;
    int64_t stride = 0;  // of blocks with a column for each of them
  };
  void set_bias();
  void set_content();
  Window window_of(const tiled::TileAt& at) const;
  kernels::Rows query_rows(const tiled::TileAt& at) const;
  kernels::Rows table_rows(const tiled::TileAt& at, const Window& window) const;
  void set_ranges(const tiled::TileAt& at, const Window& window, kernels::KeyRange* ranges) const;
  void add_terms(const tiled::TileAt& at, Block s) const;
  void dot_rows(const tiled::TileAt& at, const Window& window, Block products) const;
  void add_tile(int lane, const tiled::TileAt& at, kernels::Block<const T> ds, Block dq) const;
  void add_to_queries(const tiled::TileAt& at, const Window& window, Block skewed,
                      const kernels::KeyRange* ranges, Block dq) const;
  void add_to_table(const Array& sums, const tiled::TileAt& at, const Window& window, Block skewed,
                    const kernels::KeyRange* ranges) const;
  const T* content(int64_t sequence, int64_t head) const {
    return content_.as<T>() + (sequence * heads_ + head) * inputs_.k.size(2);
  }

  /// Sums of one lane over the tiles of one query head, made at the first of them.
  struct HeadSums {
    Array table;               // [D padded, band]: transposed rows of the table, of T
    std::vector<double> bias;  // [band]
  };
  HeadSums& sums_of(int lane, int64_t head) const;

  const RelativeInputs inputs_;
  const RunOptions run_;
  const kernels::TileKernels<T>& wide_;      // operands of type T
  const kernels::TileKernels<T>& products_;  // bfloat16 operands where q and the table are that
  const kernels::SkewKernels<T>& skew_;
  const int64_t heads_, head_dim_;
  Array table_copy_;
  Tensor table_;   // [2P,H,D] with a unit stride in the last dimension
  Array bias_;     // [H,2P], scaled, of T
  Array content_;  // [B,H,Lk]: content_bias . k, scaled, of T

  // Rows of the table that scores read, those that a tile may touch.
  int64_t band_begin_ = 0, band_ = 0;
  bool finite_queries_ = true;
  mutable std::vector<HeadSums> sums_;    // [lanes, H]
  mutable std::vector<double> key_sums_;  // [B,H,Lk]: sums of dS over rows
};

extern template class RelativeTerms<float>;
extern template class RelativeTerms<double>;

}  // namespace heed
