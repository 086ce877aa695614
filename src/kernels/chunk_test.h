// What the tests of the chunk kernels share: random operands, the tables of this machine, ranges.
#pragma once
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "base/round_up.h"
#include "kernels/chunk.h"
#include "kernels/parts.h"

namespace heed::kernels::chunk_tests {

template <class T>
struct Matrix {
  Matrix(int64_t row_count, int64_t column_count, int64_t row_stride, uint32_t seed)
      : memory(static_cast<size_t>(row_count * row_stride + 64)), stride(row_stride) {
    std::mt19937 generator(seed);
    std::normal_distribution<double> normal;
    for (int64_t r = 0; r < row_count; ++r) {
      for (int64_t c = 0; c < column_count; ++c) at(r, c) = static_cast<T>(normal(generator));
    }
  }
  T& at(int64_t r, int64_t c) { return memory[static_cast<size_t>(r * stride + c)]; }
  Block<T> block() { return {memory.data(), stride}; }
  Block<const T> read() const { return {memory.data(), stride}; }
  std::vector<T> memory;
  int64_t stride;
};

template <class T>
double unit() {
  return sizeof(T) == 8 ? 1e-14 : 4e-6;
}

template <class T, class Body>
void for_tables(Body&& body) {
  for (Isa isa : available_isas()) {
    SCOPED_TRACE(name_of(isa));
    body(chunk_kernels<T>(isa), isa);
  }
}

inline std::vector<KeyRange> causal_ranges(int64_t rows, int64_t columns) {
  std::vector<KeyRange> ranges;
  for (int64_t r = 0; r < rows; ++r) {
    ranges.push_back({static_cast<int32_t>(r / 3), static_cast<int32_t>(std::min(columns, 2 * r))});
    if (r % 5 == 4) ranges.back() = {0, 0};
  }
  return ranges;
}

inline bool sees(const KeyRange& range, int64_t m) { return m >= range.begin && m < range.end; }

// Scores with NaN wherever a row sees nothing.
template <class T>
Matrix<T> masked_scores(const std::vector<KeyRange>& ranges, int64_t columns, uint32_t seed) {
  const auto rows = static_cast<int64_t>(ranges.size());
  Matrix<T> s(rows, columns, columns + 48, seed);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t m = 0; m < s.stride; ++m) {
      if (!sees(ranges[static_cast<size_t>(r)], m))
        s.at(r, m) = std::numeric_limits<T>::quiet_NaN();
    }
  }
  return s;
}

using Types = testing::Types<float, double>;

}  // namespace heed::kernels::chunk_tests
