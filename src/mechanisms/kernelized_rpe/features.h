// Features of queries and keys, tile by tile, and the way of their gradients back.
#pragma once
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/feature_rows.h"
#include "kernels/matrix.h"
#include "mechanisms/kernelized_rpe/call.h"

namespace heed::rpe {

using kernels::Block;

template <class T>
class Features {
 public:
  Features(const Call& call, const kernels::MatrixKernels<T>& kernels, Isa isa);

  /// Scratch of one thread for tiles of up to `rows` tokens.
  struct Work {
    std::vector<T> x_values, dx_values, dz_values, row_values;
    Block<T> x, dx, dz;
    T* row = nullptr;  // one number a row
    Work(const Features& owner, int64_t rows);
  };

  /// Features of queries [begin, begin + rows) of a head. Their common factor is arbitrary.
  void queries(int64_t b, int64_t h, int64_t begin, int64_t rows, Work& work, Block<T> phi) const;
  /// The same for keys in two steps, as the common factor must be one for all keys of a head: first
  /// exponents, of which the largest is returned, then their exponentials relative to the largest of all.
  T key_exponents(int64_t b, int64_t h, int64_t begin, int64_t rows, Work& work,
                  Block<T> phi) const;
  void finish_keys(int64_t rows, T largest, Block<T> phi) const;

  /// work.dx = gradient of the tokens from that of their features. `is_key` says which they are of.
  void gradient(bool is_key, int64_t b, int64_t h, int64_t begin, int64_t rows, Block<const T> phi,
                Block<const T> dphi, Work& work) const;

 private:
  void load(const Tensor& from, int64_t b, int64_t h, int64_t begin, int64_t rows, Work& work,
            bool normalise) const;
  void exponents(int64_t h, int64_t rows, const Work& work, Block<T> z) const;
  int64_t key_head(int64_t h) const { return h / call_.sizes.group(); }
  bool random() const { return call_.options.features != RpeFeatures::elu1; }
  Block<const T> right(int64_t h) const {
    return {right_.data() + h * call_.sizes.dim * right_stride_, right_stride_};
  }
  Block<const T> left(int64_t h) const {
    return {left_.data() + h * call_.random * left_stride_, left_stride_};
  }

  const Call& call_;
  const kernels::MatrixKernels<T>& kernels_;
  const kernels::FeatureKernels<T>& rows_;
  T factor_;                     // y = factor x
  std::vector<T> right_, left_;  // the projections of all heads times factor, [D,M] and [M,D]
  int64_t right_stride_ = 0, left_stride_ = 0;
};

}  // namespace heed::rpe
