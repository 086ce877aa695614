// Compiled for AVX-512 as a whole; reached only after the processor has been asked.
#include <immintrin.h>

// GCC 12 takes the unused operand of its own intrinsics for a variable (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#include "kernels/peak.h"

namespace heed::kernels {

int64_t run_avx512_pairs(int64_t rounds, double& sink) {
  constexpr int kSums = 24, kPairs = 16;
  __m512 sums[kSums];
  // Different starts: of equal sums the compiler would keep one.
#pragma GCC unroll 24
  for (int i = 0; i < kSums; ++i) sums[i] = _mm512_set1_ps(static_cast<float>(i));
  // Pairs of 1 and 2^-8 against pairs of 0.5 and -0.5: the sums stay small for a long time.
  const auto a = reinterpret_cast<__m512bh>(_mm512_set1_epi32(0x3F803B80));
  const auto b = reinterpret_cast<__m512bh>(_mm512_set1_epi32(0x3F00BF00));
  for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 24
    for (auto& sum : sums) sum = _mm512_dpbf16_ps(sum, a, b);
  }
  __m512 all = sums[0];
  for (int i = 1; i < kSums; ++i) all = _mm512_add_ps(all, sums[i]);
  sink = static_cast<double>(_mm512_reduce_add_ps(all));
  return rounds * kSums * kPairs * 2;
}

}  // namespace heed::kernels
