#include "engine/tiled/plan.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "heed/error.h"

namespace heed::tiled {
namespace {

// The text of masks.h, pair by pair.
bool sees(const Masks& masks, const std::vector<int64_t>& lengths, int64_t b, int64_t i, int64_t j,
          int64_t queries, int64_t keys) {
  const int64_t position = masks.from_start ? i : i + keys - queries;
  if (masks.causal && j > position) return false;
  if (masks.window.left && j < position - *masks.window.left) return false;
  if (masks.window.right && j > position + *masks.window.right) return false;
  return lengths.empty() || j < lengths[static_cast<size_t>(b)];
}

void check_plan(Masks masks, std::vector<int64_t> lengths, int64_t queries, int64_t keys) {
  const auto batch = static_cast<int64_t>(lengths.empty() ? 2 : lengths.size());
  if (!lengths.empty()) masks.lengths = Tensor(lengths.data(), DType::i64, {batch});
  const std::vector<TilePlan> plans = TilePlan::from_masks("op", masks, batch, queries, keys);
  for (int64_t b = 0; b < batch; ++b) {
    const TilePlan& plan = plans[static_cast<size_t>(b)];
    for (int64_t i = 0; i < queries; ++i) {
      for (int64_t j = 0; j < keys; ++j) {
        const Interval seen = plan.row(i);
        const bool want = sees(masks, lengths, b, i, j, queries, keys);
        ASSERT_EQ(j >= seen.begin && j < seen.end, want) << b << " " << i << " " << j;
        const Interval joint = plan.rows(i / 3 * 3, std::min(queries, i / 3 * 3 + 3));
        if (want) {
          ASSERT_TRUE(j >= joint.begin && j < joint.end);
        }
      }
    }
    for (int64_t begin = 0; begin + 2 <= queries; begin += 2) {
      for (int64_t key = 0; key + 3 <= keys; key += 3) {
        bool all = true;
        for (int64_t i = begin; i < begin + 2; ++i) {
          for (int64_t j = key; j < key + 3; ++j) {
            all = all && sees(masks, lengths, b, i, j, queries, keys);
          }
        }
        ASSERT_EQ(plan.covers(begin, begin + 2, {key, key + 3}), all);
      }
    }
  }
}

TEST(TilePlan, IsTheMaskPairByPair) {
  for (int64_t queries : {1, 7, 12}) {
    for (int64_t keys : {1, 5, 12, 20}) {
      for (bool causal : {false, true}) {
        for (std::optional<int64_t> left : {std::optional<int64_t>(), {0}, {3}, {INT64_MAX / 2}}) {
          for (std::optional<int64_t> right : {std::optional<int64_t>(), {0}, {2}}) {
            for (bool from_start : {false, true}) {
              const Masks masks{causal, {left, right}, {}, from_start};
              check_plan(masks, {}, queries, keys);
              check_plan(masks, {0, keys, keys / 2}, queries, keys);
            }
          }
        }
      }
    }
  }
}

TEST(TilePlan, DecodingAlignsToTheLength) {
  std::vector<int32_t> lengths{0, 2, 9, 16};
  const auto plans =
      TilePlan::for_decoding("op", Tensor(lengths.data(), DType::i32, {4}), 5, 4, 3, 16);
  for (int64_t b = 0; b < 4; ++b) {
    for (int64_t i = 0; i < 3; ++i) {
      for (int64_t j = 0; j < 16; ++j) {
        const int64_t position = lengths[static_cast<size_t>(b)] - 3 + i;
        const Interval seen = plans[static_cast<size_t>(b)].row(i);
        EXPECT_EQ(j >= seen.begin && j < seen.end, j <= position && j >= position - 5);
      }
    }
  }
}

TEST(TilePlan, GivenIntervals) {
  const TilePlan plan = TilePlan::of_intervals({{0, 3}, {0, 5}, {4, 9}}, 2, 5, 9);
  EXPECT_EQ(plan.queries(), 5);
  EXPECT_EQ(plan.row(1).end, 3);
  EXPECT_EQ(plan.row(2).end, 5);
  EXPECT_EQ(plan.row(4).begin, 4);
  EXPECT_EQ(plan.rows(1, 5).begin, 0);
  EXPECT_EQ(plan.rows(1, 5).end, 9);
  EXPECT_TRUE(plan.covers(0, 4, {0, 3}));
  EXPECT_FALSE(plan.covers(0, 5, {0, 3}));
}

TEST(TilePlan, ErrorsNameTheArgument) {
  const auto message = [](const Masks& masks) -> std::string {
    try {
      TilePlan::from_masks("some_attention", masks, 2, 4, 8);
    } catch (const Error& e) {
      return e.what();
    }
    return "no error";
  };
  EXPECT_NE(message({false, {-1, {}}}).find("window left is -1"), std::string::npos);
  EXPECT_NE(message({false, {{}, -2}}).find("window right is -2"), std::string::npos);
  std::vector<int64_t> lengths{3, 9};
  EXPECT_NE(message({false, {}, Tensor(lengths.data(), DType::i64, {2})}).find("lengths[1] is 9"),
            std::string::npos);
  EXPECT_NE(message({false, {}, Tensor(lengths.data(), DType::i64, {1})}).find("lengths [1] int64"),
            std::string::npos);
  std::vector<float> wrong{1, 2};
  EXPECT_NE(message({false, {}, Tensor(wrong.data(), DType::f32, {2})}).find("float32"),
            std::string::npos);
}

}  // namespace
}  // namespace heed::tiled
