#include "base/cpu_quota.h"

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <limits>
#include <string>

namespace heed {

namespace {

std::optional<int> limit_of(const std::filesystem::path& group) {
  int64_t quota = 0, period = 0;  // microseconds; a quota of "max" or -1 is none
  std::ifstream both(group / "cpu.max");
  if (!(both >> quota >> period)) {
    std::ifstream quota_file(group / "cpu.cfs_quota_us"), period_file(group / "cpu.cfs_period_us");
    if (!(quota_file >> quota && period_file >> period)) return std::nullopt;
  }
  if (quota <= 0 || period <= 0) return std::nullopt;
  const int64_t cores = quota / period + (quota % period == 0 ? 0 : 1);
  return static_cast<int>(std::min<int64_t>(cores, std::numeric_limits<int>::max()));
}

}  // namespace

std::optional<int> cpu_quota(const std::filesystem::path& groups,
                             const std::filesystem::path& own) {
  std::optional<int> least;
  std::ifstream lines(own);
  for (std::string line; std::getline(lines, line);) {  // "0::/a/b", "4:cpu,cpuacct:/a/b"
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    const bool unified = controllers == ",,";
    if (!unified && controllers.find(",cpu,") == std::string::npos) continue;
    const std::filesystem::path mounted = unified ? groups : groups / "cpu";
    for (std::filesystem::path group = line.substr(second + 1);; group = group.parent_path()) {
      if (const auto limit = limit_of(mounted / group.relative_path())) {
        least = std::min(*limit, least.value_or(*limit));
      }
      if (!group.has_relative_path()) break;
    }
  }
  return least;
}

}  // namespace heed
