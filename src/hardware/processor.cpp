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

constexpr double kChunkSeconds = 0.0005;  // short against a time slice: few chunks are interrupted
constexpr double kRunSeconds = 0.06;      // of one measurement
constexpr size_t kFewestChunks = 20;
constexpr int64_t kUnknownL1 = 32 << 10, kUnknownL2 = 1 << 20, kUnknownL3 = 16 << 20;
constexpr int64_t kMostDramBytes = int64_t{256} << 20;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

/// Work a second of all threads together: each works through short chunks at the same time, and the
/// 80th percentile of its chunks counts, which neither an interruption nor a lonely start moves.
/// `work(repeats, thread, step)` does one chunk and returns how much it was.
template <class Work>
double steady_rate(int threads, const Work& work) {
  int64_t repeats = 1, step = 0;
  constexpr int64_t kMostRepeats = int64_t{1} << 40;
  const auto fastest = [&] {
    double least = 1;
    for (int i = 0; i < 5; ++i) {
      const auto start = Clock::now();
      work(repeats, 0, step++);
      least = std::min(least, seconds_since(start));
    }
    return least;
  };
  while (repeats < kMostRepeats && fastest() < kChunkSeconds) repeats *= 2;
  std::vector<double> rates(static_cast<size_t>(threads), 0);
  parallel_for(threads, threads, [&](int64_t thread, int) {
    std::vector<double> chunks;
    const auto begin = Clock::now();
    for (int64_t at = 0; chunks.size() < kFewestChunks || seconds_since(begin) < kRunSeconds;
         ++at) {
      const auto start = Clock::now();
      const double amount = work(repeats, static_cast<int>(thread), at);
      chunks.push_back(amount / std::max(seconds_since(start), 1e-9));
    }
    const auto place = chunks.begin() + static_cast<int64_t>(chunks.size() * 4 / 5);
    std::nth_element(chunks.begin(), place, chunks.end());
    rates[static_cast<size_t>(thread)] = *place;
  });
  double total = 0;
  for (double rate : rates) total += rate;
  return total;
}

std::atomic<double> kept;  // what loops computed, so that none is left out

double half_rate(Isa isa, int threads) {
  double probe = 0;
  if (kernels::run_half_multiply_adds(isa, 1, probe) == 0) return 0;
  constexpr int64_t kRounds = 1000;
  return steady_rate(threads, [&](int64_t repeats, int, int64_t) {
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
  const double rate = steady_rate(threads, [&](int64_t repeats, int, int64_t) {
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
  // Half of a level each, so that the arrays stay in it; DRAM with arrays that no cache of usual size holds.
  const int64_t of_l3 = l3 / threads / 2, of_dram = std::min(kMostDramBytes, 4 * l3) / threads;
  const int64_t most = std::max(l2, of_dram) / static_cast<int64_t>(sizeof(float));
  std::vector<Array> arrays;
  for (int t = 0; t < threads; ++t) arrays.emplace_back(DType::f32, Dims{most});
  parallel_for(threads, threads, [&](int64_t item, int) {  // each thread touches its own pages
    float* data = arrays[static_cast<size_t>(item)].as<float>();
    std::fill(data, data + most, 1.0f);
  });
  // Bytes a second of all threads that read arrays of `each` bytes over and over.
  const auto read = [&](int64_t each) {
    // Segments of at most a megabyte, one after the other through the thread's array.
    constexpr int64_t kMostSegment = (1 << 20) / static_cast<int64_t>(sizeof(float));
    const int64_t count = each / static_cast<int64_t>(sizeof(float));
    const int64_t segment = std::min(count, kMostSegment), segments = count / segment;
    return steady_rate(threads, [&](int64_t repeats, int thread, int64_t step) {
      const float* data = arrays[static_cast<size_t>(thread)].as<float>();
      double sum = 0;
      for (int64_t r = 0; r < repeats; ++r) {
        sum +=
            kernels::read_floats(vector, data + (step * repeats + r) % segments * segment, segment);
      }
      kept = sum;
      return static_cast<double>(repeats) * static_cast<double>(segment) * sizeof(float);
    });
  };
  std::vector<MemoryLevel> levels = {{"L1", static_cast<double>(threads * l1), read(l1 / 2)},
                                     {"L2", static_cast<double>(threads * l2), read(l2 / 2)}};
  if (of_l3 > l2) {
    // A large L3 is shared with others, in virtual machines with other machines: how much of it holds what
    // these threads read shows where reading becomes slower.
    const int64_t largest = std::min(of_l3, of_dram);
    int64_t each = std::min(largest, 8 * l2), holds = l3;
    const double rate = read(each);
    while (each < largest) {
      const int64_t next = std::min(2 * each, largest);
      if (read(next) < 0.8 * rate) {
        holds = threads * each;
        break;
      }
      each = next;
    }
    levels.push_back({"L3", static_cast<double>(holds), rate});
  }
  levels.push_back({"DRAM", std::numeric_limits<double>::infinity(), read(std::max(l2, of_dram))});
  // What comes from further away comes through the nearer level.
  for (size_t i = levels.size() - 1; i > 0; --i) {
    levels[i - 1].bytes_per_second =
        std::max(levels[i - 1].bytes_per_second, levels[i].bytes_per_second);
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
