#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <thread>

#include "heed/error.h"
#include "heed/run.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace heed {

const char* name_of(Isa isa) {
  switch (isa) {
    case Isa::portable:
      return "portable";
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
    case Isa::amx:
      return "amx";
  }
  return "?";
}

Isa parse_isa(std::string_view name) {
  for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512, Isa::amx}) {
    if (name == name_of(isa)) return isa;
  }
  throw Error("instruction set '" + std::string(name) +
              "' is unknown, one of portable, avx2, avx512, amx is needed");
}

namespace {

#if defined(__x86_64__) && defined(__linux__)

uint64_t read_xcr0() {
  uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t{high} << 32) | low;
}

// Linux hands out the tile registers (state component 18) only to processes that ask.
bool request_amx_permission() {
  constexpr int kArchReqXcompPerm = 0x1023;
  constexpr int kXTileData = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXTileData) == 0;
}

// What both the processor and the operating system (which saves the registers) support.
struct Support {
  bool avx2 = false, avx512 = false, avx512_bf16 = false, avx512_vnni = false, amx = false;
  // Products of bfloat16 pairs outrun float32 ones: AMD's unit is full width, Intel's half of it.
  bool full_rate_bf16 = false;
};

bool made_by_amd() {
  uint32_t a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(0, &a, &b, &c, &d) && b == signature_AMD_ebx && c == signature_AMD_ecx &&
         d == signature_AMD_edx;
}

Support detect() {
  Support found;
  uint32_t a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return found;
  bool osxsave = (c >> 27) & 1, fma = (c >> 12) & 1, f16c = (c >> 29) & 1;
  if (!osxsave) return found;
  uint64_t xcr0 = read_xcr0();
  if ((xcr0 & 0x6) != 0x6) return found;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return found;
  bool bmi2 = (b >> 8) & 1;
  found.avx2 = ((b >> 5) & 1) && fma && f16c && bmi2;
  bool foundation = (b >> 16) & 1, dq = (b >> 17) & 1, cd = (b >> 28) & 1, bw = (b >> 30) & 1,
       vl = (b >> 31) & 1;
  found.avx512 = found.avx2 && foundation && dq && cd && bw && vl && (xcr0 & 0xe0) == 0xe0;
  found.avx512_vnni = found.avx512 && ((c >> 11) & 1);
  bool amx_bf16 = (d >> 22) & 1, amx_tile = (d >> 24) & 1;
  bool os_tiles = (xcr0 & 0x60000) == 0x60000;
  if (__get_cpuid_count(7, 1, &a, &b, &c, &d)) found.avx512_bf16 = found.avx512 && ((a >> 5) & 1);
  found.full_rate_bf16 = found.avx512_bf16 && made_by_amd();
  found.amx = found.avx512_bf16 && amx_bf16 && amx_tile && os_tiles && request_amx_permission();
  return found;
}

#else

struct Support {
  bool avx2 = false, avx512 = false, avx512_bf16 = false, avx512_vnni = false, amx = false,
       full_rate_bf16 = false;
};
Support detect() { return {}; }

#endif

const Support& support() {
  static const Support found = detect();
  return found;
}

std::string first_line_with(const char* file, std::string_view key) {
  std::ifstream in(file);
  for (std::string line; std::getline(in, line);) {
    if (line.starts_with(key)) {
      size_t colon = line.find(':');
      return colon == std::string::npos ? line : line.substr(std::min(colon + 2, line.size()));
    }
  }
  return {};
}

int64_t cache_bytes(int level, std::string_view type) {
  for (int i = 0; i < 8; ++i) {
    std::string folder = "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(i) + "/";
    std::ifstream level_file(folder + "level"), type_file(folder + "type"),
        size_file(folder + "size");
    int found_level = 0;
    std::string found_type, size;
    if (!(level_file >> found_level) || !(type_file >> found_type) || !(size_file >> size)) break;
    if (found_level != level || (found_type != type && found_type != "Unified")) continue;
    int64_t bytes = std::strtoll(size.c_str(), nullptr, 10);
    if (size.ends_with("K")) bytes <<= 10;
    if (size.ends_with("M")) bytes <<= 20;
    return bytes;
  }
  return 0;
}

}  // namespace

const std::vector<Isa>& available_isas() {
  // Never destroyed: destructors of static objects may still call operators.
  static const auto& isas = *[] {
    auto* list = new std::vector<Isa>{Isa::portable};
    if (support().avx2) list->push_back(Isa::avx2);
    if (support().avx512) list->push_back(Isa::avx512);
    if (support().amx) list->push_back(Isa::amx);
    return list;
  }();
  return isas;
}

namespace {

Isa require_available(Isa isa, const char* asked_by) {
  const auto& available = available_isas();
  if (std::find(available.begin(), available.end(), isa) != available.end()) return isa;
  throw Error(std::string(asked_by) + " is " + name_of(isa) +
              ", which this machine cannot run; it has up to " + name_of(available.back()));
}

}  // namespace

std::optional<Isa> forced_isa() {
  const char* name = std::getenv("HEED_ISA");
  if (name == nullptr || *name == '\0') return std::nullopt;
  Isa isa = Isa::portable;
  try {
    isa = parse_isa(name);
  } catch (const Error& error) {
    throw Error(std::string("HEED_ISA: ") + error.what());
  }
  return require_available(isa, "HEED_ISA");
}

Isa default_isa() { return forced_isa().value_or(available_isas().back()); }

Isa chosen_isa(const RunOptions& run) {
  return run.isa ? require_available(*run.isa, "isa") : default_isa();
}

bool CpuInfo::has(std::string_view feature) const {
  return std::find(features.begin(), features.end(), feature) != features.end();
}

const CpuInfo& cpu_info() {
  // Never destroyed, as the list above: bfloat16 calls ask for features.
  static const auto& info = *[] {
    auto* made = new CpuInfo;
    CpuInfo& found = *made;
    found.model = first_line_with("/proc/cpuinfo", "model name");
    if (found.model.empty()) found.model = "unknown processor";
    found.cores = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
    found.l1d_bytes = cache_bytes(1, "Data");
    found.l2_bytes = cache_bytes(2, "Unified");
    found.l3_bytes = cache_bytes(3, "Unified");
    const Support& s = support();
    if (s.avx2) found.features.insert(found.features.end(), {"avx2", "fma", "f16c"});
    if (s.avx512) found.features.push_back("avx512");
    if (s.avx512_vnni) found.features.push_back("avx512_vnni");
    if (s.avx512_bf16) found.features.push_back("avx512_bf16");
    if (s.full_rate_bf16) found.features.push_back("full_rate_bf16");
    if (s.amx) found.features.push_back("amx_bf16");
#if defined(__aarch64__)
    found.features.push_back("neon");  // what the portable kernels are compiled to
#endif
    return made;
  }();
  return info;
}

}  // namespace heed
