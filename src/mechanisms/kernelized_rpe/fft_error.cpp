#include "mechanisms/kernelized_rpe/fft_error.h"

#include <algorithm>
#include <cmath>

namespace heed::rpe {

namespace {

// Blocks are tiles; the last has the rest too.
int64_t block_count(int64_t tokens) { return std::max<int64_t>(1, tokens / kTile); }
int64_t block_end(int64_t block, int64_t tokens) {
  return block + 1 < block_count(tokens) ? (block + 1) * kTile : tokens;
}

}  // namespace

void Sizes::add(const Sizes& other) {
  most = std::max(most, other.most);
  least = std::min(least, other.least);
}

double Sizes::scale() const {
  constexpr int kMost = 1000;  // its inverse is a number of float64 too
  return most == 0 ? 1 : std::ldexp(1.0, -std::clamp(std::ilogb(most), -kMost, kMost));
}

std::vector<Sizes> block_sizes(const Tensor& t, int64_t b, int64_t h,
                               const kernels::MatrixKernels<double>& kernels) {
  const int64_t tokens = t.size(2), width = t.size(3);
  const int64_t stride = kernels::row_stride(kernels, width);
  std::vector<double> values(static_cast<size_t>(kTile * stride));
  const Block<double> x{values.data(), stride};
  std::vector<Sizes> blocks(static_cast<size_t>(block_count(tokens)));
  for (int64_t block = 0; block < block_count(tokens); ++block) {
    std::vector<double> most(static_cast<size_t>(width));
    const int64_t end = block_end(block, tokens);
    for (int64_t begin = block * kTile; begin < end; begin += kTile) {
      const int64_t rows = std::min(kTile, end - begin);
      kernels.load_rows({t.at({b, h, begin}), t.dtype(), t.stride(2), rows, width}, x);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t i = 0; i < width; ++i) {
          double& size = most[static_cast<size_t>(i)];
          size = std::max(size, std::abs(x.row(r)[i]));
        }
      }
    }
    for (double size : most) {
      if (size != 0) blocks[static_cast<size_t>(block)].add({size, size});
    }
  }
  return blocks;
}

std::vector<double> sizes_of_tokens(const Channels& of, int64_t matrix, const double* factors,
                                    int64_t tokens) {
  std::vector<double> sums(static_cast<size_t>(tokens));
  for (int64_t r = 0; r < of.count; ++r) {
    Row x = of.row(matrix, r);
    for (size_t i = 0; i < sums.size(); ++i) sums[i] += std::abs(x[i]) * factors[r];
  }
  return sums;
}

std::vector<double> query_sizes(const Channels& queries, const Channels& gradients, int64_t head,
                                int64_t tokens) {
  const std::vector<double> ones(static_cast<size_t>(queries.count), 1);
  std::vector<double> sizes = sizes_of_tokens(queries, head, ones.data(), tokens);
  std::vector<double> largest(sizes.size());
  for (int64_t f = 0; f < gradients.count; ++f) {
    Row g = gradients.row(head, f);
    for (size_t i = 0; i < sizes.size(); ++i) largest[i] = std::max(largest[i], std::abs(g[i]));
  }
  for (size_t i = 0; i < sizes.size(); ++i) sizes[i] *= largest[i];
  return sizes;
}

void widen(std::vector<double>& sizes) {
  const auto tokens = static_cast<int64_t>(sizes.size());
  for (int64_t block = 0; block < block_count(tokens); ++block) {
    const auto begin = sizes.begin() + block * kTile,
               end = sizes.begin() + block_end(block, tokens);
    std::fill(begin, end, *std::max_element(begin, end));
  }
}

double error_ratio(double error, double of) {
  const double ratio = error / of;
  return ratio >= 0 ? ratio : std::numeric_limits<double>::infinity();
}

double weight_norm(const Call& call, const double* weights) {
  double sum = 0;
  for (int64_t i = 0; i < call.offsets(); ++i) sum += weights[i] * weights[i];
  return std::sqrt(sum);
}

double weight_spread(const Call& call, const double* weights) {
  return 1 / *std::min_element(weights, weights + call.offsets());
}

}  // namespace heed::rpe
