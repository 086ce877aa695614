#include <cmath>
#include <limits>

#include "base/parallel.h"
#include "engine/tiled/problem.h"
#include "heed/error.h"
#include "heed/flash_attention.h"

namespace heed {

namespace {

constexpr int64_t kMaxDecodeQueries = 16;

AttentionResult make_result(const Tensor& q, const Tensor& v) {
  if (q.rank() != 4 || v.rank() != 4) return {};  // the checks of the call explain it
  AttentionResult result;
  result.out = Array(q.dtype(), {q.size(0), q.size(1), q.size(2), v.size(3)});
  result.lse = Array(tiled::statistics_type(q.dtype()), {q.size(0), q.size(1), q.size(2)});
  return result;
}

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
  const DType statistics = tiled::statistics_type(like.dtype());
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

// One row: T is the type of out, S of lse.
template <class T, class S>
void merge_row(const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b, const Tensor& lse_b,
               const Tensor& out, const Tensor& lse, int64_t b, int64_t h, int64_t i) {
  constexpr double kNothing = -std::numeric_limits<double>::infinity();
  const double a_sum = load<S>(lse_a, {b, h, i}), b_sum = load<S>(lse_b, {b, h, i});
  const double most = std::max(a_sum, b_sum);
  const double pivot = most == kNothing ? 0 : most;
  const double total = pivot + std::log(std::exp(a_sum - pivot) + std::exp(b_sum - pivot));
  const double weight_a = a_sum == kNothing ? 0 : std::exp(a_sum - total);
  const double weight_b = b_sum == kNothing ? 0 : std::exp(b_sum - total);
  for (int64_t f = 0; f < out.size(3); ++f) {
    // A side that saw no key has out = 0 by contract; it is left out whatever it holds.
    double value = 0;
    if (a_sum != kNothing) value += weight_a * load<T>(out_a, {b, h, i, f});
    if (b_sum != kNothing) value += weight_b * load<T>(out_b, {b, h, i, f});
    store<T>(out, {b, h, i, f}, value);
  }
  if (lse.defined()) store<S>(lse, {b, h, i}, total);
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

}  // namespace

void flash_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                     const Tensor& lse, const FlashOptions& options, const RunOptions& run) {
  constexpr const char* kOp = "flash_attention";
  tiled::check_operands(kOp, q, k, v, out, lse);
  tiled::Problem problem;
  problem.op = kOp;
  problem.sequences = tiled::batch_sequences(
      q, k, v, out, lse,
      tiled::TilePlan::from_masks(kOp, options.masks, q.size(0), q.size(2), k.size(2)));
  problem.scale = tiled::resolve_scale(kOp, options.scale, q.size(3));
  tiled::forward(problem, run);
}

AttentionResult flash_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                const FlashOptions& options, const RunOptions& run) {
  AttentionResult result = make_result(q, v);
  flash_attention(q, k, v, result.out, result.lse, options, run);
  return result;
}

void decode_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                      const Tensor& lengths, const Tensor& out, const Tensor& lse,
                      const DecodeOptions& options, const RunOptions& run) {
  constexpr const char* kOp = "decode_attention";
  tiled::check_operands(kOp, q, k_cache, v_cache, out, lse, {"k_cache", "v_cache"});
  if (q.size(2) > kMaxDecodeQueries) {
    throw Error(std::string(kOp) + ": " + describe("q", q) + " has " + std::to_string(q.size(2)) +
                " queries; at most " + std::to_string(kMaxDecodeQueries) +
                " are supported, use flash_attention for more");
  }
  if (options.splits < 0) {
    throw Error(std::string(kOp) + ": splits is " + std::to_string(options.splits) +
                "; 0 (chosen) or a positive number is needed");
  }
  tiled::Problem problem;
  problem.op = kOp;
  problem.sequences =
      tiled::batch_sequences(q, k_cache, v_cache, out, lse,
                             tiled::TilePlan::for_decoding(kOp, lengths, options.window, q.size(0),
                                                           q.size(2), k_cache.size(2)));
  problem.scale = tiled::resolve_scale(kOp, options.scale, q.size(3));
  if (options.splits > 0) problem.splits = options.splits;
  tiled::forward(problem, run);
}

AttentionResult decode_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                 const Tensor& lengths, const DecodeOptions& options,
                                 const RunOptions& run) {
  AttentionResult result = make_result(q, v_cache);
  decode_attention(q, k_cache, v_cache, lengths, result.out, result.lse, options, run);
  return result;
}

void merge_attention(const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b,
                     const Tensor& lse_b, const Tensor& out, const Tensor& lse,
                     const RunOptions& run) {
  check_merge_side("out_a", out_a, "lse_a", lse_a, out_a);
  check_merge_side("out_b", out_b, "lse_b", lse_b, out_a);
  check_merge_side("out", out, "lse", lse.defined() ? lse : lse_a, out_a);
  switch (out.dtype()) {
    case DType::f64:
      return merge_all<double, double>(out_a, lse_a, out_b, lse_b, out, lse, run);
    case DType::f32:
      return merge_all<float, float>(out_a, lse_a, out_b, lse_b, out, lse, run);
    case DType::bf16:
      return merge_all<bfloat16, float>(out_a, lse_a, out_b, lse_b, out, lse, run);
    default:
      return merge_all<float16, float>(out_a, lse_a, out_b, lse_b, out, lse, run);
  }
}

AttentionResult merge_attention(const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b,
                                const Tensor& lse_b, const RunOptions& run) {
  AttentionResult result = make_result(out_a, out_a);
  merge_attention(out_a, lse_a, out_b, lse_b, result.out, result.lse, run);
  return result;
}

}  // namespace heed
