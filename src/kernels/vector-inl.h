// Vector helpers shared by all kernels, once per Highway target.
#if defined(HEED_KERNELS_VECTOR_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef HEED_KERNELS_VECTOR_INL_H_
#undef HEED_KERNELS_VECTOR_INL_H_
#else
#define HEED_KERNELS_VECTOR_INL_H_
#endif

#include <hwy/highway.h>

#include <cstring>

#include "heed/tensor.h"

HWY_BEFORE_NAMESPACE();
namespace heed::kernels::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

#if HWY_TARGET == HWY_AVX3
inline constexpr int kPanelVectors = 4;  // 32 registers: 6 x 4 accumulators
#else
inline constexpr int kPanelVectors = 2;  // 16 registers: 6 x 2 accumulators
#endif

// At most 64 bytes: blocks of quantised weights are cut for 16 lanes of float.
template <class T>
using Full = hn::CappedTag<T, 64 / sizeof(T)>;

template <class T>
HWY_INLINE constexpr int64_t lanes() {
  return static_cast<int64_t>(hn::MaxLanes(Full<T>()));
}

// Elements of any floating type, widened to the compute type T.
template <class T, class From>
struct Load;

template <class T>
struct Load<T, T> {
  template <class D>
  static HWY_INLINE hn::Vec<D> full(D d, const T* p) {
    return hn::LoadU(d, p);
  }
  template <class D>
  static HWY_INLINE hn::Vec<D> first(D d, const T* p, size_t count) {
    HWY_ALIGN T buffer[hn::MaxLanes(D())] = {};
    for (size_t i = 0; i < count; ++i) buffer[i] = p[i];
    return hn::Load(d, buffer);
  }
};

template <>
struct Load<float, bfloat16> {
  template <class D>
  static HWY_INLINE hn::Vec<D> full(D d, const bfloat16* p) {
    const hn::RebindToUnsigned<D> du32;
    const hn::Rebind<uint16_t, D> du16;
    const auto bits = hn::LoadU(du16, reinterpret_cast<const uint16_t*>(p));
    return hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(du32, bits)));
  }
  template <class D>
  static HWY_INLINE hn::Vec<D> first(D d, const bfloat16* p, size_t count) {
    HWY_ALIGN bfloat16 buffer[hn::MaxLanes(D())] = {};
    for (size_t i = 0; i < count; ++i) buffer[i] = p[i];
    return full(d, buffer);
  }
};

template <>
struct Load<float, float16> {
  template <class D>
  static HWY_INLINE hn::Vec<D> full([[maybe_unused]] D d, const float16* p) {
#if HWY_TARGET == HWY_EMU128
    // Highway's conversion here takes infinities and NaN for numbers.
    float16 half[hn::MaxLanes(D())];
    std::memcpy(half, p, sizeof half);
    HWY_ALIGN float buffer[hn::MaxLanes(D())];
    for (size_t i = 0; i < hn::MaxLanes(D()); ++i) buffer[i] = to_float(half[i]);
    return hn::Load(d, buffer);
#else
    const hn::Rebind<hwy::float16_t, D> df16;
    return hn::PromoteTo(d, hn::LoadU(df16, reinterpret_cast<const hwy::float16_t*>(p)));
#endif
  }
  template <class D>
  static HWY_INLINE hn::Vec<D> first(D d, const float16* p, size_t count) {
    HWY_ALIGN float16 buffer[hn::MaxLanes(D())] = {};
    for (size_t i = 0; i < count; ++i) buffer[i] = p[i];
    return full(d, buffer);
  }
};

/// Calls body(From{}) with the element type that can be widened to T.
template <class T, class Body>
HWY_INLINE void with_element_type(DType dtype, Body&& body) {
  if constexpr (sizeof(T) == 8) {
    body(double{});
  } else if (dtype == DType::f32) {
    body(float{});
  } else if (dtype == DType::bf16) {
    body(bfloat16{});
  } else {
    body(float16{});
  }
}

// bfloat16 bits of a float vector in the low half of each lane, round to nearest even, NaN stays NaN.
template <class DF, class V>
HWY_INLINE hn::Vec<hn::RebindToUnsigned<DF>> bfloat16_bits(DF /*d*/, V x) {
  const hn::RebindToUnsigned<DF> du;
  const auto bits = hn::BitCast(du, x);
  const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 1));
  const auto rounded = hn::Add(bits, hn::Add(odd, hn::Set(du, 0x7fff)));
  const auto quiet = hn::Or(bits, hn::Set(du, 0x400000));
  return hn::ShiftRight<16>(hn::IfThenElse(hn::RebindMask(du, hn::IsNaN(x)), quiet, rounded));
}

template <class DF, class V>
HWY_INLINE void store_bfloat16(DF d, V x, uint16_t* p) {
  const hn::Rebind<uint16_t, DF> du16;
  hn::StoreU(hn::TruncateTo(du16, bfloat16_bits(d, x)), du16, p);
}

// As operands of bfloat16 products. On AVX-512 only for tables of processors with AVX512-BF16, which are
// those that have such products.
HWY_INLINE hn::Vec<hn::Rebind<uint16_t, Full<float>>> half_operands(hn::Vec<Full<float>> x) {
#if HWY_TARGET == HWY_AVX3
  __m256i rounded;
  __asm__("vcvtneps2bf16 %1, %0" : "=v"(rounded) : "v"(x.raw));
  return hn::Vec<hn::Rebind<uint16_t, Full<float>>>{rounded};
#else
  return hn::TruncateTo(hn::Rebind<uint16_t, Full<float>>(), bfloat16_bits(Full<float>(), x));
#endif
}

// Four rows (two of double) become one 16-byte group per column: group(c) = rows at column c.
template <class T, class V, class Store>
HWY_INLINE void transpose_group(const V* rows, Store&& store) {
  const Full<T> d;
  constexpr int64_t kGroup = 16 / sizeof(T);
  HWY_ALIGN T buffer[kGroup][hn::MaxLanes(d)];
  if constexpr (kGroup == 4) {
    const hn::Repartition<double, decltype(d)> wide;
    const auto low01 = hn::BitCast(wide, hn::InterleaveLower(d, rows[0], rows[1]));
    const auto low23 = hn::BitCast(wide, hn::InterleaveLower(d, rows[2], rows[3]));
    const auto high01 = hn::BitCast(wide, hn::InterleaveUpper(d, rows[0], rows[1]));
    const auto high23 = hn::BitCast(wide, hn::InterleaveUpper(d, rows[2], rows[3]));
    hn::Store(hn::BitCast(d, hn::InterleaveLower(wide, low01, low23)), d, buffer[0]);
    hn::Store(hn::BitCast(d, hn::InterleaveUpper(wide, low01, low23)), d, buffer[1]);
    hn::Store(hn::BitCast(d, hn::InterleaveLower(wide, high01, high23)), d, buffer[2]);
    hn::Store(hn::BitCast(d, hn::InterleaveUpper(wide, high01, high23)), d, buffer[3]);
  } else {
    hn::Store(hn::InterleaveLower(d, rows[0], rows[1]), d, buffer[0]);
    hn::Store(hn::InterleaveUpper(d, rows[0], rows[1]), d, buffer[1]);
  }
  for (int64_t c = 0; c < lanes<T>(); ++c) {
    store(c, &buffer[c % kGroup][c / kGroup * kGroup]);
  }
}

}  // namespace heed::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif
