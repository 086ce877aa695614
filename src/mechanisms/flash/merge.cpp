#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <utility>

#include "heed/flash_attention.h"
#include "kernels/read_ahead.h"
#include "kernels/row_maps.h"
#include "mechanisms/results.h"
#include "mechanisms/row_blocks.h"

namespace heed {

namespace {

void check_merge_side(const char* out_name, const Tensor& out, const char* lse_name,
                      const Tensor& lse, const Tensor& like) {
  constexpr const char* kOp = "merge_attention";
  check_operand(kOp, out_name, out, 4, "[B,H,L,Dv]", "[B,H,L,Dv]");
  if (!(out.shape() == like.shape()) || out.dtype() != like.dtype()) {
    fail(kOp, describe(out_name, out) + " but " + describe("out_a", like),
         "give both results the same shape and type");
  }
  const Dims rows{like.size(0), like.size(1), like.size(2)};
  const DType statistics = wide_type(like.dtype());
  if (!(lse.shape() == rows) || lse.dtype() != statistics) {
    fail(kOp, describe(lse_name, lse), to_string(rows) + " " + name_of(statistics) + " is needed");
  }
}

// The log-sum-exp of a row that saw no key.
template <class T>
constexpr T kNothing = -std::numeric_limits<T>::infinity();

struct AttentionView {
  const Tensor &out, &lse;
};

// T is the type of a computation: double for float64, else float.
template <class T>
class Merge {
 public:
  Merge(const Tensor& like, const RunOptions& run)
      : like_(like), run_(run), maps_(kernels::row_map_kernels<T>(chosen_isa(run))) {}

  void forward(const AttentionView& a, const AttentionView& b, const Tensor& out,
               const Tensor& lse) const {
    for_row_blocks(like_, kBlockRows, run_, [&](const RowBlock& block) {
      const Shares of(a.lse, b.lse, block, maps_);
      if (lse.defined()) {
        const Statistics to(lse, block);
        for (int64_t r = 0; r < block.count; ++r) to[r] = of.lse[r];
      }
      // A side that saw no key has out = 0 by contract; it is left out whatever it holds.
      const auto both = [&](int64_t r) {
        return std::pair(of.lse_a[r] != kNothing<T>, of.lse_b[r] != kNothing<T>);
      };
      for_each_run(block, both, [&](const RowBlock& run, int64_t first) {
        const auto [a_seen, b_seen] = both(first);
        const kernels::Rows x = a_seen ? rows_of(a.out, run) : zeros(run);
        const kernels::Rows y = b_seen ? rows_of(b.out, run) : zeros(run);
        maps_.combine(x, of.a + first, &y, of.b + first, nullptr, out_rows(out, run));
      });
    });
  }

  // With shares w of the sides, d out_side = w dout and
  // d lse_side = w (dlse + w_other dout . (out_side - out_other)).
  void backward(const Tensor& grad_out, const Tensor& grad_lse, const AttentionView& a,
                const AttentionView& b, const MergeGradients& to) const {
    for_row_blocks(like_, kBlockRows, run_, [&](const RowBlock& block) {
      double with_a[kBlockRows], with_b[kBlockRows];
      kernels::ReadAhead ahead{rows_of(grad_out, block), rows_of(a.out, block),
                               rows_of(b.out, block)};
      ahead.ask(ahead.lines());
      maps_.dots(rows_of(grad_out, block), rows_of(a.out, block), with_a);
      maps_.dots(rows_of(grad_out, block), rows_of(b.out, block), with_b);
      const Shares of(a.lse, b.lse, block, maps_);
      const Statistics to_lse_a(to.lse_a, block), to_lse_b(to.lse_b, block);
      const std::optional<Statistics> lse_gradient = if_defined(grad_lse, block);
      for (int64_t r = 0; r < block.count; ++r) {
        const double of_a = of.a[r], of_b = of.b[r];
        // A side without weight may hold anything, and has no gradient.
        const bool both = of_a != 0 && of_b != 0;
        const double difference = both ? with_a[r] - with_b[r] : 0;
        const double from_lse = lse_gradient ? (*lse_gradient)[r] : 0;
        const auto gradient = [&](double share, double other, double side) {
          return static_cast<T>(share == 0 ? 0 : share * (from_lse + other * side));
        };
        to_lse_a[r] = gradient(of_a, of_b, difference);
        to_lse_b[r] = gradient(of_b, of_a, -difference);
      }
      scale_rows(block, grad_out, of.a, to.out_a);
      scale_rows(block, grad_out, of.b, to.out_b);
    });
  }

 private:
  static constexpr int64_t kBlockRows = 64;

  /// Calls body(run, first row of it in the block) for neighbours of the same kind.
  template <class Kind, class Body>
  static void for_each_run(const RowBlock& block, const Kind& kind, const Body& body) {
    for (int64_t first = 0, next; first < block.count; first = next) {
      next = first + 1;
      while (next < block.count && kind(next) == kind(first)) ++next;
      body(RowBlock{block.batch, block.head, block.begin + first, next - first}, first);
    }
  }

  /// Rows with a share of 0 become 0, whatever x holds.
  void scale_rows(const RowBlock& block, const Tensor& x, const T* shares, const Tensor& to) const {
    const auto weighs = [&](int64_t r) { return shares[r] != 0; };
    for_each_run(block, weighs, [&](const RowBlock& run, int64_t first) {
      maps_.combine(weighs(first) ? rows_of(x, run) : zeros(run), shares + first, nullptr, nullptr,
                    nullptr, out_rows(to, run));
    });
  }

  /// One number of each row.
  struct Statistics {
    Statistics(const Tensor& t, const RowBlock& block)
        : data(reinterpret_cast<T*>(t.at({block.batch, block.head, block.begin}))),
          stride(t.stride(2)) {}
    T& operator[](int64_t r) const { return data[r * stride]; }
    T* data;
    int64_t stride;
  };

  /// Of two sides in the merged rows of a block.
  struct Shares {
    Shares(const Tensor& a_lse, const Tensor& b_lse, const RowBlock& block,
           const kernels::RowMapKernels<T>& maps) {
      const Statistics from_a(a_lse, block), from_b(b_lse, block);
      for (int64_t r = 0; r < block.count; ++r) {
        lse_a[r] = from_a[r];
        lse_b[r] = from_b[r];
      }
      maps.shares(lse_a, lse_b, block.count, a, b, lse);
    }
    T lse_a[kBlockRows], lse_b[kBlockRows], a[kBlockRows], b[kBlockRows], lse[kBlockRows];
  };

  static std::optional<Statistics> if_defined(const Tensor& t, const RowBlock& block) {
    return t.defined() ? std::optional(Statistics(t, block)) : std::nullopt;
  }

  kernels::Rows zeros(const RowBlock& block) const {
    return {zeros_.view().data(), zeros_.dtype(), 0, block.count, like_.size(3)};
  }

  const Tensor& like_;
  const RunOptions& run_;
  const kernels::RowMapKernels<T>& maps_;
  const Array zeros_ = Array::zeros(like_.dtype(), {like_.size(3)});
};

}  // namespace

void merge_attention(const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b,
                     const Tensor& lse_b, const Tensor& out, const Tensor& lse,
                     const RunOptions& run) {
  check_merge_side("out_a", out_a, "lse_a", lse_a, out_a);
  check_merge_side("out_b", out_b, "lse_b", lse_b, out_a);
  check_merge_side("out", out, "lse", lse.defined() ? lse : lse_a, out_a);
  with_wide_type(out.dtype(), [&]<class T>(T) {
    Merge<T>(out, run).forward({out_a, lse_a}, {out_b, lse_b}, out, lse);
  });
}

AttentionResult merge_attention(const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b,
                                const Tensor& lse_b, const RunOptions& run) {
  AttentionResult result;
  if (out_a.rank() == 4) {  // the checks of the call explain anything else
    result.out = Array(out_a.dtype(), out_a.shape());
    result.lse = Array(wide_type(out_a.dtype()), {out_a.size(0), out_a.size(1), out_a.size(2)});
  }
  merge_attention(out_a, lse_a, out_b, lse_b, result.out, result.lse, run);
  return result;
}

MergeGradients merge_attention_backward(const Tensor& grad_out, const Tensor& grad_lse,
                                        const Tensor& out_a, const Tensor& lse_a,
                                        const Tensor& out_b, const Tensor& lse_b,
                                        const RunOptions& run) {
  check_merge_side("out_a", out_a, "lse_a", lse_a, out_a);
  check_merge_side("out_b", out_b, "lse_b", lse_b, out_a);
  check_merge_side("grad_out", grad_out, "grad_lse", grad_lse.defined() ? grad_lse : lse_a, out_a);
  MergeGradients to{empty_like(out_a), empty_like(lse_a), empty_like(out_a), empty_like(lse_a)};
  with_wide_type(out_a.dtype(), [&]<class T>(T) {
    Merge<T>(out_a, run).backward(grad_out, grad_lse, {out_a, lse_a}, {out_b, lse_b}, to);
  });
  return to;
}

}  // namespace heed
