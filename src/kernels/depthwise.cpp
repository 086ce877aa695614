#include "kernels/depthwise.h"

#include "kernels/simd.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/depthwise.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.
#include "kernels/by_isa.h"
#include "kernels/vector-inl.h"

HWY_BEFORE_NAMESPACE();
namespace heed::kernels::HWY_NAMESPACE {
namespace {
namespace hn = hwy::HWY_NAMESPACE;

HWY_INLINE int64_t padded_width(const Rows& x) { return round_up(x.width, kDepthwisePad); }

// The tap that reads row 0 for output row t: earlier ones read zeros.
HWY_INLINE int64_t first_tap(int64_t taps, int64_t t) { return HWY_MAX(taps - 1 - t, int64_t{0}); }

template <class T>
void convolve(const Rows& x, const T* weight, const T* bias, int64_t taps, int64_t begin,
              int64_t end, void* out, int64_t out_stride) {
  const Full<T> d;
  const int64_t weight_stride = padded_width(x);
  with_element_type<T>(x.dtype, [&](auto from) HWY_ATTR {
    using From = decltype(from);
    for (int64_t t = begin; t < end; ++t) {
      const From* row = static_cast<const From*>(x.data) + (t - taps + 1) * x.stride;
      From* to = static_cast<From*>(out) + t * out_stride;
      const int64_t first = first_tap(taps, t);
      for (int64_t i = 0; i < x.width; i += lanes<T>()) {
        auto sum = bias == nullptr ? hn::Zero(d) : hn::LoadU(d, bias + i);
        for (int64_t a = first; a < taps; ++a) {
          sum = hn::MulAdd(hn::LoadU(d, weight + a * weight_stride + i),
                           load_elements<T>(row + a * x.stride + i, x.width - i), sum);
        }
        store_elements<T>(sum, to + i, x.width - i);
      }
    }
  });
}

template <class T>
void correlate(const Rows& x, const Rows& y, int64_t taps, int64_t begin, int64_t end, T* sums) {
  const Full<T> d;
  const int64_t sum_stride = padded_width(x);
  with_element_type<T>(x.dtype, [&](auto from) HWY_ATTR {
    using From = decltype(from);
    const auto* xs = static_cast<const From*>(x.data);
    const auto* ys = static_cast<const From*>(y.data);
    for (int64_t i = 0; i < x.width; i += lanes<T>()) {
      const int64_t n = x.width - i;
      for (int64_t a = 0; a < taps; ++a) {
        const int64_t shift = taps - 1 - a;  // rows from x back to y
        T* to = sums + a * sum_stride + i;
        auto even = hn::LoadU(d, to), odd = hn::Zero(d);
        int64_t t = HWY_MAX(begin, shift);
        for (; t + 1 < end; t += 2) {
          even = hn::MulAdd(load_elements<T>(ys + t * y.stride + i, n),
                            load_elements<T>(xs + (t - shift) * x.stride + i, n), even);
          odd = hn::MulAdd(load_elements<T>(ys + (t + 1) * y.stride + i, n),
                           load_elements<T>(xs + (t + 1 - shift) * x.stride + i, n), odd);
        }
        if (t < end) {
          even = hn::MulAdd(load_elements<T>(ys + t * y.stride + i, n),
                            load_elements<T>(xs + (t - shift) * x.stride + i, n), even);
        }
        hn::StoreU(hn::Add(even, odd), d, to);
      }
      T* to = sums + taps * sum_stride + i;
      auto sum = hn::LoadU(d, to);
      for (int64_t t = begin; t < end; ++t) {
        sum = hn::Add(sum, load_elements<T>(ys + t * y.stride + i, n));
      }
      hn::StoreU(sum, d, to);
    }
  });
}

}  // namespace

void make_depthwise(DepthwiseKernels<float>& f, DepthwiseKernels<double>& d) {
  f = {&convolve<float>, &correlate<float>};
  d = {&convolve<double>, &correlate<double>};
}

}  // namespace heed::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace heed::kernels {

HEED_TABLES(DepthwiseKernels, depthwise_kernels, make_depthwise)

}  // namespace heed::kernels
#endif  // HWY_ONCE
