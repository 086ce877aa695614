// Scores and sums that are large beside the precision of their types.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "engine/operands.h"
#include "heed/heed.h"
#include "mechanisms/test_arrays.h"

namespace heed {
namespace {

TEST(Flash, HugeAndGrowingScoresStayExact) {
  for (DType type : {DType::f32, DType::bf16}) {
    for (Isa isa : available_isas()) {
      // Scores of +-1e4 and scores that grow along the keys, so that every tile moves the pivot.
      Array q = random_array(type, {1, 1, 60, 32}, 1, 40),
            k = random_array(type, {1, 1, 900, 32}, 2, 40);
      Array v = random_array(type, {1, 1, 900, 32}, 3);
      Array ramp(DType::f64, {1, 1, 900, 32});
      for (int64_t i = 0; i < ramp.count(); ++i) {
        const int64_t step = i / 32 / 8;
        ramp.as<double>()[i] = static_cast<double>(step);
      }
      for (const Array& keys : {std::cref(k), std::cref(static_cast<const Array&>(ramp))}) {
        const Array used = convert(keys, type);
        const Array exact_q = convert(q, DType::f64), exact_k = convert(used, DType::f64);
        const AttentionResult want =
            flash_attention(exact_q, exact_k, convert(v, DType::f64).view());
        RunOptions run;
        run.isa = isa;
        const AttentionResult got = flash_attention(q, used, v, {}, run);
        EXPECT_LT(largest_difference(got.out, want.out), type == DType::f32 ? 2e-2 : 5e-2)
            << name_of(type) << " " << name_of(isa);
        EXPECT_LT(largest_difference(got.lse, want.lse), 2e-2) << name_of(isa);
      }
    }
  }
}

// Half a unit in the last place of such scores is more than an exponent holds.
TEST(Flash, ScoresBeyondTheRangeOfExponentsChooseOneKey) {
  for (DType type : {DType::f64, DType::f32, DType::bf16}) {
    const double size = type == DType::f64 ? 1e11 : 1e6;
    for (const auto& [queries, keys] :
         {std::pair<int64_t, int64_t>{1, 50}, {3, 700}, {100, 130}, {70, 900}}) {
      const Array q = random_array(type, {1, 2, queries, 24}, 1, size);
      const Array k = random_array(type, {1, 1, keys, 24}, 2, size),
                  v = random_array(type, {1, 1, keys, 8}, 3);
      const Array g = random_array(type, {1, 2, queries, 8}, 4);
      const Array slopes = random_array(wide_type(type), {2}, 5);
      // Of each query: the key of the largest score.
      const Array wide_q = convert(q, DType::f64), wide_k = convert(k, DType::f64);
      Array needed = Array::zeros(DType::f64, {1, 2, queries, 8});
      Array needed_v = Array::zeros(DType::f64, {1, 1, keys, 8});
      const Array wide_v = convert(v, DType::f64), wide_g = convert(g, DType::f64);
      for (int64_t r = 0; r < 2 * queries; ++r) {
        double most = -std::numeric_limits<double>::infinity();
        int64_t best = 0;
        for (int64_t m = 0; m < keys; ++m) {
          double score = 0;
          for (int64_t e = 0; e < 24; ++e) {
            score += wide_q.as<double>()[r * 24 + e] * wide_k.as<double>()[m * 24 + e];
          }
          if (score > most) most = score, best = m;
        }
        for (int64_t f = 0; f < 8; ++f) {
          needed.as<double>()[r * 8 + f] = wide_v.as<double>()[best * 8 + f];
          needed_v.as<double>()[best * 8 + f] += wide_g.as<double>()[r * 8 + f];
        }
      }
      for (Isa isa : available_isas()) {
        for (bool alibi : {false, true}) {
          FlashOptions options;
          if (alibi) options.alibi_slopes = slopes;
          RunOptions run;
          run.isa = isa;
          const std::string what = std::string(name_of(isa)) + " " + name_of(type) + " " +
                                   std::to_string(queries) + (alibi ? " alibi" : "");
          const AttentionResult found = flash_attention(q, k, v, options, run);
          EXPECT_LT(largest_difference(found.out, needed), 1e-5) << what;
          const FlashGradients gradients =
              flash_attention_backward(g, {}, q, k, v, found.out, found.lse, options, run);
          EXPECT_LT(largest_difference(gradients.v, needed_v), type == DType::bf16 ? 0.1 : 1e-5)
              << what;
          const Array nothing = Array::zeros(DType::f64, {1, 2, queries, 24});
          EXPECT_TRUE(std::isfinite(largest_difference(gradients.q, nothing))) << what;
        }
      }
    }
  }
}

// One key, or the sink, far above the others: whatever a log-sum-exp of float32 has lost, its weight is 1.
TEST(Flash, GradientsOfLargeScoresAreThoseOfTheKeyOnTop) {
  for (DType type : {DType::f32, DType::bf16, DType::f16}) {
    for (int64_t queries : {2, 40}) {
      for (double size : {1e3, 3e3, 1e4}) {
        const Array q = random_array(type, {1, 2, queries, 24}, 1, size);
        const Array k = random_array(type, {1, 2, 70, 24}, 2, size);
        const Array v = random_array(type, {1, 2, 70, 8}, 3),
                    g = random_array(type, {1, 2, queries, 8}, 4);
        Array sinks(DType::f32, {2});
        sinks.as<float>()[0] = static_cast<float>(0.9 * size * size);
        sinks.as<float>()[1] = static_cast<float>(30 * size * size);
        const Array lse_gradient = random_array(DType::f32, {1, 2, queries}, 5);
        FlashOptions options;
        options.sink = sinks;
        const auto exact = [&](const Array& x) { return convert(x, DType::f64); };
        const Array wide_q = exact(q), wide_k = exact(k), wide_v = exact(v), wide_g = exact(g);
        const Array wide_lse_gradient = exact(lse_gradient);
        const AttentionResult wide = flash_attention(wide_q, wide_k, wide_v, options);
        const FlashGradients want =
            flash_attention_backward(wide_g, wide_lse_gradient, wide_q, wide_k, wide_v, wide.out,
                                     wide.lse, options, RunOptions());
        for (Isa isa : available_isas()) {
          RunOptions run;
          run.isa = isa;
          const AttentionResult r = flash_attention(q, k, v, options, run);
          const FlashGradients to =
              flash_attention_backward(g, lse_gradient, q, k, v, r.out, r.lse, options, run);
          EXPECT_LT(largest_difference(to.v, want.v), type == DType::f32 ? 1e-4 : 0.2)
              << name_of(type) << " " << name_of(isa) << " " << size << " " << queries;
          EXPECT_LT(largest_difference(to.sink, want.sink), type == DType::f32 ? 1e-4 : 0.2)
              << name_of(type) << " " << name_of(isa) << " " << size << " " << queries;
        }
      }
    }
  }
}

// Of a sum as large as these the logarithm of 2 is lost, in float32 or in float64.
TEST(Flash, MergeOfLargeSumsKeepsTheShares) {
  for (DType type : {DType::f32, DType::f64}) {
    const Array a = random_array(type, {1, 1, 3, 8}, 1), b = random_array(type, {1, 1, 3, 8}, 2);
    const Array g = random_array(type, {1, 1, 3, 8}, 3),
                lse_gradient = random_array(type, {1, 1, 3}, 4);
    const auto merge = [&](double size, AttentionResult& r) {
      const Array lse = filled(type, {1, 1, 3}, size);
      r = merge_attention(a, lse, b, lse);
      return merge_attention_backward(g, lse_gradient, a, lse, b, lse);
    };
    AttentionResult plain, large;
    const MergeGradients want = merge(0, plain);
    for (double size : {1e9, -1e9, 1e20, -1e20, 1e37}) {
      const MergeGradients to = merge(size, large);
      EXPECT_TRUE(same_bits(large.out, plain.out)) << size;
      EXPECT_TRUE(same_bits(to.out_a, want.out_a)) << size;
      EXPECT_TRUE(same_bits(to.out_b, want.out_b)) << size;
      EXPECT_TRUE(same_bits(to.lse_a, want.lse_a)) << size;
      EXPECT_TRUE(same_bits(to.lse_b, want.lse_b)) << size;
    }
  }
}

}  // namespace
}  // namespace heed
