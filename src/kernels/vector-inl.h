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

// Vectors of these elements can be read and written in part; Highway passes over the rest elsewhere.
template <class E>
inline constexpr bool kMaskedAccess =
    HWY_TARGET == HWY_AVX3 || (HWY_TARGET == HWY_AVX2 && sizeof(E) >= 4);

// The first `count` elements at p and zeros; nothing behind them is read.
template <class D>
HWY_INLINE hn::Vec<D> load_first(D d, const hn::TFromD<D>* p, size_t count) {
  using E = hn::TFromD<D>;
  if constexpr (kMaskedAccess<E>) {
    return hn::MaskedLoad(hn::FirstN(d, count), d, p);
  } else {
    HWY_ALIGN E buffer[hn::MaxLanes(D())] = {};
    for (size_t i = 0; i < count; ++i) buffer[i] = p[i];
    return hn::Load(d, buffer);
  }
}

// The first `count` elements of x to p; nothing behind them is written.
template <class D>
HWY_INLINE void store_first(D d, hn::Vec<D> x, hn::TFromD<D>* p, size_t count) {
  using E = hn::TFromD<D>;
  if constexpr (kMaskedAccess<E>) {
    hn::BlendedStore(x, hn::FirstN(d, count), d, p);
  } else {
    HWY_ALIGN E buffer[hn::MaxLanes(D())];
    hn::Store(x, d, buffer);
    for (size_t i = 0; i < count; ++i) p[i] = buffer[i];
  }
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
    return load_first(d, p, count);
  }
};

template <>
struct Load<float, bfloat16> {
  template <class D>
  static HWY_INLINE hn::Vec<D> full(D d, const bfloat16* p) {
    return widened(d, hn::LoadU(Bits<D>(), reinterpret_cast<const uint16_t*>(p)));
  }
  template <class D>
  static HWY_INLINE hn::Vec<D> first(D d, const bfloat16* p, size_t count) {
    return widened(d, load_first(Bits<D>(), reinterpret_cast<const uint16_t*>(p), count));
  }

 private:
  template <class D>
  using Bits = hn::Rebind<uint16_t, D>;
  template <class D>
  static HWY_INLINE hn::Vec<D> widened(D d, hn::Vec<Bits<D>> bits) {
    const hn::RebindToUnsigned<D> du32;
    return hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(du32, bits)));
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
    const hn::Rebind<uint16_t, D> bits;
    HWY_ALIGN float16 buffer[hn::MaxLanes(D())];
    hn::Store(load_first(bits, reinterpret_cast<const uint16_t*>(p), count), bits,
              reinterpret_cast<uint16_t*>(buffer));
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

// Bits of a vector of floats rounded to 16-bit elements.
using HalfBits = hn::Rebind<uint16_t, Full<float>>;
HWY_INLINE hn::Vec<HalfBits> rounded_bits(hn::Vec<Full<float>> x, bfloat16 /*to*/) {
  return hn::TruncateTo(HalfBits(), bfloat16_bits(Full<float>(), x));
}
HWY_INLINE hn::Vec<HalfBits> rounded_bits(hn::Vec<Full<float>> x, float16 /*to*/) {
#if HWY_TARGET == HWY_EMU128
  HWY_ALIGN float wide[hn::MaxLanes(Full<float>())];
  HWY_ALIGN uint16_t half[hn::MaxLanes(Full<float>())];
  hn::Store(x, Full<float>(), wide);
  for (size_t i = 0; i < hn::MaxLanes(Full<float>()); ++i) half[i] = to_float16(wide[i]).bits;
  return hn::Load(HalfBits(), half);
#else
  const hn::Rebind<hwy::float16_t, Full<float>> d16;
  return hn::BitCast(HalfBits(), hn::DemoteTo(d16, x));
#endif
}

// From the compute type T to elements of any floating type, rounded.
template <class T, class To>
struct Store {
  static HWY_INLINE void full(hn::Vec<Full<T>> x, To* p) {
    hn::StoreU(rounded_bits(x, To()), HalfBits(), reinterpret_cast<uint16_t*>(p));
  }
  static HWY_INLINE void first(hn::Vec<Full<T>> x, To* p, size_t count) {
    store_first(HalfBits(), rounded_bits(x, To()), reinterpret_cast<uint16_t*>(p), count);
  }
};

template <class T>
struct Store<T, T> {
  static HWY_INLINE void full(hn::Vec<Full<T>> x, T* p) { hn::StoreU(x, Full<T>(), p); }
  static HWY_INLINE void first(hn::Vec<Full<T>> x, T* p, size_t count) {
    store_first(Full<T>(), x, p, count);
  }
};

/// Elements p[0, n) in the compute type T; behind n < lanes zeros.
template <class T, class From>
HWY_INLINE hn::Vec<Full<T>> load_elements(const From* p, int64_t n) {
  const Full<T> d;
  if (HWY_LIKELY(n >= lanes<T>())) return Load<T, From>::full(d, p);
  return Load<T, From>::first(d, p, static_cast<size_t>(HWY_MAX(n, int64_t{0})));
}

/// Rounded to the type of p; only p[0, n) is written.
template <class T, class To>
HWY_INLINE void store_elements(hn::Vec<Full<T>> x, To* p, int64_t n) {
  if (HWY_LIKELY(n >= lanes<T>())) return Store<T, To>::full(x, p);
  Store<T, To>::first(x, p, static_cast<size_t>(n));
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
