#include "kernels/window_lanes.h"

#include "kernels/simd.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/window_lanes.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.
#include <algorithm>
#include <limits>
#include <utility>

#include "kernels/by_isa.h"
#include "kernels/exp-inl.h"
#include "kernels/transpose-inl.h"

HWY_BEFORE_NAMESPACE();
namespace heed::kernels::HWY_NAMESPACE {
namespace {
namespace hn = hwy::HWY_NAMESPACE;

// Accumulators: lines times shifts or columns, of 32 or 16 registers.
constexpr int kLines = kPanelVectors == 4 ? 6 : 2;
constexpr int columns_beside(int lines) {
  return std::min(8, (kPanelVectors == 4 ? 24 : 12) / lines);
}

// Calls body(count as a constant) for a count from 1 to kMost.
template <int kMost, class Body>
HWY_INLINE void with_count(int64_t count, Body&& body) {
  [&]<int... N>(std::integer_sequence<int, N...>) {
    (void)((count == N + 1 && (body(std::integral_constant<int, N + 1>()), true)) || ...);
  }(std::make_integer_sequence<int, kMost>());
}

// Calls body(first, count as a constant) for even parts of at most kMost.
template <int kMost, class Body>
HWY_INLINE void for_columns(int64_t n, Body&& body) {
  const int64_t parts = (n + kMost - 1) / kMost;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t first = n * part / parts, end = n * (part + 1) / parts;
    with_count<kMost>(end - first, [&](auto count) { body(first, count); });
  }
}

// Loaded once for several products: GCC would rather read memory again in each of them, and what lies in
// two cache lines takes two reads.
template <class V>
HWY_INLINE V once(V x) {
#if HWY_TARGET == HWY_AVX3
  __asm__("" : "+v"(x.raw));
#elif HWY_TARGET == HWY_AVX2
  __asm__("" : "+x"(x.raw));
#endif
  return x;
}

template <class T, class From>
HWY_NOINLINE bool turn_rows(const Rows& x, T factor, T* to, int64_t stride) {
  const Full<T> d;
  const auto scale = hn::Set(d, factor);
  auto bad = hn::Zero(d);
  for (int64_t r = 0; r < x.count; r += lanes<T>()) {
    for (int64_t e = 0; e < x.width; e += lanes<T>()) {
      constexpr size_t kRows = hn::MaxLanes(Full<T>());
      hn::Vec<Full<T>> rows[kRows];
      load_square<T, From>(x, r, e, rows);
      for (size_t i = 0; i < kRows; ++i) {
        rows[i] = hn::Mul(rows[i], scale);
        bad = hn::MulAdd(rows[i], hn::Zero(d), bad);  // 0 while all are finite, else NaN
      }
      T* columns = to + e * stride + r;
      if (e + lanes<T>() <= x.width) {
        transpose_square<T>(rows, [&](int64_t c, auto column)
                                      HWY_ATTR { hn::StoreU(column, d, columns + c * stride); });
      } else {
        transpose_square<T>(rows, [&](int64_t c, auto column) HWY_ATTR {
          if (e + c < x.width) hn::StoreU(column, d, columns + c * stride);
        });
      }
    }
  }
  return hn::AllTrue(d, hn::Eq(bad, bad));
}

template <class T>
bool turn(const Rows& x, T factor, T* to, int64_t stride) {
  bool finite = false;
  with_element_type<T>(
      x.dtype, [&](auto from) { finite = turn_rows<T, decltype(from)>(x, factor, to, stride); });
  return finite;
}

template <class T, int R, int J>
HWY_NOINLINE void score_block(const T* q, int64_t q_stride, int64_t q_line, const T* k,
                              int64_t k_stride, int64_t width, int64_t first, T* const* s,
                              int64_t step) {
  const Full<T> d;
  hn::Vec<Full<T>> sums[R][J];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) sums[r][j] = hn::Zero(d);
  }
  for (int64_t e = 0; e < width; ++e) {
    hn::Vec<Full<T>> query[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) query[r] = hn::LoadU(d, q + r * q_line + e * q_stride);
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) {
      const auto key = once(hn::LoadU(d, k + e * k_stride + first + j));
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sums[r][j] = hn::MulAdd(query[r], key, sums[r][j]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) hn::StoreU(sums[r][j], d, s[r] + (first + j) * step);
  }
}

template <class T>
void scores(const T* queries, int64_t query_stride, int64_t query_line, int64_t lines,
            const T* keys, int64_t key_stride, int64_t width, int64_t shifts, T* const* s,
            int64_t step) {
  with_count<kLines>(lines, [&](auto rows) {
    for_columns<columns_beside(rows)>(shifts, [&](int64_t first, auto count) {
      score_block<T, rows, count>(queries, query_stride, query_line, keys, key_stride, width, first,
                                  s, step);
    });
  });
}

template <class T>
bool weights(T* s, int64_t count, int64_t shifts, const LaneShifts<T>& seen, T* pivot, T* sum) {
  constexpr int kGroup = 4;
  const Full<T> d;
  const auto nothing = hn::Set(d, -std::numeric_limits<T>::infinity());
  auto most = nothing;
  if (seen.first != nullptr) {
    const auto first = hn::LoadU(d, seen.first), last = hn::LoadU(d, seen.last);
    for (int64_t j = 0; j < shifts; ++j) {
      const auto shift = hn::Set(d, static_cast<T>(j));
      const auto sees = hn::And(hn::Ge(shift, first), hn::Lt(shift, last));
      for (int64_t c = 0; c < count; ++c) {
        T* at = s + (c * shifts + j) * lanes<T>();
        hn::StoreU(hn::IfThenElse(sees, hn::LoadU(d, at), nothing), d, at);
      }
    }
  }
  const int64_t n = count * shifts;
  for (int64_t i = 0; i < n; ++i) most = hn::Max(most, hn::LoadU(d, s + i * lanes<T>()));
  auto total = hn::Zero(d);
  const auto power = [&](T* at, auto group) HWY_ATTR {
    constexpr int kVectors = group;
    hn::Vec<Full<T>> t[kVectors];
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) t[i] = hn::Sub(hn::LoadU(d, at + i * lanes<T>()), most);
    exp2<Exactness::full>(d, t);
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      total = hn::Add(total, t[i]);
      hn::StoreU(t[i], d, at + i * lanes<T>());
    }
  };
  int64_t i = 0;
  for (; i + kGroup <= n; i += kGroup) {
    power(s + i * lanes<T>(), std::integral_constant<int, kGroup>());
  }
  for (; i < n; ++i) power(s + i * lanes<T>(), std::integral_constant<int, 1>());
  hn::StoreU(most, d, pivot);
  hn::StoreU(total, d, sum);
  const auto bad = hn::Sub(total, total);
  return hn::AllTrue(d, hn::Eq(bad, bad));
}

template <class T, int R, int F>
HWY_NOINLINE void sum_block(const WindowSums<T>& x, int64_t first) {
  const Full<T> d;
  hn::Vec<Full<T>> sums[R][F];
  T* to = x.out + first * x.out_step;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int f = 0; f < F; ++f) sums[r][f] = hn::LoadU(d, to + r * x.out_line + f * x.out_step);
  }
  for (int64_t c = 0; c < x.count; ++c) {
    const T* v = x.values[c] + first * x.value_stride;
    const T* w[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) w[r] = x.weights[r] + c * x.weight_line;
    for (int64_t j = 0; j < x.shifts; ++j) {
      hn::Vec<Full<T>> weight[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) weight[r] = hn::LoadU(d, w[r] + j * x.weight_step);
#pragma GCC unroll 8
      for (int f = 0; f < F; ++f) {
        const auto value = once(hn::LoadU(d, v + f * x.value_stride));
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) sums[r][f] = hn::MulAdd(weight[r], value, sums[r][f]);
      }
      v += x.value_step;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int f = 0; f < F; ++f) hn::StoreU(sums[r][f], d, to + r * x.out_line + f * x.out_step);
  }
}

template <class T>
void sums(const WindowSums<T>& x) {
  with_count<kLines>(x.lines, [&](auto rows) {
    for_columns<columns_beside(rows)>(
        x.width, [&](int64_t first, auto columns) { sum_block<T, rows, columns>(x, first); });
  });
}

template <class T>
void divide(T* out, int64_t width, const T* sum) {
  const Full<T> d;
  const auto share = hn::Div(hn::Set(d, T{1}), hn::LoadU(d, sum));
  for (int64_t f = 0; f < width; ++f) {
    T* to = out + f * lanes<T>();
    hn::StoreU(hn::Mul(hn::LoadU(d, to), share), d, to);
  }
}

template <class T>
void gradients(T* s, T* dp, int64_t shifts, int64_t step, const LaneShifts<T>& seen, const T* pivot,
               const T* offset) {
  constexpr int kGroup = 4;
  const Full<T> d;
  const auto most = hn::LoadU(d, pivot), add = hn::LoadU(d, offset);
  const bool all = seen.first == nullptr;
  const auto first = all ? hn::Zero(d) : hn::LoadU(d, seen.first);
  const auto last = all ? hn::Set(d, std::numeric_limits<T>::infinity()) : hn::LoadU(d, seen.last);
  const auto some = [&](int64_t j, auto group) HWY_ATTR {
    constexpr int kVectors = group;
    hn::Vec<Full<T>> t[kVectors];
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      t[i] = hn::Min(hn::Sub(hn::LoadU(d, s + (j + i) * step), most), hn::Zero(d));
    }
    exp2<Exactness::full>(d, t);
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      const auto shift = hn::Set(d, static_cast<T>(j + i));
      const auto sees = hn::And(hn::Ge(shift, first), hn::Lt(shift, last));
      T* at = dp + (j + i) * step;
      const auto gradient = hn::Mul(t[i], hn::Add(hn::LoadU(d, at), add));
      hn::StoreU(hn::IfThenElseZero(sees, t[i]), d, s + (j + i) * step);
      hn::StoreU(hn::IfThenElseZero(sees, gradient), d, at);
    }
  };
  int64_t j = 0;
  for (; j + kGroup <= shifts; j += kGroup) some(j, std::integral_constant<int, kGroup>());
  for (; j < shifts; ++j) some(j, std::integral_constant<int, 1>());
}

template <class T>
WindowKernels<T> table() {
  return {lanes<T>(), kLines, turn<T>, scores<T>, weights<T>, sums<T>, divide<T>, gradients<T>};
}

}  // namespace

void make_windows(WindowKernels<float>& f, WindowKernels<double>& d) {
  f = table<float>();
  d = table<double>();
}

}  // namespace heed::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace heed::kernels {

HEED_TABLES(WindowKernels, window_kernels, make_windows)

}  // namespace heed::kernels
#endif  // HWY_ONCE
