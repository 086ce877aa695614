#include <cmath>
#include <limits>

#include "base/parallel.h"
#include "engine/tiled/problem.h"
#include "heed/error.h"
#include "heed/flash_attention.h"

namespace heed {

namespace {

void check_merge_side(const char* out_name, const Tensor& out, const char* lse_name,
                      const Tensor& lse, const Tensor& like) {
  const std::string op = "merge_attention: ";
  if (out.rank() != 4 || !is_floating(out.dtype())) {
    throw Error(op + describe(out_name, out) + "; [B,H,L,Dv] of a floating type is needed");
  }
  if (!(out.shape() == like.shape()) || out.dtype() != like.dtype()) {
    throw Error(op + describe(out_name, out) + " but " + describe("out_a", like) +
                "; give both results the same shape and type");
  }
  const Dims rows{like.size(0), like.size(1), like.size(2)};
  const DType statistics = wide_type(like.dtype());
  if (!(lse.shape() == rows) || lse.dtype() != statistics) {
    throw Error(op + describe(lse_name, lse) + "; " + to_string(rows) + " " + name_of(statistics) +
                " is needed");
  }
}

template <class T>
double load(const Tensor& t, std::initializer_list<int64_t> index) {
  const std::byte* p = t.at(index);
  if constexpr (std::is_same_v<T, bfloat16> || std::is_same_v<T, float16>) {
    return to_float(*reinterpret_cast<const T*>(p));
  } else {
    return *reinterpret_cast<const T*>(p);
  }
}

template <class T>
void store(const Tensor& t, std::initializer_list<int64_t> index, double value) {
  std::byte* p = t.at(index);
  if constexpr (std::is_same_v<T, bfloat16>) {
    *reinterpret_cast<T*>(p) = to_bfloat16(static_cast<float>(value));
  } else if constexpr (std::is_same_v<T, float16>) {
    *reinterpret_cast<T*>(p) = to_float16(static_cast<float>(value));
  } else {
    *reinterpret_cast<T*>(p) = static_cast<T>(value);
  }
}

struct AttentionView {
  const Tensor &out, &lse;
};

// Shares of two sides in their merged result, which keep what a sum of large logarithms would lose.
struct Shares {
  Shares(double a, double b) {
    constexpr double kNothing = -std::numeric_limits<double>::infinity();
    const double most = std::max(a, b), pivot = most == kNothing ? 0 : most;
    const double a_part = std::exp(a - pivot), b_part = std::exp(b - pivot);
    const double sum = a_part + b_part;
    lse = pivot + std::log(sum);
    side_a = a == kNothing ? 0 : a_part / sum;
    side_b = b == kNothing ? 0 : b_part / sum;
  }
  double side_a, side_b, lse;
};

// One row: T is the type of out, S of lse.
template <class T, class S>
void merge_row(const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b, const Tensor& lse_b,
               const Tensor& out, const Tensor& lse, int64_t b, int64_t h, int64_t i) {
  constexpr double kNothing = -std::numeric_limits<double>::infinity();
  const double a_sum = load<S>(lse_a, {b, h, i}), b_sum = load<S>(lse_b, {b, h, i});
  const Shares shares(a_sum, b_sum);
  for (int64_t f = 0; f < out.size(3); ++f) {
    // A side that saw no key has out = 0 by contract; it is left out whatever it holds.
    double value = 0;
    if (a_sum != kNothing) value += shares.side_a * load<T>(out_a, {b, h, i, f});
    if (b_sum != kNothing) value += shares.side_b * load<T>(out_b, {b, h, i, f});
    store<T>(out, {b, h, i, f}, value);
  }
  if (lse.defined()) store<S>(lse, {b, h, i}, shares.lse);
}

template <class T, class S>
void merge_all(const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b, const Tensor& lse_b,
               const Tensor& out, const Tensor& lse, const RunOptions& run) {
  const int64_t heads = out.size(1), pairs = out.size(0) * heads;
  parallel_for(pairs, threads_for(run, pairs), [&](int64_t pair, int) {
    for (int64_t i = 0; i < out.size(2); ++i) {
      merge_row<T, S>(out_a, lse_a, out_b, lse_b, out, lse, pair / heads, pair % heads, i);
    }
  });
}

// One side of one row: with shares w, d out_side = w dout and
// d lse_side = w (dlse + w_other dout . (out_side - out_other)).
template <class T, class S>
void merge_row_backward(const Tensor& grad_out, const Tensor& grad_lse, const AttentionView& side,
                        const AttentionView& other, const Tensor& to_out, const Tensor& to_lse,
                        int64_t b, int64_t h, int64_t i) {
  const Shares shares(load<S>(side.lse, {b, h, i}), load<S>(other.lse, {b, h, i}));
  const double weight = shares.side_a;
  double dot = 0;
  for (int64_t f = 0; f < to_out.size(3); ++f) {
    const double g = load<T>(grad_out, {b, h, i, f});
    // A side without weight may hold anything.
    if (weight != 0 && shares.side_b != 0) {
      dot += g * (load<T>(side.out, {b, h, i, f}) - load<T>(other.out, {b, h, i, f}));
    }
    store<T>(to_out, {b, h, i, f}, weight == 0 ? 0 : weight * g);
  }
  const double from_lse = grad_lse.defined() ? load<S>(grad_lse, {b, h, i}) : 0;
  const double sum = from_lse + shares.side_b * dot;
  store<S>(to_lse, {b, h, i}, weight == 0 ? 0 : weight * sum);
}

template <class T, class S>
void merge_all_backward(const Tensor& grad_out, const Tensor& grad_lse, const AttentionView& a,
                        const AttentionView& b, const MergeGradients& to, const RunOptions& run) {
  const int64_t heads = grad_out.size(1), pairs = grad_out.size(0) * heads;
  parallel_for(pairs, threads_for(run, pairs), [&](int64_t pair, int) {
    const int64_t sequence = pair / heads, h = pair % heads;
    for (int64_t i = 0; i < grad_out.size(2); ++i) {
      merge_row_backward<T, S>(grad_out, grad_lse, a, b, to.out_a, to.lse_a, sequence, h, i);
      merge_row_backward<T, S>(grad_out, grad_lse, b, a, to.out_b, to.lse_b, sequence, h, i);
    }
  });
}

// Calls body with the types of out and lse.
template <class Body>
void with_types(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::f64:
      return body(double{}, double{});
    case DType::f32:
      return body(float{}, float{});
    case DType::bf16:
      return body(bfloat16{}, float{});
    default:
      return body(float16{}, float{});
  }
}

}  // namespace

void merge_attention(const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b,
                     const Tensor& lse_b, const Tensor& out, const Tensor& lse,
                     const RunOptions& run) {
  check_merge_side("out_a", out_a, "lse_a", lse_a, out_a);
  check_merge_side("out_b", out_b, "lse_b", lse_b, out_a);
  check_merge_side("out", out, "lse", lse.defined() ? lse : lse_a, out_a);
  with_types(out.dtype(), [&](auto t, auto s) {
    merge_all<decltype(t), decltype(s)>(out_a, lse_a, out_b, lse_b, out, lse, run);
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
                                        const Tensor& out_b, const Tensor& lse_b, const Tensor& out,
                                        const Tensor& lse, const RunOptions& run) {
  check_merge_side("out_a", out_a, "lse_a", lse_a, out_a);
  check_merge_side("out_b", out_b, "lse_b", lse_b, out_a);
  check_merge_side("out", out, "lse", lse, out_a);
  check_merge_side("grad_out", grad_out, "grad_lse", grad_lse.defined() ? grad_lse : lse, out_a);
  MergeGradients to{Array(out_a.dtype(), out_a.shape()), Array(lse_a.dtype(), lse_a.shape()),
                    Array(out_a.dtype(), out_a.shape()), Array(lse_a.dtype(), lse_a.shape())};
  with_types(out.dtype(), [&](auto t, auto s) {
    merge_all_backward<decltype(t), decltype(s)>(grad_out, grad_lse, {out_a, lse_a}, {out_b, lse_b},
                                                 to, run);
  });
  return to;
}

}  // namespace heed
