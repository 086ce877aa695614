#include "base/cpu_quota.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <fstream>
#include <string>

namespace heed {
namespace {

namespace fs = std::filesystem;

class CpuQuota : public testing::Test {
 protected:
  CpuQuota() { fs::create_directories(root_); }
  ~CpuQuota() override { fs::remove_all(root_); }

  void write(const std::string& name, const std::string& text) const {
    fs::create_directories((root_ / name).parent_path());
    std::ofstream(root_ / name) << text << '\n';
  }
  std::optional<int> found() const { return cpu_quota(root_ / "groups", root_ / "own"); }

 private:
  fs::path root_ = fs::temp_directory_path() / ("heed_quota_test_" + std::to_string(getpid()));
};

TEST_F(CpuQuota, NoneWithoutGroupsOrLimits) {
  EXPECT_EQ(found(), std::nullopt);
  write("own", "0::/");
  EXPECT_EQ(found(), std::nullopt);
  write("groups/cpu.max", "max 100000");
  EXPECT_EQ(found(), std::nullopt);
  write("own", "no group\n3:memory:/\n:\n");
  write("groups/cpu.max", "100000 100000");
  EXPECT_EQ(found(), std::nullopt);
}

TEST_F(CpuQuota, IsRoundedUp) {
  write("own", "0::/");
  for (const auto& [text, cores] :
       {std::pair{"400000 100000", 4}, {"150000 100000", 2}, {"5000 100000", 1}}) {
    write("groups/cpu.max", text);
    EXPECT_EQ(found(), cores) << text;
  }
}

TEST_F(CpuQuota, TheLeastOfTheGroupAndThoseAboveIt) {
  write("own", "0::/pod/container");
  write("groups/pod/container/cpu.max", "800000 100000");
  EXPECT_EQ(found(), 8);
  write("groups/pod/cpu.max", "300000 100000");
  EXPECT_EQ(found(), 3);
  write("groups/pod/container/cpu.max", "200000 100000");
  EXPECT_EQ(found(), 2);
}

TEST_F(CpuQuota, OfTheFirstVersion) {
  write("own", "7:cpuset:/\n4:cpu,cpuacct:/docker/1f\n0::/");
  write("groups/cpu/cpu.cfs_quota_us", "-1");
  write("groups/cpu/cpu.cfs_period_us", "100000");
  EXPECT_EQ(found(), std::nullopt);
  write("groups/cpu/cpu.cfs_quota_us", "250000");  // as a container sees its own group
  EXPECT_EQ(found(), 3);
}

}  // namespace
}  // namespace heed
