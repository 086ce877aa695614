#include "kernels/row_maps.h"

#include "kernels/simd.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/row_maps.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.
#include <algorithm>
#include <limits>
#include <type_traits>

#include "kernels/by_isa.h"
#include "kernels/functions-inl.h"
#include "kernels/row_loops-inl.h"

HWY_BEFORE_NAMESPACE();
namespace heed::kernels::HWY_NAMESPACE {
namespace {
namespace hn = hwy::HWY_NAMESPACE;

// to[0, lanes) += sign * x
template <class T>
HWY_INLINE void add_vector(T* to, hn::Vec<Full<T>> x, hn::Vec<Full<T>> sign) {
  const Full<T> d;
  hn::StoreU(hn::MulAdd(x, sign, hn::LoadU(d, to)), d, to);
}
HWY_INLINE void add_vector(double* to, hn::Vec<Full<float>> x, hn::Vec<Full<double>> sign) {
  const hn::Half<Full<float>> half;
  const Full<double> d;
  const auto low = hn::PromoteTo(d, hn::LowerHalf(half, x));
  const auto high = hn::PromoteTo(d, hn::UpperHalf(half, x));
  add_vector<double>(to, low, sign);
  add_vector<double>(to + lanes<double>(), high, sign);
}

// lanes<T> sums as T.
template <class T>
HWY_INLINE hn::Vec<Full<T>> sums_as(const T* sums) {
  return hn::LoadU(Full<T>(), sums);
}
template <class T>
  requires(sizeof(T) == 4)
HWY_INLINE hn::Vec<Full<T>> sums_as(const double* sums) {
  const hn::Half<Full<float>> half;
  const Full<double> d;
  const auto low = hn::DemoteTo(half, hn::LoadU(d, sums));
  const auto high = hn::DemoteTo(half, hn::LoadU(d, sums + lanes<double>()));
  return hn::Combine(Full<float>(), high, low);
}

// A running sum of rows: `sums`, those of magnitudes, and the largest of these since the last start.
template <class Sum>
struct WindowState {
  Sum *sums, *sizes, *peaks;
  int64_t width;
};

// Adds sign * the rows [begin, end) of x.
template <class T, class From, class Sum>
void add_window(const From* x, int64_t stride, int64_t begin, int64_t end, Sum sign,
                const WindowState<Sum>& to) {
  const auto signs = hn::Set(Full<Sum>(), sign);
  for (int64_t m = begin; m < end; ++m) {
    const From* row = x + m * stride;
    for (int64_t i = 0; i < to.width; i += lanes<T>()) {
      const auto value = load_elements<T>(row + i, to.width - i);
      add_vector(to.sums + i, value, signs);
      add_vector(to.sizes + i, hn::Abs(value), signs);
    }
  }
}

// Whether sums are finite and not mostly what is left of larger ones.
template <class Sum>
bool trusted(const WindowState<Sum>& x) {
  constexpr Sum kMostLoss = 256;  // of magnitudes
  const Full<Sum> d;
  const auto loss = hn::Set(d, kMostLoss);
  auto good = hn::FirstN(d, static_cast<size_t>(lanes<Sum>()));
  for_each_vector<Sum>(x.width, [&](int64_t i, auto all) HWY_ATTR {
    const auto sum = load_some<Sum>(all, x.sums + i), size = load_some<Sum>(all, x.sizes + i);
    const auto peak = load_some<Sum>(all, x.peaks + i), difference = hn::Sub(sum, sum);
    good = hn::And(good, hn::Ge(hn::Mul(size, loss), hn::Add(peak, difference)));
  });
  return hn::AllTrue(d, good);
}

template <class Sum>
void note_peaks(const WindowState<Sum>& x) {
  const Full<Sum> d;
  for (int64_t i = 0; i < x.width; i += lanes<Sum>()) {
    hn::StoreU(hn::Max(hn::LoadU(d, x.peaks + i), hn::LoadU(d, x.sizes + i)), d, x.peaks + i);
  }
}

template <class T, class From, class Sum>
void slide(const From* x, int64_t stride, RowWindow& at, const RowWindow& to,
           const WindowState<Sum>& state) {
  const auto restart = [&] {
    for (Sum* part : {state.sums, state.sizes, state.peaks}) {
      std::fill_n(part, state.width, Sum{0});
    }
    at.begin = at.end = to.begin;
  };
  if (to.begin >= at.end) restart();
  add_window<T, From, Sum>(x, stride, at.end, to.end, 1, state);
  note_peaks(state);
  if (to.begin > at.begin) {
    add_window<T, From, Sum>(x, stride, at.begin, to.begin, -1, state);
    if (!trusted(state)) {
      restart();
      add_window<T, From, Sum>(x, stride, to.begin, to.end, 1, state);
      note_peaks(state);
    }
  }
  at = {to.begin, HWY_MAX(to.begin, to.end)};
}

template <class T>
void window_sums(const Rows& x, RowWindow& at, const RowWindow* windows, int64_t rows,
                 const T* factors, void* memory, Block<T> out) {
  with_element_type<T>(x.dtype, [&](auto from) HWY_ATTR {
    using From = decltype(from);
    using Sum = std::conditional_t<sizeof(From) == 2, float, double>;
    const Full<T> d;
    auto* sums = static_cast<Sum*>(memory);
    const int64_t padded = round_up(x.width, lanes<T>());
    const WindowState<Sum> state{sums, sums + padded, sums + 2 * padded, x.width};
    for (int64_t r = 0; r < rows; ++r) {
      slide<T, From, Sum>(static_cast<const From*>(x.data), x.stride, at, windows[r], state);
      const auto factor = hn::Set(d, factors[r]);
      for (int64_t i = 0; i < x.width; i += lanes<T>()) {
        hn::StoreU(hn::Mul(factor, sums_as<T>(sums + i)), d, out.row(r) + i);
      }
    }
  });
}

template <class T>
void mix(const RowsOut& x, const T* a, Block<const T> y, const T* b) {
  const Full<T> d;
  with_element_type<T>(x.dtype, [&](auto from) HWY_ATTR {
    using From = decltype(from);
    for (int64_t r = 0; r < x.count; ++r) {
      From* row = static_cast<From*>(x.data) + r * x.stride;
      const auto of_x = hn::Set(d, a[r]), of_y = hn::Set(d, b[r]);
      for (int64_t i = 0; i < x.width; i += lanes<T>()) {
        const auto sum = hn::MulAdd(of_x, load_elements<T>(row + i, x.width - i),
                                    hn::Mul(of_y, hn::LoadU(d, y.row(r) + i)));
        store_elements<T>(sum, row + i, x.width - i);
      }
    }
  });
}

// Rows wider than this go through the buffers below in pieces.
constexpr int64_t kPiece = 256;

// Columns [begin, begin + n) of row r as T: in place where they are, else in the buffer.
template <class T>
HWY_INLINE const T* piece(const Rows& x, int64_t r, int64_t begin, int64_t n, T* buffer) {
  const int64_t offset = x.offset(r) + begin;
  const T* found = buffer;
  with_element_type<T>(x.dtype, [&](auto from) HWY_ATTR {
    using From = decltype(from);
    const From* row = static_cast<const From*>(x.data) + offset;
    if constexpr (std::is_same_v<From, T>) {
      found = row;
    } else {
      load_row(row, n, buffer);
    }
  });
  return found;
}

// Rows that all have the type E.
template <class T, class E>
HWY_INLINE void combine_alike(const Rows& x, const T* a, const Rows* y, const T* b, const T* c,
                              const RowsOut& out) {
  const Full<T> d;
  for (int64_t r = 0; r < x.count; ++r) {
    const E* xs = static_cast<const E*>(x.data) + x.offset(r);
    const E* ys = y == nullptr ? nullptr : static_cast<const E*>(y->data) + y->offset(r);
    E* to = static_cast<E*>(out.data) + r * out.stride;
    const auto of_x = hn::Set(d, a[r]), of_y = hn::Set(d, y == nullptr ? T{0} : b[r]);
    const auto constant = hn::Set(d, c == nullptr ? T{0} : c[r]);
    for (int64_t i = 0; i < x.width; i += lanes<T>()) {
      const int64_t n = x.width - i;
      auto v = constant;
      if (ys != nullptr) v = hn::MulAdd(of_y, load_elements<T>(ys + i, n), v);
      store_elements<T>(hn::MulAdd(of_x, load_elements<T>(xs + i, n), v), to + i, n);
    }
  }
}

template <class T>
void combine(const Rows& x, const T* a, const Rows* y, const T* b, const T* c, const RowsOut& out) {
  if (x.dtype == out.dtype && (y == nullptr || y->dtype == out.dtype)) {
    return with_element_type<T>(out.dtype, [&](auto type) HWY_ATTR {
      combine_alike<T, decltype(type)>(x, a, y, b, c, out);
    });
  }
  const Full<T> d;
  HWY_ALIGN T x_buffer[kPiece], y_buffer[kPiece];
  for (int64_t r = 0; r < x.count; ++r) {
    const auto of_x = hn::Set(d, a[r]), of_y = hn::Set(d, y == nullptr ? T{0} : b[r]);
    const auto constant = hn::Set(d, c == nullptr ? T{0} : c[r]);
    for (int64_t begin = 0; begin < x.width; begin += kPiece) {
      const int64_t n = HWY_MIN(kPiece, x.width - begin);
      const T* xs = piece(x, r, begin, n, x_buffer);
      const T* ys = y == nullptr ? nullptr : piece(*y, r, begin, n, y_buffer);
      with_element_type<T>(out.dtype, [&](auto type) HWY_ATTR {
        auto* to = static_cast<decltype(type)*>(out.data) + r * out.stride + begin;
        for (int64_t i = 0; i < n; i += lanes<T>()) {
          auto v = constant;
          if (ys != nullptr) v = hn::MulAdd(of_y, load_elements<T>(ys + i, n - i), v);
          store_elements<T>(hn::MulAdd(of_x, load_elements<T>(xs + i, n - i), v), to + i, n - i);
        }
      });
    }
  }
}

// Calls body(x, y) with vectors of double that together are the given ones.
template <class Body>
HWY_INLINE void in_double(hn::Vec<Full<double>> x, hn::Vec<Full<double>> y, Body&& body) {
  body(x, y);
}
template <class Body>
HWY_INLINE void in_double(hn::Vec<Full<float>> x, hn::Vec<Full<float>> y, Body&& body) {
  const hn::Half<Full<float>> half;
  const Full<double> d;
  body(hn::PromoteTo(d, hn::LowerHalf(half, x)), hn::PromoteTo(d, hn::LowerHalf(half, y)));
  body(hn::PromoteTo(d, hn::UpperHalf(half, x)), hn::PromoteTo(d, hn::UpperHalf(half, y)));
}

// R rows from `first` on, whose sums do not wait for each other.
template <int R, class T, class From>
HWY_INLINE void dot_block(const Rows& x, const Rows& y, int64_t first, double* results) {
  const Full<double> d;
  hn::Vec<Full<double>> sum[R];
  const From *xs[R], *ys[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    sum[r] = hn::Zero(d);
    xs[r] = static_cast<const From*>(x.data) + x.offset(first + r);
    ys[r] = static_cast<const From*>(y.data) + y.offset(first + r);
  }
  for (int64_t i = 0; i < x.width; i += lanes<T>()) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      in_double(load_elements<T>(xs[r] + i, x.width - i), load_elements<T>(ys[r] + i, x.width - i),
                [&](auto a, auto b) HWY_ATTR { sum[r] = hn::MulAdd(a, b, sum[r]); });
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) results[first + r] = hn::GetLane(hn::SumOfLanes(d, sum[r]));
}

template <class T>
void dots_of_two_types(const Rows& x, const Rows& y, double* results) {
  const Full<double> d;
  HWY_ALIGN T x_buffer[kPiece], y_buffer[kPiece];
  for (int64_t r = 0; r < x.count; ++r) {
    auto sum = hn::Zero(d);
    for (int64_t begin = 0; begin < x.width; begin += kPiece) {
      const int64_t n = HWY_MIN(kPiece, x.width - begin);
      const T* xs = piece(x, r, begin, n, x_buffer);
      const T* ys = piece(y, r, begin, n, y_buffer);
      for (int64_t i = 0; i < n; i += lanes<T>()) {
        in_double(load_elements<T>(xs + i, n - i), load_elements<T>(ys + i, n - i),
                  [&](auto a, auto b) HWY_ATTR { sum = hn::MulAdd(a, b, sum); });
      }
    }
    results[r] = hn::GetLane(hn::SumOfLanes(d, sum));
  }
}

template <class T>
void dots(const Rows& x, const Rows& y, double* results) {
  if (x.dtype != y.dtype) return dots_of_two_types<T>(x, y, results);
  with_element_type<T>(x.dtype, [&](auto from) HWY_ATTR {
    using From = decltype(from);
    int64_t r = 0;
    for (; r + 4 <= x.count; r += 4) dot_block<4, T, From>(x, y, r, results);
    for (; r < x.count; ++r) dot_block<1, T, From>(x, y, r, results);
  });
}

template <class T>
void sums(const Rows& x, double* results) {
  const Full<double> d;
  HWY_ALIGN T buffer[kPiece];
  for (int64_t r = 0; r < x.count; ++r) {
    auto sum = hn::Zero(d);
    for (int64_t begin = 0; begin < x.width; begin += kPiece) {
      const int64_t n = HWY_MIN(kPiece, x.width - begin);
      const T* xs = piece(x, r, begin, n, buffer);
      for (int64_t i = 0; i < n; i += lanes<T>()) {
        const auto v = load_elements<T>(xs + i, n - i);
        in_double(v, v, [&](auto a, auto) HWY_ATTR { sum = hn::Add(a, sum); });
      }
    }
    results[r] = hn::GetLane(hn::SumOfLanes(d, sum));
  }
}

template <class T>
void add_bounded(const Rows& x, T bound, Block<T> to) {
  const Full<T> d;
  const auto most = hn::Set(d, bound), least = hn::Set(d, -bound);
  const auto largest = hn::Set(d, std::numeric_limits<T>::max());
  with_element_type<T>(x.dtype, [&](auto from) HWY_ATTR {
    using From = decltype(from);
    for (int64_t r = 0; r < x.count; ++r) {
      const From* row = static_cast<const From*>(x.data) + r * x.stride;
      T* sums = to.row(r);
      for (int64_t i = 0; i < x.width; i += lanes<T>()) {
        const auto v = load_elements<T>(row + i, x.width - i);
        const auto bounded = hn::Min(hn::Max(v, least), most);
        const auto added = hn::IfThenElse(hn::Le(hn::Abs(v), largest), bounded, v);
        const auto sum = hn::Add(load_elements<T>(sums + i, x.width - i), added);
        store_elements<T>(sum, sums + i, x.width - i);
      }
    }
  });
}

template <class T>
bool all_finite(const Rows& x) {
  const Full<T> d;
  auto bad = hn::Zero(d);
  with_element_type<T>(x.dtype, [&](auto from) HWY_ATTR {
    using From = decltype(from);
    for (int64_t r = 0; r < x.count; ++r) {
      const auto* row = static_cast<const From*>(x.data) + x.offset(r);
      for (int64_t i = 0; i < x.width; i += lanes<T>()) {
        const auto v = load_elements<T>(row + i, x.width - i);
        bad = hn::Or(bad, hn::Sub(v, v));  // 0 if finite, else NaN
      }
    }
  });
  return hn::AllTrue(d, hn::Eq(bad, bad));
}

// In units of the larger sum, so that large logarithms lose nothing.
template <class T>
void shares(const T* a, const T* b, int64_t n, T* of_a, T* of_b, T* lse) {
  const Full<T> d;
  const auto one = hn::Set(d, T{1}), nothing = hn::Set(d, -std::numeric_limits<T>::infinity());
  for_each_vector<T>(n, [&](int64_t i, auto all) HWY_ATTR {
    const auto x = load_some<T>(all, a + i), y = load_some<T>(all, b + i);
    const auto ratio = exp_of<T>(hn::Neg(hn::Abs(hn::Sub(x, y))));
    const auto small = hn::IfThenElse(hn::Eq(x, y), one, ratio);  // also of two infinities
    const auto sum = hn::Add(one, small);
    const auto share = [&](auto own, auto other) HWY_ATTR {
      const auto part = hn::Div(hn::IfThenElse(hn::Lt(own, other), small, one), sum);
      return hn::IfThenZeroElse(hn::Eq(own, nothing), part);
    };
    store_some<T>(all, share(x, y), of_a + i);
    store_some<T>(all, share(y, x), of_b + i);
    store_some<T>(all, hn::Add(hn::IfThenElse(hn::Lt(x, y), y, x), log_of<T>(sum)), lse + i);
  });
}

template <class T>
RowMapKernels<T> table() {
  return {window_sums<T>, mix<T>,         combine<T>,    dots<T>,
          sums<T>,        add_bounded<T>, all_finite<T>, shares<T>};
}

}  // namespace

void make_row_maps(RowMapKernels<float>& f, RowMapKernels<double>& d) {
  f = table<float>();
  d = table<double>();
}

}  // namespace heed::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace heed::kernels {

HEED_TABLES(RowMapKernels, row_map_kernels, make_row_maps)

}  // namespace heed::kernels
#endif  // HWY_ONCE
