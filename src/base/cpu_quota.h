// The processor time that control groups grant: a container may see more cores than it may use.
#pragma once
#include <filesystem>
#include <optional>

namespace heed {

/// Cores' worth of time that this process may use, rounded up; none where nothing limits it. The least of its
/// control group and those above it, of version 2 (cpu.max) and 1 (cpu.cfs_quota_us). `groups` is where they
/// are mounted, `own` the list of those that the process is in.
/// Source: https://docs.kernel.org/admin-guide/cgroup-v2.html, https://docs.kernel.org/scheduler/sched-bwc.html
std::optional<int> cpu_quota(const std::filesystem::path& groups = "/sys/fs/cgroup",
                             const std::filesystem::path& own = "/proc/self/cgroup");

}  // namespace heed
