// Scores and biases near and beyond the ends of their types.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "heed/heed.h"
#include "mechanisms/test_arrays.h"

namespace heed {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

Array filled(DType type, const Dims& shape, double value) {
  Array wide(DType::f64, shape);
  std::fill_n(wide.as<double>(), wide.count(), value);
  return convert(wide, type);
}

bool finite(const Tensor& t) {
  const Array wide = convert(t, DType::f64);
  return std::all_of(wide.as<double>(), wide.as<double>() + wide.count(),
                     [](double x) { return std::isfinite(x); });
}

double least_of(DType type) {
  return type == DType::f64    ? std::numeric_limits<double>::lowest()
         : type == DType::bf16 ? -0x1.fep127
                               : std::numeric_limits<float>::lowest();
}

TEST(FlashExtremes, HugeAndGrowingScoresStayExact) {
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
TEST(FlashExtremes, ScoresBeyondTheRangeOfExponentsChooseOneKey) {
  for (DType type : {DType::f64, DType::f32, DType::bf16}) {
    const double size = type == DType::f64 ? 1e11 : 1e6;
    for (const auto& [queries, keys] :
         {std::pair<int64_t, int64_t>{1, 50}, {3, 700}, {100, 130}, {70, 900}}) {
      const Array q = random_array(type, {1, 2, queries, 24}, 1, size);
      const Array k = random_array(type, {1, 1, keys, 24}, 2, size),
                  v = random_array(type, {1, 1, keys, 8}, 3);
      const Array g = random_array(type, {1, 2, queries, 8}, 4);
      const Array slopes = random_array(type == DType::f64 ? DType::f64 : DType::f32, {2}, 5);
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

TEST(FlashExtremes, ExtremeFiniteBiasesStayFinite) {
  const std::pair<DType, DType> types[] = {{DType::f32, DType::f32},
                                           {DType::f32, DType::bf16},
                                           {DType::f32, DType::f64},
                                           {DType::bf16, DType::bf16},
                                           {DType::f64, DType::f64}};
  for (const auto& [type, bias_type] : types) {
    for (int64_t queries : {1, 5, 40}) {
      const Array q = random_array(type, {1, 2, queries, 24}, 1),
                  k = random_array(type, {1, 2, 70, 24}, 2);
      const Array v = random_array(type, {1, 2, 70, 8}, 3),
                  g = random_array(type, {1, 2, queries, 8}, 4);
      const Array slopes = random_array(type == DType::f64 ? DType::f64 : DType::f32, {2}, 5);
      for (Isa isa : available_isas()) {
        RunOptions run;
        run.isa = isa;
        for (bool combined : {false, true}) {
          FlashOptions options;
          if (combined) {
            options.scale = -0.3;
            options.softcap = 2;
            options.alibi_slopes = slopes;
          }
          const std::string what = std::string(name_of(type)) + " + " + name_of(bias_type) + " " +
                                   std::to_string(queries) + " " + name_of(isa);
          // Equal biases that leave nothing of the scores: the mean of the values.
          const Array mean = flash_attention(filled(type, {1, 2, queries, 24}, 0), k, v).out;
          for (double value : {least_of(bias_type), -0.71 * least_of(bias_type)}) {
            const Array bias = filled(bias_type, {70}, value);
            options.bias = bias;
            const AttentionResult found = flash_attention(q, k, v, options, run);
            EXPECT_LT(largest_difference(found.out, mean), type == DType::bf16 ? 2e-2 : 1e-5)
                << what << " " << value;
            EXPECT_TRUE(finite(found.lse)) << what;
            EXPECT_EQ(std::signbit(*convert(found.lse, DType::f64).as<double>()), value < 0);
            // The log of the sum is lost in such an lse, so no more can be said of gradients.
            const FlashGradients to =
                flash_attention_backward(g, {}, q, k, v, found.out, found.lse, options, run);
            for (const Array* x : {&to.q, &to.k, &to.v, &to.bias}) {
              EXPECT_TRUE(finite(*x)) << what << " " << value;
            }
          }
          // Beside other keys the least number hides as well as -inf does.
          const Array least = filled(bias_type, {70}, 0), hidden = filled(bias_type, {70}, 0);
          for (int64_t m : {0, 3, 4, 33, 69}) {
            copy(filled(bias_type, {1}, least_of(bias_type)), least.view().slice(0, m, m + 1));
            copy(filled(bias_type, {1}, -kInf), hidden.view().slice(0, m, m + 1));
          }
          options.bias = least;
          const AttentionResult found = flash_attention(q, k, v, options, run);
          const FlashGradients to =
              flash_attention_backward(g, {}, q, k, v, found.out, found.lse, options, run);
          options.bias = hidden;
          const AttentionResult wanted = flash_attention(q, k, v, options, run);
          const FlashGradients wanted_to =
              flash_attention_backward(g, {}, q, k, v, wanted.out, wanted.lse, options, run);
          EXPECT_TRUE(same_bits(found.out, wanted.out)) << what;
          EXPECT_TRUE(same_bits(found.lse, wanted.lse)) << what;
          EXPECT_TRUE(same_bits(to.q, wanted_to.q)) << what;
          EXPECT_TRUE(same_bits(to.v, wanted_to.v)) << what;
          EXPECT_TRUE(same_bits(to.bias, wanted_to.bias)) << what;
        }
      }
    }
  }
}

TEST(FlashExtremes, InfiniteAndNaNBiasesKeepTheirMeaning) {
  const Array q = random_array(DType::f32, {1, 1, 2, 8}, 1),
              k = random_array(DType::f32, {1, 1, 20, 8}, 2);
  for (DType type : {DType::f64, DType::f32, DType::bf16, DType::f16}) {
    FlashOptions options;
    const Array hidden = filled(type, {1}, -kInf);
    options.bias = hidden;
    const AttentionResult none = flash_attention(q, k, k, options);
    EXPECT_EQ(none.lse.as<float>()[0], -kInf);
    EXPECT_EQ(none.out.as<float>()[0], 0);
    for (float bad : {kInf, kNaN}) {
      Array bias = filled(type, {20}, 0);
      copy(filled(type, {1}, bad), bias.view().slice(0, 7, 8));
      options.bias = bias;
      EXPECT_TRUE(std::isnan(flash_attention(q, k, k, options).out.as<float>()[0]));
    }
  }
}

}  // namespace
}  // namespace heed
