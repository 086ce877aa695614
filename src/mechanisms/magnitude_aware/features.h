// The features of MALA: elu + 1, and for products with the state a rotation on the grid behind it.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "heed/magnitude_aware_linear_attention.h"
#include "kernels/rotate_rows.h"
#include "mechanisms/element_map.h"

namespace heed {

/// Angles of grid rows and columns, for the positions that a call has.
template <class T>
class GridAngles {
 public:
  /// `first`: the position of token 0 of each batch entry.
  GridAngles(const Grid& grid, int64_t dim, const std::vector<int64_t>& first, int64_t tokens)
      : grid_width_(grid.width), half_(dim / 2) {
    for (int64_t start : first) {
      for (int64_t i = 0; i < std::min(tokens, grid.width); ++i) {
        columns_.positions.push_back((start + i) % grid.width);
      }
      if (tokens == 0) continue;
      for (int64_t r = start / grid.width; r <= (start + tokens - 1) / grid.width; ++r) {
        rows_.positions.push_back(r);
      }
    }
    fill(rows_);
    fill(columns_);
  }
  /// Elements [begin, end) of a row, which are at x; both even.
  void rotate(const kernels::RotationKernels<T>& kernels, int64_t position, int64_t begin,
              int64_t end, T* x, bool back) const {
    const auto part = [&](const Table& table, size_t place, int64_t from, int64_t to) {
      if (from >= to) return;
      const size_t at = place + static_cast<size_t>(from % half_);
      kernels.rotate(x + (from - begin), table.cosine.data() + at, table.sine.data() + at,
                     to - from, back);
    };
    part(rows_, rows_.place(position / grid_width_, half_), begin, std::min(end, half_));
    part(columns_, columns_.place(position % grid_width_, half_), std::max(begin, half_), end);
  }

 private:
  struct Table {
    std::vector<int64_t> positions;  // sorted
    std::vector<T> cosine, sine;     // [position][half a row]
    size_t place(int64_t position, int64_t width) const {
      const auto found = std::lower_bound(positions.begin(), positions.end(), position);
      return static_cast<size_t>((found - positions.begin()) * width);
    }
  };
  void fill(Table& table) const {
    auto& positions = table.positions;
    std::sort(positions.begin(), positions.end());
    positions.erase(std::unique(positions.begin(), positions.end()), positions.end());
    const int64_t pairs = half_ / 2;
    for (int64_t position : positions) {
      for (int64_t t = 0; t < pairs; ++t) {
        // The last of the angles is 1e-4, and a single one is 1.
        const double exponent =
            pairs == 1 ? 0 : static_cast<double>(t) / static_cast<double>(pairs - 1);
        const double angle = static_cast<double>(position) * std::pow(10000.0, -exponent);
        const auto cosine = static_cast<T>(std::cos(angle)), sine = static_cast<T>(std::sin(angle));
        table.cosine.insert(table.cosine.end(), {cosine, cosine});
        table.sine.insert(table.sine.end(), {-sine, sine});
      }
    }
  }

  int64_t grid_width_, half_;
  Table rows_, columns_;
};

/// elu + 1, then turned.
template <class T>
class TurnedElu : public chunked::RowMap<T> {
 public:
  /// `first`: the position of row 0 of each batch entry.
  TurnedElu(Isa isa, const GridAngles<T>& angles, std::vector<int64_t> first)
      : elu_(FeatureKind::elu1, isa),
        rotations_(kernels::rotation_kernels<T>(isa)),
        angles_(angles),
        first_(std::move(first)) {}

  void map(const chunked::RowsAt& at, const kernels::Rows& x, int64_t begin, int64_t count,
           kernels::Block<T> to) const override {
    elu_.map(at, x, begin, count, to);
    rotate(at, x.count, begin, begin + count, to, false);
  }

  void pull(const chunked::RowsAt& at, const kernels::Rows& x, int64_t begin, int64_t count,
            kernels::Block<const T> gradient, kernels::Block<T> into) const override {
    std::vector<T> memory(static_cast<size_t>(x.count * into.stride));
    const kernels::Block<T> turned{memory.data(), into.stride};
    for (int64_t r = 0; r < x.count; ++r) std::copy_n(gradient.row(r), x.width, turned.row(r));
    rotate(at, x.count, begin, begin + count, turned, true);
    elu_.pull(at, x, begin, count, {turned.data, turned.stride}, into);
  }

 private:
  void rotate(const chunked::RowsAt& at, int64_t count, int64_t begin, int64_t end,
              kernels::Block<T> x, bool back) const {
    const int64_t start = first_[static_cast<size_t>(at.batch)] + at.token;
    for (int64_t r = 0; r < count; ++r) {
      angles_.rotate(rotations_, start + r, begin, end, x.row(r), back);
    }
  }

  ElementMap<T> elu_;
  const kernels::RotationKernels<T>& rotations_;
  const GridAngles<T>& angles_;
  std::vector<int64_t> first_;
};

}  // namespace heed
