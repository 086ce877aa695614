// Rounding of float vectors to bfloat16 in one instruction, once per Highway target. Only for tables that
// are used on processors with products of bfloat16: on AVX-512 they have the instruction too.
#if defined(HEED_KERNELS_HALF_STORE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef HEED_KERNELS_HALF_STORE_INL_H_
#undef HEED_KERNELS_HALF_STORE_INL_H_
#else
#define HEED_KERNELS_HALF_STORE_INL_H_
#endif

#include <hwy/highway.h>

#include "kernels/vector-inl.h"

HWY_BEFORE_NAMESPACE();
namespace heed::kernels::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

HWY_INLINE void store_half(hn::Vec<Full<float>> x, uint16_t* to) {
#if HWY_TARGET == HWY_AVX3
  __m256i rounded;
  __asm__("vcvtneps2bf16 %1, %0" : "=v"(rounded) : "v"(x.raw));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), rounded);
#else
  Store<float, bfloat16>::full(x, reinterpret_cast<bfloat16*>(to));
#endif
}

}  // namespace heed::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif
