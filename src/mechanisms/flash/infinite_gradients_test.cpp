// What is not finite arrives in the gradients of what sees it and nowhere else, with few query rows, one
// tile of them and several.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>

#include "heed/heed.h"
#include "mechanisms/test_arrays.h"

namespace heed {
namespace {

constexpr int64_t kKeys = 300, kDim = 20;

struct Call {
  Array q, k, v, g;  // two query heads of one key head
  FlashOptions options;
  RunOptions run;
};

FlashGradients gradients_of(const Call& call) {
  const AttentionResult r = flash_attention(call.q, call.k, call.v, call.options, call.run);
  return flash_attention_backward(call.g, {}, call.q, call.k, call.v, r.out, r.lse, call.options,
                                  call.run);
}

// Of a gradient [1, heads, rows, dim]: 1 for each row that is finite.
std::vector<bool> finite_rows(const Array& gradient) {
  const Array wide = convert(gradient, DType::f64);
  const int64_t width = gradient.shape().back();
  std::vector<bool> finite;
  for (int64_t row = 0; row < wide.count() / width; ++row) {
    bool all = true;
    for (int64_t f = 0; f < width; ++f) {
      all = all && std::isfinite(wide.as<double>()[row * width + f]);
    }
    finite.push_back(all);
  }
  return finite;
}

Call make_call(DType type, int64_t queries, int64_t query_heads, bool by_mask, Array& mask) {
  Call call{random_array(type, {1, query_heads, queries, kDim}, 1),
            random_array(type, {1, 1, kKeys, kDim}, 2),
            random_array(type, {1, 1, kKeys, kDim}, 3),
            random_array(type, {1, query_heads, queries, kDim}, 4),
            {},
            {}};
  call.options.masks.causal = !by_mask;
  // The same keys as causal, which the engine does not know.
  mask = Array(DType::boolean, {queries, kKeys});
  for (int64_t i = 0; i < queries; ++i) {
    for (int64_t j = 0; j < kKeys; ++j) {
      mask.as<bool>()[i * kKeys + j] = j <= i + kKeys - queries;
    }
  }
  if (by_mask) call.options.mask = mask;
  return call;
}

template <class Check>
void for_all_calls(const Check& check) {
  for (DType type : {DType::f64, DType::f32, DType::bf16, DType::f16}) {
    for (Isa isa : available_isas()) {
      for (int64_t queries : {1, 3, 7, 40, 110}) {
        for (int64_t heads : {1, 2}) {
          for (bool by_mask : {false, true}) {
            Array mask;
            Call call = make_call(type, queries, heads, by_mask, mask);
            call.run.isa = isa;
            check(call, queries, heads,
                  std::string(name_of(type)) + " " + name_of(isa) + " " + std::to_string(queries) +
                      " queries of " + std::to_string(heads) + " heads" +
                      (by_mask ? " by mask" : ""));
          }
        }
      }
    }
  }
}

TEST(FlashInfinities, AKeyReachesTheGradientsOfRowsThatSeeIt) {
  for_all_calls([](Call& call, int64_t queries, int64_t heads, const std::string& what) {
    const int64_t bad = kKeys - 1;  // only the last query sees it
    for (Array* rows : {&call.k, &call.v}) {
      const Array clean = convert(*rows, rows->dtype());
      Array one = filled(DType::f64, {1}, std::numeric_limits<double>::quiet_NaN());
      copy(one, rows->view().select(0, 0).select(0, 0).select(0, bad).slice(0, 3, 4));
      const FlashGradients to = gradients_of(call);
      const std::vector<bool> q = finite_rows(to.q);
      for (int64_t row = 0; row < heads * queries; ++row) {
        EXPECT_EQ(q[static_cast<size_t>(row)], row % queries != queries - 1) << what << " " << row;
      }
      copy(clean, *rows);
    }
  });
}

TEST(FlashInfinities, AQueryReachesTheGradientsOfKeysThatItSees) {
  for_all_calls([](Call& call, int64_t queries, int64_t heads, const std::string& what) {
    // The first query of the last head sees all keys but the last queries - 1.
    const int64_t seen = kKeys - queries + 1;
    for (Array* rows : {&call.q, &call.g}) {
      const Array clean = convert(*rows, rows->dtype());
      Array one = filled(DType::f64, {1}, std::numeric_limits<double>::quiet_NaN());
      copy(one, rows->view().select(0, 0).select(0, heads - 1).select(0, 0).slice(0, 3, 4));
      const FlashGradients to = gradients_of(call);
      const std::vector<bool> k = finite_rows(to.k);
      for (int64_t key = 0; key < kKeys; ++key) {
        EXPECT_EQ(k[static_cast<size_t>(key)], key >= seen) << what << " key " << key;
      }
      const std::vector<bool> v = finite_rows(to.v);
      for (int64_t key = seen; key < kKeys; ++key) {
        EXPECT_TRUE(v[static_cast<size_t>(key)]) << what << " value " << key;
      }
      EXPECT_FALSE(v[0]) << what;
      copy(clean, *rows);
    }
  });
}

}  // namespace
}  // namespace heed
