// Features made element by element (elu1, relu, exp) of the rows of q and k, for the chunked engine.
#pragma once
#include <algorithm>

#include "engine/chunked/problem.h"
#include "kernels/feature_rows.h"

namespace heed {

template <class T>
class ElementMap : public chunked::RowMap<T> {
 public:
  ElementMap(FeatureKind kind, Isa isa)
      : kind_(kind), features_(kernels::feature_kernels<T>(isa)) {}

  bool keeps_bfloat16() const override { return kind_ == FeatureKind::relu; }
  void map_half(const kernels::Rows& x, const kernels::RowsOut& to) const override {
    features_.forward_rows(kind_, x, to);
  }

  void map(const chunked::RowsAt&, const kernels::Rows& x, int64_t first, int64_t count,
           kernels::Block<T> to) const override {
    kernels::Rows part = x;
    part.data =
        static_cast<const std::byte*>(x.data) + first * static_cast<int64_t>(size_of(x.dtype));
    part.width = count;
    features_.map_rows(kind_, part, to);
    for (int64_t r = 0; r < x.count && count < to.stride; ++r) {
      std::fill(to.row(r) + count, to.row(r) + to.stride, T{0});
    }
  }

  void pull(const chunked::RowsAt&, const kernels::Rows& x, int64_t, int64_t,
            kernels::Block<const T> gradient, bool add, kernels::Block<T> into) const override {
    features_.pull_rows(kind_, x, gradient, add, into);
  }

 private:
  FeatureKind kind_;
  const kernels::FeatureKernels<T>& features_;
};

}  // namespace heed
