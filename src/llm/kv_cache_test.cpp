#include "llm/kv_cache.h"

#include <gtest/gtest.h>

#include "heed/error.h"

namespace heed {
namespace {

TEST(KvCache, GrowsAndKeepsWhatItHolds) {
  KvCache cache(3, 2, 5, DType::f32, 3000);
  const auto value = [](int64_t layer, int64_t head, int64_t token, int64_t column) {
    return static_cast<float>(((layer * 2 + head) * 3000 + token) * 5 + column);
  };
  while (cache.length() < 2000) {
    cache.reserve(cache.length() + 1);
    const int64_t token = cache.length();
    for (int64_t layer = 0; layer < 3; ++layer) {
      for (int64_t head = 0; head < 2; ++head) {
        for (int64_t c = 0; c < 5; ++c) {
          *reinterpret_cast<float*>(cache.keys(layer, token + 1).at({0, head, token, c})) =
              value(layer, head, token, c);
          *reinterpret_cast<float*>(cache.values(layer, token + 1).at({0, head, token, c})) =
              -value(layer, head, token, c);
        }
      }
    }
    cache.advance(1);
  }
  EXPECT_LT(cache.capacity(), 3000);
  EXPECT_EQ(cache.keys(1, 2000).shape(), (Dims{1, 2, 2000, 5}));
  for (int64_t layer = 0; layer < 3; ++layer) {
    for (int64_t head = 0; head < 2; ++head) {
      for (int64_t token = 0; token < 2000; ++token) {
        for (int64_t c = 0; c < 5; ++c) {
          ASSERT_EQ(*reinterpret_cast<float*>(cache.keys(layer, 2000).at({0, head, token, c})),
                    value(layer, head, token, c));
          ASSERT_EQ(*reinterpret_cast<float*>(cache.values(layer, 2000).at({0, head, token, c})),
                    -value(layer, head, token, c));
        }
      }
    }
  }
}

TEST(KvCache, FetchedMemoryKeepsWhatItHolds) {
  KvCache cache(2, 3, 8, DType::f32, 5000);
  cache.reserve(4000);
  cache.populate(7, {.threads = 2});
  const auto at = [&](int64_t layer, int64_t head) {
    return reinterpret_cast<float*>(cache.values(layer, 7).at({0, head, 6, 0}));
  };
  for (int64_t i = 0; i < 6; ++i) *at(i / 3, i % 3) = static_cast<float>(i + 1);
  cache.populate(9000, {.threads = 2});  // more than there is room for
  for (int64_t i = 0; i < 6; ++i) EXPECT_EQ(*at(i / 3, i % 3), static_cast<float>(i + 1));
  cache.advance(7);
  cache.populate(3, {});  // nothing left to fetch
  KvCache(0, 1, 4, DType::bf16, 10).populate(10, {});
}

TEST(KvCache, Limits) {
  KvCache cache(1, 1, 4, DType::bf16, 10);
  cache.reserve(10);
  EXPECT_EQ(cache.capacity(), 10);
  cache.advance(10);
  EXPECT_THROW(cache.reserve(11), Error);
  EXPECT_THROW(cache.advance(1), Error);
  EXPECT_THROW(cache.truncate(11), Error);
  EXPECT_THROW(cache.truncate(-1), Error);
  cache.truncate(3);
  EXPECT_EQ(cache.length(), 3);
  EXPECT_THROW(KvCache(1, 1, 4, DType::f16, 10), Error);
  EXPECT_THROW(KvCache(1, 1, 4, DType::f32, 0), Error);
}

TEST(Pages, RefuseTheImpossible) {
  EXPECT_THROW(Pages(SIZE_MAX / 2), Error);
  EXPECT_THROW(Pages(SIZE_MAX), Error);
  EXPECT_EQ(Pages(0).data(), nullptr);
}

}  // namespace
}  // namespace heed
