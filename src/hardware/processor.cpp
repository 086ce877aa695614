#include "hardware/processor.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <limits>

#include "base/parallel.h"
#include "heed/error.h"
#include "kernels/peak.h"

namespace heed::hardware {
namespace {

using Clock = std::chrono::steady_clock;

constexpr double kRunSeconds = 0.02;  // one run: long against a thread's start
constexpr int kRuns = 8;
constexpr int64_t kUnknownL1 = 32 << 10, kUnknownL2 = 1 << 20, kUnknownL3 = 16 << 20;
constexpr int64_t kMostDramBytes = int64_t{256} << 20;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

/// Work done in one run by all threads, over its time. `work(repeats, thread)` returns how much.
template <class Work>
double best_rate(int threads, const Work& work) {
  std::vector<double> done(static_cast<size_t>(threads), 0);
  const auto once = [&](int64_t repeats) {
    const auto start = Clock::now();
    parallel_for(threads, threads, [&](int64_t item, int) {
      done[static_cast<size_t>(item)] = work(repeats, static_cast<int>(item));
    });
    return seconds_since(start);
  };
  int64_t repeats = 1;
  constexpr int64_t kMostRepeats = int64_t{1} << 40;
  while (once(repeats) < kRunSeconds && repeats < kMostRepeats) repeats *= 2;
  double best = 0;
  for (int i = 0; i < kRuns; ++i) {
    const double seconds = once(repeats);
    double total = 0;
    for (double amount : done) total += amount;
    if (seconds > 0) best = std::max(best, total / seconds);
  }
  return best;
}

std::atomic<double> kept;  // what loops computed, so that none is left out

double half_rate(Isa isa, int threads) {
  double probe = 0;
  if (kernels::run_half_multiply_adds(isa, 1, probe) == 0) return 0;
  constexpr int64_t kRounds = 1000;
  return best_rate(threads, [&](int64_t repeats, int) {
    double sink = 0;
    const int64_t count = kernels::run_half_multiply_adds(isa, repeats * kRounds, sink);
    kept = sink;
    return static_cast<double>(count);
  });
}

}  // namespace

UnitRate measure_unit(DType dtype, Isa isa, int threads) {
  if (!is_floating(dtype)) throw Error("processor: a floating type is needed");
  if (is_half(dtype)) {
    const double rate = half_rate(isa, threads);
    if (rate > 0) {
      return {fmt::format("bfloat16 {}", name_of(isa)), DType::bf16, isa, rate};
    }
  }
  const DType used = dtype == DType::f64 ? DType::f64 : DType::f32;
  const Isa vector = isa == Isa::amx ? Isa::avx512 : isa;
  constexpr int64_t kRounds = 1000;
  const double rate = best_rate(threads, [&](int64_t repeats, int) {
    double sink = 0;
    const int64_t count = kernels::run_multiply_adds(vector, used, repeats * kRounds, sink);
    kept = sink;
    return static_cast<double>(count);
  });
  return {fmt::format("{} {}", name_of(used), name_of(vector)), used, vector, rate};
}

std::vector<MemoryLevel> measure_memory(Isa isa, int threads) {
  const CpuInfo& cpu = cpu_info();
  const auto or_else = [](int64_t found, int64_t fallback) { return found > 0 ? found : fallback; };
  const int64_t l1 = or_else(cpu.l1d_bytes, kUnknownL1), l2 = or_else(cpu.l2_bytes, kUnknownL2);
  const int64_t l3 = or_else(cpu.l3_bytes, kUnknownL3);
  const Isa vector = isa == Isa::amx ? Isa::avx512 : isa;
  struct Plan {
    const char* name;
    int64_t holds, each;  // bytes: of the level for all threads, of one thread's array
  };
  // Half of a level, so that the array stays in it; DRAM with an array that no cache holds.
  std::vector<Plan> plans = {{"L1", threads * l1, l1 / 2}, {"L2", threads * l2, l2 / 2}};
  if (l3 / threads > l2) plans.push_back({"L3", l3, l3 / threads / 2});
  plans.push_back({"DRAM", 0, std::max(l2, std::min(kMostDramBytes, 4 * l3) / threads)});
  const int64_t most = plans.back().each / static_cast<int64_t>(sizeof(float));
  std::vector<Array> arrays;
  for (int t = 0; t < threads; ++t) arrays.emplace_back(DType::f32, Dims{most});
  parallel_for(threads, threads, [&](int64_t item, int) {  // each thread touches its own pages
    float* data = arrays[static_cast<size_t>(item)].as<float>();
    std::fill(data, data + most, 1.0f);
  });
  std::vector<MemoryLevel> levels;
  for (const Plan& plan : plans) {
    const int64_t count = plan.each / static_cast<int64_t>(sizeof(float));
    const double rate = best_rate(threads, [&](int64_t repeats, int thread) {
      const float* data = arrays[static_cast<size_t>(thread)].as<float>();
      double sum = 0;
      for (int64_t r = 0; r < repeats; ++r) sum += kernels::read_floats(vector, data, count);
      kept = sum;
      return static_cast<double>(repeats) * static_cast<double>(count) * sizeof(float);
    });
    const bool dram = plan.holds == 0;
    levels.push_back(
        {plan.name,
         dram ? std::numeric_limits<double>::infinity() : static_cast<double>(plan.holds), rate});
  }
  return levels;
}

ProcessorRates measure_processor(const RunOptions& run) {
  const auto start = Clock::now();
  ProcessorRates rates;
  rates.threads = run.threads.value_or(default_threads());
  const Isa best = chosen_isa(run);
  for (Isa isa : available_isas()) {
    if (isa == Isa::amx || (isa == Isa::portable && best != Isa::portable)) continue;
    if (static_cast<int>(isa) > static_cast<int>(best)) continue;
    for (DType dtype : {DType::f64, DType::f32}) {
      rates.units.push_back(measure_unit(dtype, isa, rates.threads));
    }
  }
  const UnitRate half = measure_unit(DType::bf16, best, rates.threads);
  if (half.dtype == DType::bf16) rates.units.push_back(half);
  rates.levels = measure_memory(best, rates.threads);
  rates.seconds = seconds_since(start);
  return rates;
}

Roof roof_of(double multiply_adds, double bytes, const UnitRate& unit,
             const std::vector<MemoryLevel>& levels) {
  Roof roof;
  if (unit.multiply_adds_per_second > 0) {
    roof.compute_s = multiply_adds / unit.multiply_adds_per_second;
  }
  for (const MemoryLevel& level : levels) {
    if (bytes > level.bytes) continue;
    roof.level = level.name;
    if (level.bytes_per_second > 0) roof.memory_s = bytes / level.bytes_per_second;
    break;
  }
  return roof;
}

}  // namespace heed::hardware
