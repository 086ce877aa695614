// Feature maps that take one element to one feature.
#if defined(HEED_KERNELS_ELEMENT_MAPS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef HEED_KERNELS_ELEMENT_MAPS_INL_H_
#undef HEED_KERNELS_ELEMENT_MAPS_INL_H_
#else
#define HEED_KERNELS_ELEMENT_MAPS_INL_H_
#endif

#include "heed/feature_map.h"
#include "kernels/functions-inl.h"

HWY_BEFORE_NAMESPACE();
namespace heed::kernels::HWY_NAMESPACE {
namespace {
namespace hn = hwy::HWY_NAMESPACE;

template <class T>
using V = hn::Vec<Full<T>>;

// Kinds that map element by element: phi = map(z), dz = pull(phi, dphi) or, where only bfloat16 of it stays,
// pull_to_round(z, dphi).
template <class T>
struct Relu {
  static HWY_INLINE V<T> map(V<T> z) { return at_least(Full<T>(), T{0}, z); }
  static HWY_INLINE V<T> pull(V<T> phi, V<T> dphi) {
    const auto zero = hn::Zero(Full<T>());
    return hn::IfThenElse(hn::Le(phi, zero), zero, dphi);
  }
  static HWY_INLINE V<T> pull_to_round(V<T> z, V<T> dphi) { return pull(z, dphi); }
};
template <class T>
struct Exp {
  static HWY_INLINE V<T> map(V<T> z) { return exp_of<T>(z); }
  static HWY_INLINE V<T> pull(V<T> phi, V<T> dphi) { return hn::Mul(dphi, phi); }
  static HWY_INLINE V<T> pull_to_round(V<T> z, V<T> dphi) { return pull(map(z), dphi); }
};
template <class T>
struct Elu1 {
  static HWY_INLINE V<T> map(V<T> z) {
    const Full<T> d;
    return hn::IfThenElse(hn::Gt(z, hn::Zero(d)), hn::Add(z, hn::Set(d, T{1})), exp_of<T>(z));
  }
  static HWY_INLINE V<T> pull(V<T> phi, V<T> dphi) {  // the slope is 1 above 1, phi below
    const auto one = hn::Set(Full<T>(), T{1});
    return hn::Mul(dphi, hn::IfThenElse(hn::Gt(phi, one), one, phi));
  }
  static HWY_INLINE V<T> pull_to_round(V<T> z, V<T> dphi) { return hn::Mul(dphi, rough_slope(z)); }
  /// The feature itself, to 2^-18.
  static HWY_INLINE V<T> map_to_round(V<T> z) {
    return hn::Add(rough_slope(z), at_least(Full<T>(), T{0}, z));
  }

 private:
  static HWY_INLINE V<T> rough_slope(V<T> z) {
    const Full<T> d;
    if constexpr (sizeof(T) == 8) return exp_of<T>(at_most(d, T{0}, z));
    V<T> power[1] = {hn::Mul(at_most(d, T{0}, z), hn::Set(d, T{1.44269504f}))};
    exp2<Exactness::half>(d, power);
    return power[0];
  }
};

// Calls body with one of them.
template <class T, class Body>
HWY_INLINE void with_element_map(FeatureKind kind, Body&& body) {
  if (kind == FeatureKind::relu) return body(Relu<T>());
  if (kind == FeatureKind::exp) return body(Exp<T>());
  body(Elu1<T>());
}

template <class T, class Map, class From, class To>
HWY_INLINE void map_elements(Map map, const From* z, int64_t z_stride, int64_t rows, int64_t n,
                             To* phi, int64_t phi_stride) {
  for (int64_t r = 0; r < rows; ++r) {
    const From* from = z + r * z_stride;
    To* to = phi + r * phi_stride;
    for (int64_t i = 0; i < n; i += lanes<T>()) {
      store_elements<T>(map.map(load_elements<T>(from + i, n - i)), to + i, n - i);
    }
  }
}

template <class T, class Map, class E>
HWY_INLINE void pull_elements(Map map, const E* phi, const E* dphi, int64_t n, E* dz) {
  for (int64_t i = 0; i < n; i += lanes<T>()) {
    const auto y = map.pull(load_elements<T>(phi + i, n - i), load_elements<T>(dphi + i, n - i));
    store_elements<T>(y, dz + i, n - i);
  }
}

}  // namespace
}  // namespace heed::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif
