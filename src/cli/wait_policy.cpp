#include "cli/wait_policy.h"

#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <fstream>
#include <string>
#include <thread>

namespace heed::cli {

namespace {

// Processes that want a core at this moment, this one included; 0 where the system does not say.
int running_processes() {
  std::ifstream statistics("/proc/stat");
  for (std::string word; statistics >> word;) {
    int count = 0;
    if (word == "procs_running" && statistics >> count) return count;
  }
  return 0;
}

bool cores_are_shared() {
  constexpr int kSamples = 5;
  int busy = 0;
  for (int i = 0; i < kSamples; ++i) {
    busy += running_processes() > 1;
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  return 2 * busy > kSamples;
}

}  // namespace

void sleep_when_idle_on_shared_cores(char** argv) {
  if (std::getenv("OMP_WAIT_POLICY") != nullptr || std::getenv("GOMP_SPINCOUNT") != nullptr) return;
  if (!cores_are_shared()) return;
  setenv("OMP_WAIT_POLICY", "passive", 0);
  execv("/proc/self/exe", argv);  // returns only if it failed: then threads spin, as by default
}

}  // namespace heed::cli
