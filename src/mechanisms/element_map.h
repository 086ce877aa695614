// Features made element by element (elu1, relu, exp) of the rows of q and k, for the chunked engine.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "base/round_up.h"
#include "engine/chunked/problem.h"
#include "kernels/element_maps.h"

namespace heed {

template <class T>
class ElementMap : public chunked::RowMap<T> {
 public:
  /// `rounded`: products may read them rounded.
  ElementMap(FeatureKind kind, Isa isa, bool rounded = false)
      : kind_(kind), rounded_(rounded), maps_(kernels::element_map_kernels<T>(isa)) {}

  bool has_halves() const override { return rounded_ || kind_ == FeatureKind::relu; }
  void map_half(const chunked::RowsAt& at, const kernels::Rows& x,
                const kernels::RowsOut& to) const override {
    maps_.map_to_halves(kind_, x, this->offsets(at), to);
  }

  void map(const chunked::RowsAt&, const kernels::Rows& x, int64_t first, int64_t count,
           kernels::Block<T> to) const override {
    kernels::Rows part = x;
    part.data =
        static_cast<const std::byte*>(x.data) + first * static_cast<int64_t>(size_of(x.dtype));
    part.width = count;
    maps_.map_to_block(kind_, part, to);
    for (int64_t r = 0; r < x.count && count < to.stride; ++r) {
      std::fill(to.row(r) + count, to.row(r) + to.stride, T{0});
    }
  }

  void pull(const chunked::RowsAt&, const kernels::Rows& x, int64_t, int64_t,
            kernels::Block<const T> gradient, const kernels::RowEnds<T>& ends, bool add,
            const kernels::RowsOut& into) const override {
    maps_.pull_block(kind_, x, gradient, ends, add, into);
  }

 private:
  FeatureKind kind_;
  bool rounded_;
  const kernels::ElementMapKernels<T>& maps_;
};

/// The same of the keys of centred states [B,Hkv,L,D]: offsets are medians of some rows of each head, which
/// a few rows far from the others do not move.
template <class T>
class CentredElementMap : public ElementMap<T> {
 public:
  CentredElementMap(FeatureKind kind, Isa isa, const Tensor& keys)
      : ElementMap<T>(kind, isa, true), heads_(keys.size(1)), width_(keys.size(3)) {
    constexpr int64_t kMostRows = 16, kOneOf = 16;
    const int64_t tokens = keys.size(2), step = std::max(kOneOf, tokens / kMostRows);
    const int64_t count = std::min(kMostRows, ceil_div(tokens, step));
    offsets_.assign(static_cast<size_t>(keys.size(0) * heads_ * width_), T{0});
    std::vector<T> memory(static_cast<size_t>(count * width_));
    for (int64_t lane = 0; count > 0 && lane < keys.size(0) * heads_; ++lane) {
      const chunked::RowsAt at{lane / heads_, lane % heads_, 0};
      const void* first = keys.at({at.batch, at.head, 0});
      this->map(at, {first, keys.dtype(), keys.stride(2) * step, count, width_}, 0, width_,
                {memory.data(), width_});
      for (int64_t f = 0; f < width_; ++f) {
        T some[kMostRows];
        for (int64_t r = 0; r < count; ++r) some[r] = memory[static_cast<size_t>(r * width_ + f)];
        if (!std::all_of(some, some + count, [](T x) { return std::isfinite(x); })) continue;
        std::nth_element(some, some + count / 2, some + count);
        offsets_[static_cast<size_t>(lane * width_ + f)] = some[count / 2];
      }
    }
  }
  const T* offsets(const chunked::RowsAt& at) const override {
    return offsets_.data() + (at.batch * heads_ + at.head) * width_;
  }

 private:
  int64_t heads_, width_;
  std::vector<T> offsets_;  // [B,Hkv,D]
};

}  // namespace heed
