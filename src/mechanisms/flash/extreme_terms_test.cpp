// Finite biases, sinks, slopes and softcaps near the ends of their types.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "engine/operands.h"
#include "heed/heed.h"
#include "mechanisms/test_arrays.h"

namespace heed {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

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

TEST(Flash, ExtremeFiniteBiasesStayFinite) {
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
      const Array slopes = random_array(wide_type(type), {2}, 5);
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

TEST(Flash, InfiniteAndNaNBiasesKeepTheirMeaning) {
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

TEST(Flash, SoftcapsBeyondFloat32StillCapOrLeaveScores) {
  for (int64_t queries : {1, 40}) {
    const Array q = random_array(DType::f32, {1, 2, queries, 24}, 1);
    const Array k = random_array(DType::f32, {1, 2, 70, 24}, 2);
    const Array v = random_array(DType::f32, {1, 2, 70, 8}, 3);
    const Array plain = flash_attention(q, k, v).out;
    const Array mean = flash_attention(filled(DType::f32, {1, 2, queries, 24}, 0), k, v).out;
    for (Isa isa : available_isas()) {
      RunOptions run;
      run.isa = isa;
      for (double softcap : {1e-300, 1e-45, 1e39, 1e300}) {
        FlashOptions options;
        options.softcap = softcap;
        const AttentionResult r = flash_attention(q, k, v, options, run);
        EXPECT_LT(largest_difference(r.out, softcap < 1 ? mean : plain), 1e-5) << softcap;
        const FlashGradients to = flash_attention_backward(v.view().slice(2, 0, queries), {}, q, k,
                                                           v, r.out, r.lse, options, run);
        for (const Array* x : {&to.q, &to.k, &to.v}) EXPECT_TRUE(finite(*x)) << softcap;
      }
    }
  }
}

// The largest finite number of a type, and one that a factor of log2(e) alone carries beyond it.
std::vector<double> extremes(DType type) {
  const double most = type == DType::f64    ? std::numeric_limits<double>::max()
                      : type == DType::bf16 ? 0x1.fep127
                                            : std::numeric_limits<float>::max();
  return {1e30, 0.7 * most, most};
}

TEST(Flash, ExtremeFiniteSinksTakeAllOrNothing) {
  for (DType type : {DType::f64, DType::f32, DType::bf16}) {
    for (int64_t queries : {1, 5, 40}) {
      const Array q = random_array(type, {1, 2, queries, 24}, 1),
                  k = random_array(type, {1, 2, 70, 24}, 2);
      const Array v = random_array(type, {1, 2, 70, 8}, 3),
                  g = random_array(type, {1, 2, queries, 8}, 4);
      const Array lse_gradient = filled(wide_type(type), {1, 2, queries}, 1);
      for (Isa isa : available_isas()) {
        RunOptions run;
        run.isa = isa;
        const AttentionResult without = flash_attention(q, k, v, {}, run);
        for (double size : extremes(type)) {
          const std::string what = std::string(name_of(type)) + " " + std::to_string(queries) +
                                   " " + name_of(isa) + " " + std::to_string(size);
          FlashOptions options;
          const Array most = filled(type, {2}, size), least = filled(type, {2}, -size);
          options.sink = most;
          const AttentionResult all = flash_attention(q, k, v, options, run);
          FlashGradients to =
              flash_attention_backward(g, lse_gradient, q, k, v, all.out, all.lse, options, run);
          for (const Array* x :
               std::initializer_list<const Array*>{&all.out, &to.q, &to.k, &to.v}) {
            EXPECT_EQ(largest_difference(*x, filled(x->dtype(), x->shape(), 0)), 0) << what;
          }
          EXPECT_TRUE(finite(all.lse)) << what;
          EXPECT_EQ(largest_difference(to.sink, filled(type, {2}, queries)), 0) << what;

          options.sink = least;
          const AttentionResult none = flash_attention(q, k, v, options, run);
          to = flash_attention_backward(g, lse_gradient, q, k, v, none.out, none.lse, options, run);
          EXPECT_TRUE(same_bits(none.out, without.out)) << what;
          EXPECT_TRUE(same_bits(none.lse, without.lse)) << what;
          EXPECT_EQ(largest_difference(to.sink, filled(type, {2}, 0)), 0) << what;
        }
        if (queries > 16) continue;
        const Array lengths(DType::i64, {1});
        *lengths.as<int64_t>() = 70;
        DecodeOptions decode;
        const Array most = filled(type, {2}, extremes(type).back());
        decode.sink = most;
        const AttentionResult all = decode_attention(q, k, v, lengths, decode, run);
        EXPECT_EQ(largest_difference(all.out, filled(type, all.out.shape(), 0)), 0);
      }
    }
  }
}

TEST(Flash, AHiddenSinkOfRowsWithoutKeysHasNoGradient) {
  const Array q = random_array(DType::f32, {1, 2, 3, 8}, 1),
              k = random_array(DType::f32, {1, 2, 0, 8}, 2);
  const Array sink = filled(DType::f32, {2}, -kInf);
  FlashOptions options;
  options.sink = sink;
  const AttentionResult r = flash_attention(q, k, k, options);
  const FlashGradients to =
      flash_attention_backward(q, {}, q, k, k, r.out, r.lse, options, RunOptions());
  EXPECT_EQ(largest_difference(to.sink, filled(DType::f32, {2}, 0)), 0);
}

// The key of each query that wins when scores fall, or rise, with the distance. Keys are even in number:
// none ties with another.
int64_t winner(int64_t query, int64_t queries, int64_t keys, bool falls) {
  const int64_t position = query + keys - queries;
  return falls ? position : position >= keys / 2 ? 0 : keys - 1;
}

TEST(Flash, ExtremeFiniteSlopesChooseTheNearestOrFarthestKey) {
  constexpr int64_t kKeys = 70;
  for (DType type : {DType::f64, DType::f32, DType::bf16}) {
    const DType slope_type = wide_type(type);
    for (int64_t queries : {1, 5, 70}) {
      const Array q = random_array(type, {1, 2, queries, 24}, 1),
                  k = random_array(type, {1, 2, kKeys, 24}, 2);
      const Array v = random_array(type, {1, 2, kKeys, 8}, 3),
                  g = random_array(type, {1, 2, queries, 8}, 4);
      for (double size : extremes(slope_type)) {
        const Array slopes(DType::f64, {2});
        slopes.as<double>()[0] = size;
        slopes.as<double>()[1] = -size;
        const Array rounded = convert(slopes, slope_type);
        const Array want = filled(DType::f64, {1, 2, queries, 8}, 0);
        const Array want_v = filled(DType::f64, {1, 2, kKeys, 8}, 0);
        const Array wide_v = convert(v, DType::f64), wide_g = convert(g, DType::f64);
        for (int64_t h = 0; h < 2; ++h) {
          for (int64_t i = 0; i < queries; ++i) {
            const int64_t m = winner(i, queries, kKeys, h == 0);
            for (int64_t f = 0; f < 8; ++f) {
              want.as<double>()[(h * queries + i) * 8 + f] =
                  wide_v.as<double>()[(h * kKeys + m) * 8 + f];
              want_v.as<double>()[(h * kKeys + m) * 8 + f] +=
                  wide_g.as<double>()[(h * queries + i) * 8 + f];
            }
          }
        }
        for (Isa isa : available_isas()) {
          RunOptions run;
          run.isa = isa;
          const std::string what = std::string(name_of(type)) + " " + std::to_string(queries) +
                                   " " + name_of(isa) + " " + std::to_string(size);
          FlashOptions options;
          options.alibi_slopes = rounded;
          const AttentionResult r = flash_attention(q, k, v, options, run);
          EXPECT_LT(largest_difference(r.out, want), type == DType::bf16 ? 2e-2 : 1e-6) << what;
          EXPECT_TRUE(finite(r.lse)) << what;
          const FlashGradients to =
              flash_attention_backward(g, {}, q, k, v, r.out, r.lse, options, run);
          EXPECT_LT(largest_difference(to.v, want_v), type == DType::bf16 ? 0.1 : 1e-5) << what;
          for (const Array* x : {&to.q, &to.k, &to.alibi_slopes}) {
            EXPECT_LT(largest_difference(*x, filled(x->dtype(), x->shape(), 0)),
                      type == DType::f64   ? 1e-9
                      : type == DType::f32 ? 1e-2
                                           : 2)
                << what;
          }
        }
      }
    }
  }
}

// Beyond what float32 holds. Queries of 0 have scores of 0 whatever their scale.
TEST(Flash, ScalesBeyondFloat32) {
  const Array q = filled(DType::f32, {1, 1, 40, 8}, 0);
  const Array k = random_array(DType::f32, {1, 1, 40, 8}, 1);
  const Array v = random_array(DType::f32, {1, 1, 40, 8}, 2);
  const Array bias = filled(DType::f32, {40, 40}, 0);
  FlashOptions options;
  const Array usual = flash_attention(q, k, v, options).out;
  for (double scale : {1e39, -1e300}) {
    for (double softcap : {0.0, 2.0}) {
      for (const Tensor& added : {Tensor(), bias.view()}) {
        options.scale = scale;
        options.softcap = softcap;
        options.bias = added;
        const AttentionResult result = flash_attention(q, k, v, options);
        EXPECT_LE(largest_difference(result.out, usual), 1e-6) << scale << " " << softcap;
      }
    }
  }
}

}  // namespace
}  // namespace heed
