#include "cli/wait_policy.h"

#include <omp.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstdlib>
#include <fstream>
#include <string>
#include <string_view>
#include <thread>

#include "base/cpu_quota.h"
#include "base/parallel.h"

namespace heed::cli {

namespace {

// Threads of all processes that want a core at this moment, this one included; 0 where the system does not say.
int running_threads() {
  std::ifstream statistics("/proc/stat");
  for (std::string word; statistics >> word;) {
    int count = 0;
    if (word == "procs_running" && statistics >> count) return count;
  }
  return 0;
}

bool cores_are_mostly_short(int threads) {
  constexpr int kSamples = 5;
  const int cores = omp_get_num_procs();  // of the affinity mask
  const int granted = std::min(cores, cpu_quota().value_or(cores));
  int shorts = 0;
  for (int i = 0; i < kSamples; ++i) {
    shorts += cores_are_short(std::max(running_threads() - 1, 0), threads, granted);
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  return 2 * shorts > kSamples;
}

}  // namespace

bool cores_are_short(int others, int threads, int cores) { return others + threads > cores; }

std::optional<int> threads_of(char** argv) {
  constexpr std::string_view kOption = "--threads";
  std::optional<int> threads;
  for (char** at = argv; *at != nullptr; ++at) {
    std::string_view text = *at;
    if (!text.starts_with(kOption)) continue;
    text.remove_prefix(kOption.size());
    if (text.starts_with("=")) {
      text.remove_prefix(1);
    } else if (text.empty() && at[1] != nullptr) {
      text = at[1];
    }
    int number = 0;
    const auto [stop, error] = std::from_chars(text.data(), text.data() + text.size(), number);
    if (error == std::errc() && stop == text.data() + text.size()) threads = number;
  }
  return threads;
}

void sleep_when_idle_on_shared_cores(char** argv) {
  if (std::getenv("OMP_WAIT_POLICY") != nullptr || std::getenv("GOMP_SPINCOUNT") != nullptr) return;
  if (!cores_are_mostly_short(threads_of(argv).value_or(default_threads()))) return;
  setenv("OMP_WAIT_POLICY", "passive", 0);
  execv("/proc/self/exe", argv);  // returns only if it failed: then threads spin, as by default
}

}  // namespace heed::cli
