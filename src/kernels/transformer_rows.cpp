#include "kernels/transformer_rows.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <string>

#include "base/parallel.h"
#include "heed/error.h"
#include "kernels/by_isa.h"

#ifndef HEED_TRANSFORMER_KERNELS_
#define HEED_TRANSFORMER_KERNELS_
namespace heed {
namespace {
// One instruction set's functions; the last two arguments of the first five are a range of rows.
struct TransformerKernels {
  void (*rms_norm)(const Tensor& x, const float* weight, float eps, const Tensor& out, int64_t,
                   int64_t);
  void (*swiglu)(const Tensor& gate_up, const Tensor& out, int64_t, int64_t);
  void (*rotate)(const Tensor& x, const Rotation& rotation, int64_t, int64_t);
  void (*convert)(const Tensor& from, const Tensor& to, int64_t, int64_t);
  void (*add)(const Tensor& from, int64_t from_step, const Tensor& to, int64_t, int64_t);
  double (*sum_exp)(const float* x, int64_t n, float shift);
};
}  // namespace
}  // namespace heed
#endif

#include "kernels/simd.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/transformer_rows.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.
#include <hwy/contrib/math/math-inl.h>
#include <hwy/highway.h>

#include "kernels/exp-inl.h"
#include "kernels/vector-inl.h"

HWY_BEFORE_NAMESPACE();
namespace heed::kernels::HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;

using D = Full<float>;
using DU = hn::RebindToUnsigned<D>;
using V = hn::Vec<D>;
using VU = hn::Vec<DU>;
constexpr int64_t kLanes = lanes<float>();

// In float64, for rows whose squares float32 cannot hold.
template <class From, class To>
HWY_NOINLINE void rms_norm_wide_row(const From* x, const float* weight, float eps, To* out,
                                    int64_t columns) {
  float block[kLanes];
  double total = 0.0;
  for (int64_t c = 0; c < columns; c += kLanes) {
    hn::StoreU(load_elements<float>(x + c, columns - c), D(), block);
    for (const float value : block) {
      total += static_cast<double>(value) * static_cast<double>(value);
    }
  }
  const double root = std::sqrt(total / static_cast<double>(columns) + static_cast<double>(eps));
  for (int64_t c = 0; c < columns; c += kLanes) {
    hn::StoreU(load_elements<float>(x + c, columns - c), D(), block);
    const int64_t n = std::min(columns - c, kLanes);
    for (int64_t i = 0; i < n; ++i) {
      block[i] = static_cast<float>(static_cast<double>(block[i]) / root *
                                    static_cast<double>(weight[c + i]));
    }
    store_elements<float>(hn::LoadU(D(), block), out + c, n);
  }
}

template <class From, class To>
void rms_norm_row(const From* x, const float* weight, float eps, To* out, int64_t columns) {
  V sums[2] = {hn::Zero(D()), hn::Zero(D())};
  for (int64_t c = 0; c < columns; c += 2 * kLanes) {
    const V a = load_elements<float>(x + c, columns - c);
    sums[0] = hn::MulAdd(a, a, sums[0]);
    if (c + kLanes < columns) {
      const V b = load_elements<float>(x + c + kLanes, columns - c - kLanes);
      sums[1] = hn::MulAdd(b, b, sums[1]);
    }
  }
  const float total = hn::GetLane(hn::SumOfLanes(D(), hn::Add(sums[0], sums[1])));
  const float mean = total / static_cast<float>(columns) + eps;
  // Past float32, or so small that squares below 2^-126 are missing from it; NaN fails too.
  if (!(mean >= 0x1p-100f && mean <= std::numeric_limits<float>::max())) {
    rms_norm_wide_row(x, weight, eps, out, columns);
    return;
  }
  const V factor = hn::Set(D(), 1.0f / std::sqrt(mean));
  for (int64_t c = 0; c < columns; c += kLanes) {
    const int64_t n = columns - c;
    store_elements<float>(hn::Mul(hn::Mul(load_elements<float>(x + c, n), factor),
                                  load_elements<float>(weight + c, n)),
                          out + c, n);
  }
}

template <class From, class To>
void swiglu_row(const From* gate, const From* up, To* out, int64_t columns) {
  // 2^127 is finite; where it replaces a larger value the result is below 1e-36 |g u|.
  const V one = hn::Set(D(), 1.0f), minus_log2_e = hn::Set(D(), -1.44269504f);
  for (int64_t c = 0; c < columns; c += kLanes) {
    const int64_t n = columns - c;
    const V g = load_elements<float>(gate + c, n);
    V power[1] = {at_most(D(), 127.0f, hn::Mul(g, minus_log2_e))};
    exp2<Exactness::full>(D(), power);
    store_elements<float>(
        hn::Mul(hn::Div(g, hn::Add(one, power[0])), load_elements<float>(up + c, n)), out + c, n);
  }
}

// kLanes pairs: even and odd elements of 2 * kLanes neighbours.
HWY_INLINE void load_pairs(const float* p, V& a, V& b) { hn::LoadInterleaved2(D(), p, a, b); }
HWY_INLINE void store_pairs(V a, V b, float* p) { hn::StoreInterleaved2(a, b, D(), p); }
HWY_INLINE void load_pairs(const bfloat16* p, V& a, V& b) {
  uint32_t words[kLanes];
  std::memcpy(words, p, sizeof words);
  const VU both = hn::LoadU(DU(), words);
  a = hn::BitCast(D(), hn::ShiftLeft<16>(both));
  b = hn::BitCast(D(), hn::And(both, hn::Set(DU(), 0xffff0000u)));
}
HWY_INLINE void store_pairs(V a, V b, bfloat16* p) {
  uint32_t words[kLanes];
  const VU high = hn::ShiftLeft<16>(bfloat16_bits(D(), b));
  hn::StoreU(hn::Or(high, bfloat16_bits(D(), a)), DU(), words);
  std::memcpy(p, words, sizeof words);
}

HWY_INLINE void turn(V& a, V& b, const float* cos, const float* sin) {
  const V c = hn::LoadU(D(), cos), s = hn::LoadU(D(), sin), old = a;
  a = hn::NegMulAdd(b, s, hn::Mul(old, c));
  b = hn::MulAdd(old, s, hn::Mul(b, c));
}

template <class T>
void rotate_interleaved(T* x, int64_t pairs, const float* cos, const float* sin) {
  V a, b;
  int64_t i = 0;
  for (; i + kLanes <= pairs; i += kLanes) {
    load_pairs(x + 2 * i, a, b);
    turn(a, b, cos + i, sin + i);
    store_pairs(a, b, x + 2 * i);
  }
  if (i == pairs) return;
  T padded[2 * kLanes] = {};
  const size_t bytes = static_cast<size_t>(2 * (pairs - i)) * sizeof(T);
  std::memcpy(padded, x + 2 * i, bytes);
  load_pairs(padded, a, b);
  turn(a, b, cos + i, sin + i);
  store_pairs(a, b, padded);
  std::memcpy(x + 2 * i, padded, bytes);
}

template <class T>
void rotate_halves(T* x, int64_t pairs, const float* cos, const float* sin) {
  for (int64_t i = 0; i < pairs; i += kLanes) {
    const int64_t n = pairs - i;
    V a = load_elements<float>(x + i, n), b = load_elements<float>(x + pairs + i, n);
    turn(a, b, cos + i, sin + i);
    store_elements<float>(a, x + i, n);
    store_elements<float>(b, x + pairs + i, n);
  }
}

template <class T>
void rotate_row(T* x, int64_t columns, const Rotation& r, int64_t row) {
  const float* cos = r.cos + row * r.table_stride;
  const float* sin = r.sin + row * r.table_stride;
  for (int64_t c = 0; c < columns; c += r.head_dim) {
    if (r.interleaved) {
      rotate_interleaved(x + c, r.pairs, cos, sin);
    } else {
      rotate_halves(x + c, r.pairs, cos, sin);
    }
  }
}

template <class From, class To>
void convert_row(const From* from, To* to, int64_t columns) {
  for (int64_t c = 0; c < columns; c += kLanes)
    store_elements<float>(load_elements<float>(from + c, columns - c), to + c, columns - c);
}

template <class From, class To>
void add_row(const From* from, To* to, int64_t columns) {
  for (int64_t c = 0; c < columns; c += kLanes) {
    const int64_t n = columns - c;
    store_elements<float>(
        hn::Add(load_elements<float>(to + c, n), load_elements<float>(from + c, n)), to + c, n);
  }
}

// Sum of exp(x - shift) in blocks, so that float32 sums stay short.
double sum_exp(const float* x, int64_t n, float shift) {
  const V s = hn::Set(D(), shift);
  double total = 0.0;
  for (int64_t begin = 0; begin < n; begin += 1024) {
    const int64_t end = std::min(n, begin + 1024);
    V sum = hn::Zero(D());
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) {
      sum = hn::Add(sum, hn::Exp(D(), hn::Sub(hn::LoadU(D(), x + i), s)));
    }
    total += static_cast<double>(hn::GetLane(hn::SumOfLanes(D(), sum)));
    for (; i < end; ++i) total += std::exp(static_cast<double>(x[i]) - static_cast<double>(shift));
  }
  return total;
}

// Calls body(element type of a, of b) for the types of two matrices.
template <class Body>
void for_types(DType a, DType b, Body body) {
  auto with_b = [&](auto first) {
    b == DType::f32 ? body(first, float{}) : body(first, bfloat16{});
  };
  a == DType::f32 ? with_b(float{}) : with_b(bfloat16{});
}

template <class T>
T* row_of(const Tensor& x, int64_t row) {
  return x.as<T>() + row * x.stride(0);
}

void rms_norm_rows(const Tensor& x, const float* weight, float eps, const Tensor& out,
                   int64_t begin, int64_t end) {
  for_types(x.dtype(), out.dtype(), [&](auto a, auto b) {
    for (int64_t m = begin; m < end; ++m) {
      rms_norm_row(row_of<decltype(a)>(x, m), weight, eps, row_of<decltype(b)>(out, m), x.size(1));
    }
  });
}

void swiglu_rows(const Tensor& gate_up, const Tensor& out, int64_t begin, int64_t end) {
  for_types(gate_up.dtype(), out.dtype(), [&](auto a, auto b) {
    for (int64_t m = begin; m < end; ++m) {
      const auto* gate = row_of<decltype(a)>(gate_up, m);
      swiglu_row(gate, gate + out.size(1), row_of<decltype(b)>(out, m), out.size(1));
    }
  });
}

void rotate_rows(const Tensor& x, const Rotation& rotation, int64_t begin, int64_t end) {
  for_types(x.dtype(), x.dtype(), [&](auto a, auto) {
    for (int64_t m = begin; m < end; ++m) {
      rotate_row(row_of<decltype(a)>(x, m), x.size(1), rotation, m);
    }
  });
}

void convert_some(const Tensor& from, const Tensor& to, int64_t begin, int64_t end) {
  for_types(from.dtype(), to.dtype(), [&](auto a, auto b) {
    for (int64_t m = begin; m < end; ++m) {
      convert_row(row_of<decltype(a)>(from, m), row_of<decltype(b)>(to, m), to.size(1));
    }
  });
}

// from_step 0 adds the same row everywhere.
void add_some(const Tensor& from, int64_t from_step, const Tensor& to, int64_t begin, int64_t end) {
  for_types(from.dtype(), to.dtype(), [&](auto a, auto b) {
    for (int64_t m = begin; m < end; ++m) {
      add_row(from.as<decltype(a)>() + m * from_step, row_of<decltype(b)>(to, m), to.size(1));
    }
  });
}

}  // namespace

TransformerKernels transformer_kernels() {
  return {rms_norm_rows, swiglu_rows, rotate_rows, convert_some, add_some, sum_exp};
}

}  // namespace heed::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace heed {
namespace kernels {
namespace {
HEED_TABLE(TransformerKernels, transformer_kernels_of, transformer_kernels)
}  // namespace
}  // namespace kernels

namespace {

const TransformerKernels& kernels_for(const RunOptions& run) {
  return kernels::transformer_kernels_of(chosen_isa(run));
}

[[noreturn]] void fail(const char* op, const std::string& text) {
  throw Error(std::string(op) + ": " + text);
}

void check_matrix(const char* op, const char* name, const Tensor& x) {
  if (x.rank() != 2 || (x.dtype() != DType::f32 && x.dtype() != DType::bf16) ||
      (x.size(1) > 1 && x.stride(1) != 1)) {
    fail(op,
         describe(name, x) +
             " is given, a float32 or bfloat16 matrix with unit stride in its columns is needed");
  }
}

void check_shape(const char* op, const char* name, const Tensor& x, const Dims& needed) {
  check_matrix(op, name, x);
  if (!(x.shape() == needed))
    fail(op, describe(name, x) + " is given, " + to_string(needed) + " is needed");
}

void check_vector(const char* op, const char* name, const Tensor& x, int64_t needed) {
  if (x.rank() != 1 || x.dtype() != DType::f32 || x.size(0) != needed || !x.is_contiguous()) {
    fail(op, describe(name, x) + " is given, float32 [" + std::to_string(needed) + "] is needed");
  }
}

// Runs body(begin, end) over groups of rows that are worth a thread.
void for_rows(const Tensor& x, const RunOptions& run,
              const std::function<void(int64_t, int64_t)>& body) {
  const int64_t rows = x.size(0);
  const int64_t per_item = 1 + (int64_t{1} << 14) / std::max<int64_t>(1, x.size(1));
  if (rows <= per_item) return body(0, rows);
  const int64_t items = (rows + per_item - 1) / per_item;
  parallel_for_shares(items, threads_for(run, items), [&](int64_t item, int) {
    body(item * per_item, std::min(rows, (item + 1) * per_item));
  });
}

// Calls body(rows of x, result) for what becomes rows of `to`.
void for_int8_rows(const Tensor& x, const Int8Rows& to, const RunOptions& run,
                   const std::function<void(const Tensor& x, const Tensor& out)>& body) {
  fill_int8_rows(to, run, [&](int64_t first, const Tensor& out) {
    body(x.slice(0, first, first + out.size(0)), out);
  });
}

}  // namespace

void rms_norm(const Tensor& x, const Tensor& weight, float eps, const Tensor& out,
              const RunOptions& run) {
  check_matrix("rms_norm", "x", x);
  check_vector("rms_norm", "weight", weight, x.size(1));
  check_shape("rms_norm", "out", out, x.shape());
  for_rows(x, run, [&](int64_t begin, int64_t end) {
    kernels_for(run).rms_norm(x, weight.as<float>(), eps, out, begin, end);
  });
}

void rms_norm(const Tensor& x, const Tensor& weight, float eps, const Int8Rows& out,
              const RunOptions& run) {
  check_shape("rms_norm", "x", x, {out.rows, out.columns});
  check_vector("rms_norm", "weight", weight, out.columns);
  const auto norm = kernels_for(run).rms_norm;
  for_int8_rows(x, out, run, [&](const Tensor& rows, const Tensor& result) {
    norm(rows, weight.as<float>(), eps, result, 0, rows.size(0));
  });
}

void rms_norm_heads(const Tensor& x, std::initializer_list<NormedHeads> parts, float eps,
                    const RunOptions& run) {
  check_matrix("rms_norm_heads", "x", x);
  int64_t columns = 0;
  for (const NormedHeads& part : parts) {
    const int64_t d = part.weight.rank() == 1 ? part.weight.size(0) : 0;
    check_vector("rms_norm_heads", "weight", part.weight, d);
    columns += part.heads * d;
  }
  if (columns != x.size(1)) {
    fail("rms_norm_heads", describe("x", x) + " is given, heads with " + std::to_string(columns) +
                               " columns together are needed");
  }
  const auto norm = kernels_for(run).rms_norm;
  for_rows(x, run, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      int64_t first = 0;
      for (const NormedHeads& part : parts) {
        const int64_t d = part.weight.size(0);
        const Tensor heads(x.at({m, first}), x.dtype(), {part.heads, d});
        norm(heads, part.weight.as<float>(), eps, heads, 0, part.heads);
        first += part.heads * d;
      }
    }
  });
}

void swiglu(const Tensor& gate_up, const Tensor& out, const RunOptions& run) {
  check_matrix("swiglu", "out", out);
  check_shape("swiglu", "gate_up", gate_up, {out.size(0), 2 * out.size(1)});
  if (gate_up.dtype() != out.dtype()) {
    fail("swiglu", describe("gate_up", gate_up) + " and " + describe("out", out) +
                       " are given, one type is needed");
  }
  for_rows(out, run,
           [&](int64_t begin, int64_t end) { kernels_for(run).swiglu(gate_up, out, begin, end); });
}

void swiglu(const Tensor& gate_up, const Int8Rows& out, const RunOptions& run) {
  check_shape("swiglu", "gate_up", gate_up, {out.rows, 2 * out.columns});
  const auto gate = kernels_for(run).swiglu;
  for_int8_rows(gate_up, out, run, [&](const Tensor& rows, const Tensor& result) {
    gate(rows, result, 0, rows.size(0));
  });
}

void rotate(const Tensor& x, const Rotation& rotation, const RunOptions& run) {
  check_matrix("rotate", "x", x);
  const Rotation& r = rotation;
  if (r.head_dim < 1 || x.size(1) % r.head_dim != 0 || r.pairs < 0 || 2 * r.pairs > r.head_dim ||
      r.table_stride < rotation_stride(r.pairs)) {
    fail("rotate",
         describe("x", x) + " with head_dim " + std::to_string(r.head_dim) + ", pairs " +
             std::to_string(r.pairs) + " and table_stride " + std::to_string(r.table_stride) +
             " is given; heads must fill the columns, pairs a head at most, and the stride "
             "must be rotation_stride(pairs) or more");
  }
  for_rows(x, run, [&](int64_t begin, int64_t end) { kernels_for(run).rotate(x, r, begin, end); });
}

void convert_rows(const Tensor& from, const Tensor& to, const RunOptions& run) {
  check_matrix("convert_rows", "from", from);
  check_shape("convert_rows", "to", to, from.shape());
  for_rows(to, run,
           [&](int64_t begin, int64_t end) { kernels_for(run).convert(from, to, begin, end); });
}

void convert_rows(const Tensor& from, const Int8Rows& to, const RunOptions& run) {
  check_shape("convert_rows", "from", from, {to.rows, to.columns});
  const auto convert = kernels_for(run).convert;
  for_int8_rows(from, to, run, [&](const Tensor& rows, const Tensor& result) {
    convert(rows, result, 0, rows.size(0));
  });
}

void add_rows(const Tensor& from, const Tensor& to, const RunOptions& run) {
  check_matrix("add_rows", "from", from);
  check_shape("add_rows", "to", to, from.shape());
  for_rows(to, run, [&](int64_t begin, int64_t end) {
    kernels_for(run).add(from, from.stride(0), to, begin, end);
  });
}

void add_bias(const Tensor& bias, const Tensor& x, const RunOptions& run) {
  check_matrix("add_bias", "x", x);
  check_vector("add_bias", "bias", bias, x.size(1));
  for_rows(x, run,
           [&](int64_t begin, int64_t end) { kernels_for(run).add(bias, 0, x, begin, end); });
}

double log_sum_exp(const float* x, int64_t n, const RunOptions& run) {
  float largest = -std::numeric_limits<float>::infinity();
  bool has_nan = false;
  for (int64_t i = 0; i < n; ++i) {
    largest = std::max(largest, x[i]);
    has_nan |= std::isnan(x[i]);
  }
  if (has_nan) return std::numeric_limits<double>::quiet_NaN();
  if (std::isinf(largest)) return static_cast<double>(largest);
  return static_cast<double>(largest) + std::log(kernels_for(run).sum_exp(x, n, largest));
}

}  // namespace heed
#endif  // HWY_ONCE
