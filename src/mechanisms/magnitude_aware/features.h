// The features of MALA: elu + 1, and for products with the state a rotation on the grid behind it.
#pragma once
#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "heed/magnitude_aware_linear_attention.h"
#include "kernels/rotate_rows.h"
#include "mechanisms/element_map.h"

namespace heed {

/// Cosines and sines of the angles of grid rows and columns, for the positions that a call has.
template <class T>
class GridAngles {
 public:
  /// `first`: the position of token 0 of each batch entry.
  GridAngles(const Grid& grid, int64_t dim, const std::vector<int64_t>& first, int64_t tokens)
      : grid_width_(grid.width), half_(dim / 2) {
    for (int64_t start : first) {
      for (int64_t i = 0; i < std::min(tokens, grid.width); ++i) {
        steps_.push_back((start + i) % grid.width);
      }
      if (tokens == 0) continue;
      for (int64_t r = start / grid.width; r <= (start + tokens - 1) / grid.width; ++r) {
        steps_.push_back(r);
      }
    }
    std::sort(steps_.begin(), steps_.end());
    steps_.erase(std::unique(steps_.begin(), steps_.end()), steps_.end());
    fill();
  }

  /// Elements [begin, end), both even, of the rows of `count` tokens from `position` on.
  void rotate(const kernels::RotationKernels<T>& kernels, int64_t position, int64_t count,
              int64_t begin, int64_t end, kernels::Block<T> x, bool back) const {
    for (int64_t done = 0; done < count;) {  // tokens of one grid row together
      const int64_t row = (position + done) / grid_width_;
      const int64_t column = (position + done) % grid_width_;
      const int64_t run = std::min(count - done, grid_width_ - column);
      const auto turn = [&](int64_t step, int64_t stride, int64_t from, int64_t to) {
        if (from >= to) return;
        const size_t at = place(step) + static_cast<size_t>(from % half_);
        kernels.rotate({x.row(done) + (from - begin), x.stride}, run, cosine_.data() + at,
                       sine_.data() + at, stride, to - from, back);
      };
      turn(row, 0, begin, std::min(end, half_));
      turn(column, half_, std::max(begin, half_), end);
      done += run;
    }
  }

 private:
  size_t place(int64_t step) const {
    const auto found = std::lower_bound(steps_.begin(), steps_.end(), step);
    return static_cast<size_t>((found - steps_.begin()) * half_);
  }
  void fill() {
    const int64_t pairs = half_ / 2;
    std::vector<double> angles;  // of one step
    for (int64_t t = 0; t < pairs; ++t) {
      // The last of the angles is 1e-4, and a single one is 1.
      const double exponent =
          pairs == 1 ? 0 : static_cast<double>(t) / static_cast<double>(pairs - 1);
      angles.push_back(std::pow(10000.0, -exponent));
    }
    cosine_.reserve(steps_.size() * static_cast<size_t>(half_));
    sine_.reserve(cosine_.capacity());
    for (int64_t step : steps_) {
      for (double angle : angles) {
        const double turn = static_cast<double>(step) * angle;
        const auto cosine = static_cast<T>(std::cos(turn)), sine = static_cast<T>(std::sin(turn));
        cosine_.insert(cosine_.end(), {cosine, cosine});
        sine_.insert(sine_.end(), {-sine, sine});
      }
    }
  }

  int64_t grid_width_, half_;
  std::vector<int64_t> steps_;    // sorted: steps in a row that follow each other stand together
  std::vector<T> cosine_, sine_;  // [step][half a row]
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

  bool from_sums(const chunked::RowsAt& at, int64_t rows, int64_t begin, int64_t count,
                 kernels::Block<T> x) const override {
    rotate(at, rows, begin, begin + count, x, false);
    return true;
  }

  void pull(const chunked::RowsAt& at, const kernels::Rows& x, int64_t begin, int64_t count,
            kernels::Block<const T> gradient, const kernels::RowEnds<T>& ends, bool add,
            const kernels::RowsOut& into) const override {
    // The place of the result serves where it holds whole vectors of T.
    const bool in_place = !add && into.dtype == dtype_of<T> && into.stride % kVector == 0;
    const int64_t stride = in_place ? into.stride : round_up(x.width, kVector);
    std::unique_ptr<T[]> memory;
    if (!in_place) memory = std::make_unique_for_overwrite<T[]>(x.count * stride);
    const kernels::Block<T> turned{in_place ? static_cast<T*>(into.data) : memory.get(), stride};
    for (int64_t r = 0; r < x.count; ++r) {
      const T factor = ends.factor == nullptr ? T{1} : ends.factor[r];
      const T added_factor = ends.added_factor == nullptr ? T{1} : ends.added_factor[r];
      for (int64_t i = 0; i < x.width; ++i) {
        turned.row(r)[i] = factor * gradient.row(r)[i];
        if (ends.added != nullptr) turned.row(r)[i] += added_factor * ends.added[i];
      }
    }
    rotate(at, x.count, begin, begin + count, turned, true);
    elu_.pull(at, x, begin, count, {turned.data, turned.stride}, {}, add, into);
  }

 private:
  static constexpr int64_t kVector = 16;  // elements, at most

  void rotate(const chunked::RowsAt& at, int64_t count, int64_t begin, int64_t end,
              kernels::Block<T> x, bool back) const {
    const int64_t start = first_[static_cast<size_t>(at.batch)] + at.token;
    angles_.rotate(rotations_, start, count, begin, end, x, back);
  }

  ElementMap<T> elu_;
  const kernels::RotationKernels<T>& rotations_;
  const GridAngles<T>& angles_;
  std::vector<int64_t> first_;
};

}  // namespace heed
