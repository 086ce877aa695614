// Loops over one row of any length with vectors, and rows of any floating type to and from T. The rest
// behind the last whole vector goes through the same vector code, so a value never depends on its place.
#if defined(HEED_KERNELS_ROW_LOOPS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef HEED_KERNELS_ROW_LOOPS_INL_H_
#undef HEED_KERNELS_ROW_LOOPS_INL_H_
#else
#define HEED_KERNELS_ROW_LOOPS_INL_H_
#endif

#include <type_traits>

#include "kernels/tile.h"
#include "kernels/vector-inl.h"

HWY_BEFORE_NAMESPACE();
namespace heed::kernels::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// How much of a vector a step of a loop covers.
struct WholeVector {};
struct PartOfVector {
  size_t count;
};

// Calls body(i, WholeVector or PartOfVector) for steps that cover [0, n).
template <class T, class Body>
HWY_INLINE void for_each_vector(int64_t n, Body&& body) {
  int64_t i = 0;
  for (; i + lanes<T>() <= n; i += lanes<T>()) body(i, WholeVector());
  if (i < n) body(i, PartOfVector{static_cast<size_t>(n - i)});
}

// Elements that a part does not cover read as 0 and are not written.
template <class T>
HWY_INLINE hn::Vec<Full<T>> load_some(WholeVector, const T* p) {
  return hn::LoadU(Full<T>(), p);
}
template <class T>
HWY_INLINE hn::Vec<Full<T>> load_some(PartOfVector part, const T* p) {
  return load_first(Full<T>(), p, part.count);
}
template <class T>
HWY_INLINE void store_some(WholeVector, hn::Vec<Full<T>> x, T* p) {
  hn::StoreU(x, Full<T>(), p);
}
template <class T>
HWY_INLINE void store_some(PartOfVector part, hn::Vec<Full<T>> x, T* p) {
  store_first(Full<T>(), x, p, part.count);
}
// x where the step covers it, else the other.
template <class T>
HWY_INLINE hn::Vec<Full<T>> covered_or(WholeVector, hn::Vec<Full<T>> x, T /*otherwise*/) {
  return x;
}
template <class T>
HWY_INLINE hn::Vec<Full<T>> covered_or(PartOfVector part, hn::Vec<Full<T>> x, T otherwise) {
  const Full<T> d;
  return hn::IfThenElse(hn::FirstN(d, part.count), x, hn::Set(d, otherwise));
}

/// Calls body(E{}) with the element type of a floating dtype.
template <class Body>
HWY_INLINE void with_any_element_type(DType dtype, Body&& body) {
  if (dtype == DType::f64) return body(double{});
  if (dtype == DType::f32) return body(float{});
  if (dtype == DType::bf16) return body(bfloat16{});
  body(float16{});
}

HWY_INLINE float plain(float x) { return x; }
HWY_INLINE double plain(double x) { return x; }
HWY_INLINE float plain(bfloat16 x) { return to_float(x); }
HWY_INLINE float plain(float16 x) { return to_float(x); }
HWY_INLINE void round_to(double x, double& to) { to = x; }
HWY_INLINE void round_to(double x, float& to) { to = static_cast<float>(x); }
// By way of float32: twice rounded, which costs at most a hair more than half a unit of 16 bits.
HWY_INLINE void round_to(double x, bfloat16& to) { to = to_bfloat16(static_cast<float>(x)); }
HWY_INLINE void round_to(double x, float16& to) { to = to_float16(static_cast<float>(x)); }

// Types that vectors of T are widened from and rounded to.
template <class T, class E>
inline constexpr bool kInVectors = std::is_same_v<E, T> || (sizeof(T) == 4 && sizeof(E) == 2);

// Widened; zeros up to the next whole vector.
template <class From, class T>
HWY_INLINE void load_row(const From* from, int64_t width, T* to) {
  if constexpr (kInVectors<T, From>) {
    for (int64_t i = 0; i < width; i += lanes<T>()) {
      hn::StoreU(load_elements<T>(from + i, width - i), Full<T>(), to + i);
    }
  } else {
    int64_t i = 0;
    for (; i < width; ++i) to[i] = static_cast<T>(plain(from[i]));
    for (; i % lanes<T>() != 0; ++i) to[i] = 0;
  }
}

// Rounded to nearest even, NaN stays NaN.
template <class T, class To>
HWY_INLINE void store_row(const T* from, int64_t width, To* to) {
  if constexpr (kInVectors<T, To>) {
    for (int64_t i = 0; i < width; i += lanes<T>()) {
      store_elements<T>(load_elements<T>(from + i, width - i), to + i, width - i);
    }
  } else {
    for (int64_t i = 0; i < width; ++i) round_to(static_cast<double>(from[i]), to[i]);
  }
}

}  // namespace heed::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif
