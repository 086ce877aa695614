// How a call runs on the machine, apart from what it computes.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace heed {

/// Instruction sets that kernels are compiled for, weakest first.
enum class Isa { portable, avx2, avx512, amx };

const char* name_of(Isa isa);
Isa parse_isa(std::string_view name);  // throws Error listing the names
/// Those this processor and operating system can run, weakest first; portable is always there.
const std::vector<Isa>& available_isas();
/// What the environment variable HEED_ISA forces. Throws Error if that is unknown or this machine cannot run it.
std::optional<Isa> forced_isa();
/// The strongest available, or what HEED_ISA forces.
Isa default_isa();

struct RunOptions;
/// What run.isa asks for, else default_isa(). Throws Error if this machine cannot run it.
Isa chosen_isa(const RunOptions& run);

/// Threads of a call whose RunOptions say nothing: set_threads, else OMP_NUM_THREADS, else all cores, or as
/// many as the control groups of a container grant.
int default_threads();
void set_threads(int threads);  // throws Error outside 1..1024

struct RunOptions {
  std::optional<int> threads = {};  // at most: short calls wake fewer
  std::optional<Isa> isa = {};
};

/// What was found on this machine, for people: model name, caches, instruction sets.
struct CpuInfo {
  std::string model;
  int cores = 1;
  int64_t l1d_bytes = 0, l2_bytes = 0, l3_bytes = 0;  // per core for L1 and L2; 0 = unknown
  std::vector<std::string> features;                  // of those heed looks at: "avx2", "fma", ...

  bool has(std::string_view feature) const;
};
const CpuInfo& cpu_info();

}  // namespace heed
