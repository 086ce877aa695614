// Depthwise causal convolution along the rows of a matrix, each column on its own.
//
//   convolve    out[t] = bias + sum_a weight[a] x[t - (taps - 1) + a]
//   correlate   sums[a] += sum_t y[t] x[t - (taps - 1) + a],  sums[taps] += sum_t y[t]
//
// for t in [begin, end); rows of x before row 0 are zero and not read. Strides may be negative: the
// gradient of x is the same convolution with time running backwards. T is float or double.
#pragma once
#include "heed/run.h"
#include "kernels/tile.h"

namespace heed::kernels {

/// Columns of weights, biases and sums, [taps][padded width], are padded to a multiple of this.
inline constexpr int64_t kDepthwisePad = 16;

template <class T>
struct DepthwiseKernels {
  /// bias may be null; out has the type of x.
  void (*convolve)(const Rows& x, const T* weight, const T* bias, int64_t taps, int64_t begin,
                   int64_t end, void* out, int64_t out_stride) = nullptr;
  /// x and y have one type.
  void (*correlate)(const Rows& x, const Rows& y, int64_t taps, int64_t begin, int64_t end,
                    T* sums) = nullptr;
};

template <class T>
const DepthwiseKernels<T>& depthwise_kernels(Isa isa);

}  // namespace heed::kernels
