// Features made element by element (elu1, relu, exp) of the rows of q and k, for the chunked engine.
#pragma once
#include <algorithm>

#include "engine/chunked/problem.h"
#include "kernels/chunk.h"
#include "kernels/feature_rows.h"

namespace heed {

template <class T>
class ElementMap : public chunked::RowMap<T> {
 public:
  ElementMap(FeatureKind kind, Isa isa)
      : kind_(kind),
        rows_(kernels::chunk_kernels<T>(isa)),
        features_(kernels::feature_kernels<T>(isa)) {}

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
    features_.forward(rows_of(part, to), to);
    for (int64_t r = 0; r < x.count && count < to.stride; ++r) {
      std::fill(to.row(r) + count, to.row(r) + to.stride, T{0});
    }
  }

  void pull(const chunked::RowsAt&, const kernels::Rows& x, int64_t, int64_t,
            kernels::Block<const T> gradient, bool add, kernels::Block<T> into) const override {
    features_.pull_rows(kind_, x, gradient, add, into);
  }

 private:
  // Rows of T are read where they lie, others are widened to `block`.
  kernels::FeatureRows<T> rows_of(const kernels::Rows& x, kernels::Block<T> block) const {
    kernels::FeatureRows<T> rows;
    rows.kind = kind_;
    rows.rows = x.count;
    rows.width = x.width;
    if (x.dtype == dtype_of<T>) {
      rows.z = {static_cast<const T*>(x.data), x.stride};
    } else {
      rows_.pack_rows(x, nullptr, block);
      rows.z = {block.data, block.stride};
    }
    return rows;
  }

  FeatureKind kind_;
  const kernels::ChunkKernels<T>& rows_;
  const kernels::FeatureKernels<T>& features_;
};

}  // namespace heed
