#include "cli/wait_policy.h"

#include <gtest/gtest.h>

#include <vector>

namespace heed::cli {
namespace {

TEST(WaitPolicy, EveryThreadNeedsACoreBesideTheOthers) {
  EXPECT_FALSE(cores_are_short(0, 2, 2));
  EXPECT_TRUE(cores_are_short(1, 2, 2));
  EXPECT_FALSE(cores_are_short(1, 1, 2));
  EXPECT_FALSE(cores_are_short(1, 15, 16));
  EXPECT_TRUE(cores_are_short(1, 16, 16));
  EXPECT_TRUE(cores_are_short(0, 3, 2));
}

std::optional<int> read(std::vector<const char*> arguments) {
  arguments.push_back(nullptr);
  return threads_of(const_cast<char**>(arguments.data()));
}

TEST(WaitPolicy, ReadsTheNumberOfThreads) {
  EXPECT_EQ(read({"heed", "run", "--threads", "3", "-p", "x"}), 3);
  EXPECT_EQ(read({"heed", "run", "--threads=12"}), 12);
  EXPECT_EQ(read({"heed", "run", "--threads", "3", "--threads=1"}), 1);
  EXPECT_FALSE(read({"heed", "run", "-p", "3"}));
  EXPECT_FALSE(read({"heed", "run", "--threads"}));
  EXPECT_FALSE(read({"heed", "run", "--threads="}));
  EXPECT_FALSE(read({"heed", "run", "--threads", "many"}));
  EXPECT_FALSE(read({"heed", "run", "--threads-of", "3"}));
}

}  // namespace
}  // namespace heed::cli
