#include "kernels/element_maps.h"

#include "kernels/simd.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/element_maps.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.
#include <algorithm>

#include "kernels/by_isa.h"
#include "kernels/element_maps-inl.h"
#include "kernels/row_loops-inl.h"

HWY_BEFORE_NAMESPACE();
namespace heed::kernels::HWY_NAMESPACE {
namespace {
namespace hn = hwy::HWY_NAMESPACE;

// Calls body(map, element of the type of rows, rows, width): all rows as one where they touch.
template <class T, class Body>
HWY_INLINE void with_map_of_rows(FeatureKind kind, const Rows& x, bool touch, Body&& body) {
  with_element_map<T>(kind, [&](auto element_map) HWY_ATTR {
    with_any_element_type(x.dtype, [&](auto element) HWY_ATTR {
      if constexpr (kInVectors<T, decltype(element)>) {
        body(element_map, element, touch ? 1 : x.count, touch ? x.count * x.width : x.width);
      }
    });
  });
}

// max(z, 0) of n numbers of 16 bits, whose bits are ordered as integers: NaN stays.
void relu_halves(const int16_t* z, int64_t n, int16_t infinity, int16_t* phi) {
  const hn::ScalableTag<int16_t> d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto all_but_sign = hn::Set(d, int16_t{0x7fff}), most = hn::Set(d, infinity);
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const auto x = hn::LoadU(d, z + i);
    const auto nan = hn::Gt(hn::And(x, all_but_sign), most);
    hn::StoreU(hn::IfThenElse(nan, x, hn::Max(x, hn::Zero(d))), d, phi + i);
  }
  for (; i < n; ++i) {
    phi[i] = (z[i] & 0x7fff) > infinity ? z[i] : std::max<int16_t>(z[i], 0);
  }
}

void relu_rows(const Rows& z, const RowsOut& phi) {
  const bool touch = z.stride == z.width && phi.stride == z.width;
  const auto infinity = static_cast<int16_t>(z.dtype == DType::bf16 ? 0x7f80 : 0x7c00);
  for (int64_t r = 0; r < (touch ? 1 : z.count); ++r) {
    relu_halves(static_cast<const int16_t*>(z.data) + r * z.stride,
                touch ? z.count * z.width : z.width, infinity,
                static_cast<int16_t*>(phi.data) + r * phi.stride);
  }
}

template <class T>
void map_rows(FeatureKind kind, const Rows& z, const RowsOut& phi) {
  if (kind == FeatureKind::relu && size_of(z.dtype) == 2) return relu_rows(z, phi);
  const bool touch = z.stride == z.width && phi.stride == z.width;
  with_map_of_rows<T>(kind, z, touch,
                      [&](auto map, auto element, int64_t rows, int64_t n) HWY_ATTR {
                        using E = decltype(element);
                        map_elements<T>(map, static_cast<const E*>(z.data), z.stride, rows, n,
                                        static_cast<E*>(phi.data), phi.stride);
                      });
}

template <class T>
void map_to_block(FeatureKind kind, const Rows& z, Block<T> phi) {
  const bool touch = z.stride == z.width && phi.stride == z.width;
  with_map_of_rows<T>(kind, z, touch,
                      [&](auto map, auto element, int64_t rows, int64_t n) HWY_ATTR {
                        map_elements<T>(map, static_cast<const decltype(element)*>(z.data),
                                        z.stride, rows, n, phi.data, phi.stride);
                      });
}

void map_to_halves(FeatureKind kind, const Rows& z, const float* less, const RowsOut& phi) {
  if (kind == FeatureKind::relu) return relu_rows(z, phi);
  const hn::Rebind<uint16_t, Full<float>> d16;
  for (int64_t r = 0; r < z.count; ++r) {
    const auto* from = static_cast<const bfloat16*>(z.data) + r * z.stride;
    auto* to = static_cast<uint16_t*>(phi.data) + r * phi.stride;
    for (int64_t i = 0; i < z.width; i += lanes<float>()) {
      const int64_t left = z.width - i;
      auto y = Elu1<float>::map_to_round(load_elements<float>(from + i, left));
      if (less != nullptr) y = hn::Sub(y, load_elements<float>(less + i, left));
      hn::StoreU(half_operands(y), d16, to + i);
    }
  }
}

template <class T>
void pull_rows(FeatureKind kind, const Rows& phi, const Rows& dphi, const RowsOut& dz) {
  const bool touch = phi.stride == phi.width && dphi.stride == phi.width && dz.stride == phi.width;
  with_map_of_rows<T>(kind, phi, touch,
                      [&](auto map, auto element, int64_t rows, int64_t n) HWY_ATTR {
                        using E = decltype(element);
                        for (int64_t r = 0; r < rows; ++r) {
                          pull_elements<T>(map, static_cast<const E*>(phi.data) + r * phi.stride,
                                           static_cast<const E*>(dphi.data) + r * dphi.stride, n,
                                           static_cast<E*>(dz.data) + r * dz.stride);
                        }
                      });
}

template <class T, class Map, class From, class To>
HWY_INLINE void pull_rows_of(Map map, const From* z, int64_t z_stride, int64_t rows, int64_t n,
                             Block<const T> dphi, const RowEnds<T>& ends, bool add, To* dz,
                             int64_t dz_stride) {
  const Full<T> d;
  const auto one_or = [&](const T* factors, int64_t r)
                          HWY_ATTR { return hn::Set(d, factors == nullptr ? T{1} : factors[r]); };
  for (int64_t r = 0; r < rows; ++r) {
    const From* x = z + r * z_stride;
    To* to = dz + r * dz_stride;
    const auto factor = one_or(ends.factor, r), added_factor = one_or(ends.added_factor, r);
    for (int64_t i = 0; i < n; i += lanes<T>()) {
      auto g = hn::Mul(factor, load_elements<T>(dphi.row(r) + i, n - i));
      if (ends.added != nullptr) {
        g = hn::MulAdd(added_factor, load_elements<T>(ends.added + i, n - i), g);
      }
      const auto element = load_elements<T>(x + i, n - i);
      if constexpr (std::is_same_v<From, bfloat16>) {
        g = map.pull_to_round(element, g);
      } else {
        g = map.pull(map.map(element), g);
      }
      if (add) g = hn::Add(g, load_elements<T>(to + i, n - i));
      store_elements<T>(g, to + i, n - i);
    }
  }
}

template <class T>
void pull_block(FeatureKind kind, const Rows& z, Block<const T> dphi, const RowEnds<T>& ends,
                bool add, const RowsOut& dz) {
  const bool touch = z.stride == z.width && dphi.stride == z.width && dz.stride == z.width &&
                     ends.factor == nullptr && ends.added == nullptr;
  with_map_of_rows<T>(kind, z, touch,
                      [&](auto map, auto element, int64_t rows, int64_t n) HWY_ATTR {
                        using E = decltype(element);
                        const E* x = static_cast<const E*>(z.data);
                        if (dz.dtype == dtype_of<T>) {
                          pull_rows_of<T>(map, x, z.stride, rows, n, dphi, ends, add,
                                          static_cast<T*>(dz.data), dz.stride);
                        } else {
                          pull_rows_of<T>(map, x, z.stride, rows, n, dphi, ends, add,
                                          static_cast<E*>(dz.data), dz.stride);
                        }
                      });
}

}  // namespace

void fill_element_map_kernels(ElementMapKernels<float>& f, ElementMapKernels<double>& d) {
  f = {map_rows<float>, pull_rows<float>, map_to_block<float>, map_to_halves, pull_block<float>};
  d = {map_rows<double>, pull_rows<double>, map_to_block<double>, nullptr, pull_block<double>};
}

}  // namespace heed::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace heed::kernels {

HEED_TABLES(ElementMapKernels, element_map_kernels, fill_element_map_kernels)

}  // namespace heed::kernels
#endif
