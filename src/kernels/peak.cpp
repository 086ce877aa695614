#include "kernels/simd.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/peak.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.
#include "kernels/parts.h"
#include "kernels/peak.h"
#include "kernels/vector-inl.h"

HWY_BEFORE_NAMESPACE();
namespace heed::kernels::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Enough sums that none waits for the one before: latency times units of any processor of today, and
// no more than there are registers.
constexpr int kSums = kPanelVectors == 4 ? 24 : 12;

template <class T>
HWY_NOINLINE void multiply_adds(int64_t rounds, int64_t& count, double& sink) {
  const Full<T> d;
  hn::Vec<Full<T>> sums[kSums];
#pragma GCC unroll 24
  for (int i = 0; i < kSums; ++i) sums[i] = hn::Set(d, static_cast<T>(i));
  // Values stay near 1: no infinities, no denormal numbers.
  const auto factor = hn::Set(d, static_cast<T>(0.99)), term = hn::Set(d, static_cast<T>(0.01));
  for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 24
    for (int i = 0; i < kSums; ++i) sums[i] = hn::MulAdd(sums[i], factor, term);
  }
  auto all = sums[0];
  for (int i = 1; i < kSums; ++i) all = hn::Add(all, sums[i]);
  sink = static_cast<double>(hn::GetLane(hn::SumOfLanes(d, all)));
  count = rounds * kSums * lanes<T>();
}

void multiply_adds_of(DType dtype, int64_t rounds, int64_t& count, double& sink) {
  if (dtype == DType::f64) {
    multiply_adds<double>(rounds, count, sink);
  } else {
    multiply_adds<float>(rounds, count, sink);
  }
}

HWY_NOINLINE void sum_floats(const float* data, int64_t count, double& sum) {
  const Full<float> d;
  constexpr int kStreams = 8;
  hn::Vec<Full<float>> sums[kStreams];
#pragma GCC unroll 8
  for (int i = 0; i < kStreams; ++i) sums[i] = hn::Zero(d);
  int64_t at = 0;
  for (; at + kStreams * lanes<float>() <= count; at += kStreams * lanes<float>()) {
#pragma GCC unroll 8
    for (int i = 0; i < kStreams; ++i) {
      sums[i] = hn::Add(sums[i], hn::LoadU(d, data + at + i * lanes<float>()));
    }
  }
  auto all = sums[0];
  for (int i = 1; i < kStreams; ++i) all = hn::Add(all, sums[i]);
  sum = static_cast<double>(hn::GetLane(hn::SumOfLanes(d, all)));
  for (; at < count; ++at) sum += static_cast<double>(data[at]);
}

}  // namespace heed::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

namespace heed::kernels {
namespace {

void select_multiply_adds(Isa isa, DType dtype, int64_t rounds, int64_t& count, double& sink)
    HEED_SELECT(multiply_adds_of, dtype, rounds, count, sink)

        void select_sum(Isa isa, const float* data, int64_t count, double& sum)
            HEED_SELECT(sum_floats, data, count, sum)

}  // namespace

int64_t run_multiply_adds(Isa isa, DType dtype, int64_t rounds, double& sink) {
  int64_t count = 0;
  select_multiply_adds(isa, dtype, rounds, count, sink);
  return count;
}

int64_t run_half_multiply_adds(Isa isa, int64_t rounds, double& sink) {
  sink = 0;
  if (isa == Isa::amx) return run_amx(rounds, sink);
  if (isa == Isa::avx512 && has_full_rate_bf16()) return run_avx512_pairs(rounds, sink);
  return 0;
}

double read_floats(Isa isa, const float* data, int64_t count) {
  double sum = 0;
  select_sum(isa, data, count, sum);
  return sum;
}

}  // namespace heed::kernels
#endif
