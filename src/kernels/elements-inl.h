// Vectors of elements of any floating type, also fewer than a whole one. Once per Highway target.
#if defined(HEED_KERNELS_ELEMENTS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef HEED_KERNELS_ELEMENTS_INL_H_
#undef HEED_KERNELS_ELEMENTS_INL_H_
#else
#define HEED_KERNELS_ELEMENTS_INL_H_
#endif

#include <hwy/highway.h>

#include <cstring>

#include "kernels/vector-inl.h"

HWY_BEFORE_NAMESPACE();
namespace heed::kernels::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

/// Elements p[0, n) in the compute type T; behind n < lanes zeros.
template <class T, class From>
HWY_INLINE hn::Vec<Full<T>> load_elements(const From* p, int64_t n) {
  const Full<T> d;
  if (HWY_LIKELY(n >= lanes<T>())) return Load<T, From>::full(d, p);
  return Load<T, From>::first(d, p, static_cast<size_t>(n));
}

template <class T, class To>
HWY_INLINE void store_vector(hn::Vec<Full<T>> x, To* p) {
  const Full<T> d;
  if constexpr (std::is_same_v<T, To>) {
    hn::StoreU(x, d, p);
  } else if constexpr (std::is_same_v<To, bfloat16>) {
    store_bfloat16(d, x, reinterpret_cast<uint16_t*>(p));
  } else {
#if HWY_TARGET == HWY_EMU128
    HWY_ALIGN float buffer[hn::MaxLanes(Full<T>())];
    hn::Store(x, d, buffer);
    for (int64_t i = 0; i < lanes<T>(); ++i) p[i] = to_float16(buffer[i]);
#else
    const hn::Rebind<hwy::float16_t, Full<T>> d16;
    hn::StoreU(hn::DemoteTo(d16, x), d16, reinterpret_cast<hwy::float16_t*>(p));
#endif
  }
}

/// Rounded to the type of p; only p[0, n) is written.
template <class T, class To>
HWY_INLINE void store_elements(hn::Vec<Full<T>> x, To* p, int64_t n) {
  if (HWY_LIKELY(n >= lanes<T>())) return store_vector<T>(x, p);
  To buffer[hn::MaxLanes(Full<T>())];
  store_vector<T>(x, buffer);
  std::memcpy(p, buffer, static_cast<size_t>(n) * sizeof(To));
}

}  // namespace heed::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif
