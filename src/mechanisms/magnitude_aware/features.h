// The features of MALA: elu + 1, and for products with the state a rotation on the grid behind it.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "engine/chunked/problem.h"
#include "heed/magnitude_aware_linear_attention.h"
#include "kernels/chunk.h"
#include "kernels/feature_rows.h"
#include "kernels/rotate_rows.h"

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
  void rotate(const kernels::RotationKernels<T>& kernels, int64_t position, T* x, bool back) const {
    const size_t row = rows_.place(position / grid_width_, half_);
    const size_t column = columns_.place(position % grid_width_, half_);
    kernels.rotate(x, rows_.cosine.data() + row, rows_.sine.data() + row, half_, back);
    kernels.rotate(x + half_, columns_.cosine.data() + column, columns_.sine.data() + column, half_,
                   back);
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

template <class T>
class EluMap : public chunked::RowMap<T> {
 public:
  /// `angles` null: no rotation. `first`: the position of row 0 of each batch entry.
  EluMap(Isa isa, const GridAngles<T>* angles, std::vector<int64_t> first)
      : rows_(kernels::chunk_kernels<T>(isa)),
        features_(kernels::feature_kernels<T>(isa)),
        rotations_(kernels::rotation_kernels<T>(isa)),
        angles_(angles),
        first_(std::move(first)) {}

  void map(const chunked::RowsAt& at, const kernels::Rows& x, int64_t, int64_t,
           kernels::Block<T> to) const override {
    rows_.pack_rows(x, nullptr, to);
    features_.forward(rows_of(x, to), to);
    rotate(at, x.count, to, false);
  }

  void pull(const chunked::RowsAt& at, const kernels::Rows& x, int64_t, int64_t,
            kernels::Block<const T> gradient, kernels::Block<T> into) const override {
    const int64_t stride = into.stride;
    std::vector<T> memory(static_cast<size_t>(3 * x.count * stride));
    const kernels::Block<T> z{memory.data(), stride}, g{z.row(x.count), stride};
    const kernels::Block<T> dz{g.row(x.count), stride};
    rows_.pack_rows(x, nullptr, z);
    for (int64_t r = 0; r < x.count; ++r) std::copy_n(gradient.row(r), x.width, g.row(r));
    rotate(at, x.count, g, true);
    features_.backward(rows_of(x, z), {g.data, stride}, dz, nullptr);
    for (int64_t r = 0; r < x.count; ++r) {
      for (int64_t e = 0; e < x.width; ++e) into.row(r)[e] += dz.row(r)[e];
    }
  }

 private:
  static kernels::FeatureRows<T> rows_of(const kernels::Rows& x, kernels::Block<T> z) {
    kernels::FeatureRows<T> rows;
    rows.kind = FeatureKind::elu1;
    rows.z = {z.data, z.stride};
    rows.rows = x.count;
    rows.width = x.width;
    return rows;
  }
  void rotate(const chunked::RowsAt& at, int64_t count, kernels::Block<T> x, bool back) const {
    if (angles_ == nullptr) return;
    const int64_t start = first_[static_cast<size_t>(at.batch)] + at.token;
    for (int64_t r = 0; r < count; ++r) angles_->rotate(rotations_, start + r, x.row(r), back);
  }

  const kernels::ChunkKernels<T>& rows_;
  const kernels::FeatureKernels<T>& features_;
  const kernels::RotationKernels<T>& rotations_;
  const GridAngles<T>* angles_;
  std::vector<int64_t> first_;
};

}  // namespace heed
