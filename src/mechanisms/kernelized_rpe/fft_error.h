// How far products by FFT may be off. The rounding error of T x is about
//   u log2(length) |c| |x|         norms over all offsets and all tokens, u the rounding unit
// for every token alike. A call whose denominators (of queries that see something) are not large beside it is
// computed directly; so is one whose values or gradients lie so far apart that those of some tokens drown.
#pragma once
#include <cstdint>
#include <limits>
#include <vector>

#include "kernels/matrix.h"
#include "mechanisms/kernelized_rpe/toeplitz.h"

namespace heed::rpe {

using kernels::Block;

constexpr int64_t kTile = 64;  // tokens whose features are computed together

/// Rows of numbers for every token: [matrix][channel][token].
struct Channels {
  int64_t count = 0, stride = 0;
  std::vector<double> values;
  Channels() = default;
  Channels(int64_t matrices, int64_t channels, int64_t row_stride)
      : count(channels),
        stride(row_stride),
        values(static_cast<size_t>(matrices * channels * row_stride)) {}
  double* row(int64_t matrix, int64_t channel) {
    return values.data() + (matrix * count + channel) * stride;
  }
  Row row(int64_t matrix, int64_t channel) const {
    return values.data() + (matrix * count + channel) * stride;
  }
  Block<double> from_token(int64_t matrix, int64_t token) {
    return {row(matrix, 0) + token, stride};
  }
};

/// The largest and the smallest of magnitudes that are not 0.
struct Sizes {
  double most = 0, least = std::numeric_limits<double>::infinity();
  void add(const Sizes& other);
  double spread() const { return most == 0 ? 1 : most / least; }
  /// A power of 2 that brings the largest to 1.
  double scale() const;
};

/// Of a head of t [B,H,L,E], block of tokens by block: of the largest magnitudes of the channels there.
/// Single numbers may be small by chance.
std::vector<Sizes> block_sizes(const Tensor& t, int64_t b, int64_t h,
                               const kernels::MatrixKernels<double>& kernels);

/// Sums over the channels of a matrix of magnitudes times factors, for every token.
std::vector<double> sizes_of_tokens(const Channels& of, int64_t matrix, const double* factors,
                                    int64_t tokens);

/// Every number becomes the largest of its block of tokens.
void widen(std::vector<double>& sizes);

/// What queries add to sums over them: the largest gradient of their own sums, times their features.
std::vector<double> query_sizes(const Channels& queries, const Channels& gradients, int64_t head,
                                int64_t tokens);

/// A key that few queries see gets a gradient far below the others: its own digits may be fewer.
constexpr double kGradientSlack = 16;

/// Infinite where that which an error is in is no positive number.
double error_ratio(double error, double of);

double weight_norm(const Call& call, const double* weights);
/// The largest weight, 1, over the smallest; infinite if some offset has none.
double weight_spread(const Call& call, const double* weights);

}  // namespace heed::rpe
