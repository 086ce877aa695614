// Identities of the operator (sheet 04, "How to verify"), and what a comparison with the cascade cannot
// show: bits across thread counts, NaN that must and must not arrive, messages.
#include <gtest/gtest.h>

#include <limits>
#include <vector>

#include "heed/flash_attention.h"
#include "heed/local_linear_attention.h"
#include "heed/parallax_attention.h"
#include "mechanisms/test_arrays.h"

namespace heed {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

struct Inputs {
  Inputs(DType type, Dims query, int64_t kv_heads, int64_t keys, int64_t value_dim)
      : q(random_array(type, query, 1)),
        r(random_array(type, query, 2)),
        k(random_array(type, {query[0], kv_heads, keys, query[3]}, 3)),
        v(random_array(type, {query[0], kv_heads, keys, value_dim}, 4)) {}
  ParallaxResult run(const ParallaxOptions& options = {}, const RunOptions& run = {}) const {
    return parallax_attention(q, r, k, v, options, run);
  }
  ParallaxGradients gradients(const Tensor& grad_out, const ParallaxOptions& options = {},
                              const RunOptions& on = {}) const {
    const ParallaxResult result = run(options, on);
    return parallax_attention_backward(grad_out, {}, q, r, k, v, result.out, result.statistics(),
                                       options, on);
  }
  Array q, r, k, v;
};

RunOptions on(Isa isa, int threads = 1) {
  RunOptions run;
  run.isa = isa;
  run.threads = threads;
  return run;
}

// f(i) for every element of a float64 array.
template <class F>
Array filled(const Dims& shape, const F& f) {
  Array array(DType::f64, shape);
  for (int64_t i = 0; i < array.count(); ++i) array.as<double>()[i] = f(i);
  return array;
}

TEST(Parallax, WithoutProbeItIsSoftmax) {
  for (DType type : {DType::f64, DType::f32, DType::bf16}) {
    for (int64_t queries : {2, 60}) {
      Inputs x(type, {2, 4, queries, 24}, 2, 90, 16);
      x.r = Array::zeros(type, x.q.shape());
      const ParallaxOptions options{.masks = {.causal = true}};
      const ParallaxResult result = x.run(options);
      const AttentionResult softmax = flash_attention(x.q, x.k, x.v, {.masks = {.causal = true}});
      const double bound = type == DType::f64 ? 1e-14 : type == DType::f32 ? 1e-6 : 0.02;
      EXPECT_LT(largest_difference(result.out, softmax.out), bound);
      EXPECT_LT(largest_difference(result.v_mean, softmax.out), bound);
      EXPECT_LT(largest_difference(result.lse, softmax.lse), bound);
      EXPECT_EQ(largest_difference(result.t_mean, Array::zeros(DType::f32, result.t_mean.shape())),
                0);
      // A softmax model can start from here: the probe's gradient is not zero.
      const ParallaxGradients to = x.gradients(softmax.out, options);
      EXPECT_GT(largest_difference(to.r, x.r), 0.1);
    }
  }
}

TEST(Parallax, ConstantValuesPassThroughAnyProbe) {
  for (int64_t queries : {2, 60}) {
    Inputs x(DType::f64, {1, 2, queries, 24}, 1, 90, 5);
    for (int64_t i = 0; i < x.v.count(); ++i) {
      x.v.as<double>()[i] = static_cast<double>(i % 5);
    }
    const Array want = filled({1, 2, queries, 5}, [](int64_t i) { return double(i % 5); });
    EXPECT_LT(largest_difference(x.run().out, want), 1e-13);
  }
}

TEST(Parallax, AConstantAddedToAllKeysChangesNothing) {
  const Inputs x(DType::f64, {1, 2, 40, 6}, 2, 70, 5);
  Inputs moved(DType::f64, {1, 2, 40, 6}, 2, 70, 5);
  for (int64_t i = 0; i < moved.k.count(); ++i) {
    moved.k.as<double>()[i] += 0.5 + static_cast<double>(i % 6);
  }
  EXPECT_LT(largest_difference(x.run().out, moved.run().out), 1e-13);
  EXPECT_LT(largest_difference(x.run().v_mean, moved.run().v_mean), 1e-13);
  // So gradients of all keys together cancel: those of scores and of t sum to 0 in every row.
  const ParallaxGradients to = x.gradients(x.q.view().slice(3, 0, 5));
  for (int64_t h = 0; h < 2; ++h) {
    for (int64_t e = 0; e < 6; ++e) {
      double sum = 0;
      for (int64_t m = 0; m < 70; ++m) sum += to.k.as<double>()[(h * 70 + m) * 6 + e];
      EXPECT_NEAR(sum, 0, 1e-12);
    }
  }
}

// However large t is: it is taken relative to its mean over the first keys.
TEST(Parallax, OneVisibleKeyGivesItsValue) {
  for (DType type : {DType::f64, DType::f32, DType::bf16, DType::f16}) {
    for (int64_t queries : {1, 50}) {
      const Inputs x(type, {1, 3, queries, 64}, 3, queries, 8);
      for (Isa isa : available_isas()) {
        const ParallaxResult result = x.run({.masks = {.window = {0, 0}}}, on(isa));
        if (type == DType::f64) {  // the weight of the one key is 1 to a rounding
          EXPECT_LT(largest_difference(result.out, x.v), 1e-14) << name_of(isa);
        } else {
          EXPECT_TRUE(same_bits(result.out, x.v)) << name_of(type) << " " << name_of(isa);
        }
      }
    }
  }
}

TEST(Parallax, TheResultIsAffineInTheProbe) {
  const Inputs x(DType::f64, {2, 2, 40, 12}, 2, 70, 5);
  Inputs twice(DType::f64, {2, 2, 40, 12}, 2, 70, 5);
  for (int64_t i = 0; i < twice.r.count(); ++i) twice.r.as<double>()[i] *= 2;
  const ParallaxResult one = x.run(), two = twice.run();
  const Array want = filled(one.out.shape(), [&](int64_t i) {
    return 2 * one.out.as<double>()[i] - one.v_mean.as<double>()[i];
  });
  EXPECT_LT(largest_difference(two.out, want), 1e-12);
}

// Solves (A + ridge I) x = b in place of b, A symmetric and positive semidefinite.
void solve(std::vector<double> a, double ridge, std::vector<double>& b) {
  const size_t n = b.size();
  for (size_t i = 0; i < n; ++i) a[i * n + i] += ridge;
  for (size_t s = 0; s < n; ++s) {
    for (size_t i = 0; i < n; ++i) {
      if (i == s) continue;
      const double factor = a[i * n + s] / a[s * n + s];
      for (size_t j = 0; j < n; ++j) a[i * n + j] -= factor * a[s * n + j];
      b[i] -= factor * b[s];
    }
  }
  for (size_t i = 0; i < n; ++i) b[i] /= a[i * n + i];
}

TEST(Parallax, TheOracleProbeIsLocalLinearAttention) {
  constexpr int64_t kDim = 4, kQueries = 30;
  constexpr double kRidge = 0.3;
  Inputs x(DType::f64, {1, 2, kQueries, kDim}, 2, 50, 7);
  const ParallaxOptions options{.masks = {.causal = true}};
  // With the keys as values and unit probes the result is the mean of the keys less a column of their
  // covariance.
  const auto less_column = [&](int64_t column) {
    const Array probe =
        filled(x.q.shape(), [&](int64_t i) { return i % kDim == column ? 1.0 : 0.0; });
    return parallax_attention(x.q, probe, x.k, x.k, options);
  };
  std::vector<ParallaxResult> columns;
  for (int64_t j = 0; j < kDim; ++j) columns.push_back(less_column(j));
  for (int64_t row = 0; row < 2 * kQueries; ++row) {
    std::vector<double> covariance(kDim * kDim), probe(kDim);
    for (int64_t i = 0; i < kDim; ++i) {
      const double mean = columns[0].v_mean.as<double>()[row * kDim + i];
      probe[i] = mean - x.q.as<double>()[row * kDim + i];
      for (int64_t j = 0; j < kDim; ++j) {
        covariance[i * kDim + j] = mean - columns[j].out.as<double>()[row * kDim + i];
      }
    }
    solve(covariance, kRidge, probe);
    for (int64_t i = 0; i < kDim; ++i) x.r.as<double>()[row * kDim + i] = probe[i];
  }
  const Array exact = local_linear_attention(x.q, x.k, x.v, {.ridge = kRidge, .causal = true});
  EXPECT_LT(largest_difference(x.run(options).out, exact), 1e-11);
}

TEST(Parallax, DecodedRowsAreTheLastRowsOfThePrefill) {
  for (DType type : {DType::f64, DType::f32, DType::bf16}) {
    const Inputs x(type, {1, 4, 120, 32}, 2, 2400, 24);
    const ParallaxOptions options{.masks = {.causal = true, .window = {1700, {}}}};
    const ParallaxResult all = x.run(options);
    const auto last = [](const Tensor& t) { return t.slice(2, 117, 120); };
    const ParallaxResult rows = parallax_attention(last(x.q), last(x.r), x.k, x.v, options);
    const double bound = type == DType::f64 ? 1e-13 : type == DType::f32 ? 1e-5 : 0.04;
    EXPECT_LT(largest_difference(rows.out, last(all.out)), bound);
    EXPECT_LT(largest_difference(rows.v_mean, last(all.v_mean)), bound);
    EXPECT_LT(largest_difference(rows.t_mean, last(all.t_mean)), bound);
    EXPECT_LT(largest_difference(rows.lse, last(all.lse)), bound);
  }
}

TEST(Parallax, SameBitsForAnyThreadCount) {
  for (DType type : {DType::f64, DType::f32, DType::bf16, DType::f16}) {
    for (int64_t queries : {3, 150}) {
      const Inputs x(type, {1, 4, queries, 40}, 2, 1300, 24);
      const ParallaxOptions options{.masks = {.causal = true}};
      const Array grad_out = random_array(type, {1, 4, queries, 24}, 5);
      for (Isa isa : available_isas()) {
        const ParallaxResult one = x.run(options, on(isa));
        for (int threads : {2, 3, 7}) {
          const ParallaxResult more = x.run(options, on(isa, threads));
          EXPECT_TRUE(same_bits(one.out, more.out)) << name_of(type) << " " << name_of(isa);
          EXPECT_TRUE(same_bits(one.v_mean, more.v_mean)) << name_of(type) << " " << name_of(isa);
          EXPECT_TRUE(same_bits(one.t_mean, more.t_mean)) << name_of(type) << " " << name_of(isa);
        }
        const ParallaxGradients a = x.gradients(grad_out, options, on(isa, 3)),
                                b = x.gradients(grad_out, options, on(isa, 3));
        EXPECT_TRUE(same_bits(a.q, b.q) && same_bits(a.r, b.r) && same_bits(a.k, b.k) &&
                    same_bits(a.v, b.v));
      }
    }
  }
}

// Row `row` of head 0 becomes `value`.
void set_row(const Array& t, int64_t row, float value) {
  const Tensor to = t.view().select(0, 0).select(0, 0).select(0, row);
  const Array from = filled(to.shape(), [value](int64_t) { return double{value}; });
  copy(from, to);
}

TEST(Parallax, NaNBehindTheMaskNeverArrivesAndBeforeItAlwaysDoes) {
  for (DType type : {DType::f32, DType::bf16, DType::f16}) {
    for (int64_t queries : {4, 90}) {
      for (int64_t bad : {30, 89}) {
        for (bool in_values : {false, true}) {
          Inputs x(type, {1, 1, queries, 20}, 1, 90, 20);
          set_row(in_values ? x.v : x.k, bad, in_values ? kInf : kNaN);
          const Array grad_out = random_array(type, x.q.shape(), 5);
          for (Isa isa : available_isas()) {
            const ParallaxOptions options{.masks = {.causal = true}};
            const Array out = convert(x.run(options, on(isa)).out, DType::f64);
            const Array dr = convert(x.gradients(grad_out, options, on(isa)).r, DType::f64);
            for (int64_t i = 0; i < queries; ++i) {
              const bool visible = bad <= i + 90 - queries;
              for (int64_t f = 0; f < 20; ++f) {
                EXPECT_EQ(!std::isfinite(out.as<double>()[i * 20 + f]), visible)
                    << name_of(type) << " " << name_of(isa) << " row " << i << " key " << bad;
                if (visible) continue;
                EXPECT_TRUE(std::isfinite(dr.as<double>()[i * 20 + f]));
              }
            }
          }
        }
      }
    }
  }
}

TEST(Parallax, ANaNProbeStaysInItsRow) {
  for (DType type : {DType::f32, DType::bf16}) {
    for (Isa isa : available_isas()) {
      Inputs x(type, {1, 1, 60, 20}, 1, 60, 20);
      set_row(x.r, 17, kNaN);
      const ParallaxOptions options{.masks = {.causal = true}};
      const ParallaxGradients to =
          x.gradients(random_array(type, x.q.shape(), 5), options, on(isa));
      const Array out = convert(x.run(options, on(isa)).out, DType::f64),
                  dq = convert(to.q, DType::f64), dk = convert(to.k, DType::f64);
      for (int64_t i = 0; i < 60; ++i) {
        EXPECT_EQ(std::isnan(out.as<double>()[i * 20]), i == 17);
        EXPECT_EQ(std::isnan(dq.as<double>()[i * 20]), i == 17);
        EXPECT_EQ(std::isnan(dk.as<double>()[i * 20]), i <= 17);
      }
    }
  }
}

TEST(Parallax, MemoryBehindLengthsIsNeverRead) {
  for (Isa isa : available_isas()) {
    for (int64_t queries : {2, 50}) {
      Inputs x(DType::f32, {2, 2, queries, 16}, 1, 70, 16);
      int32_t lengths[] = {41, 0};
      const ParallaxOptions options{.masks = {.lengths = Tensor(lengths, DType::i32, {2})}};
      const Array grad_out = random_array(DType::f32, x.q.shape(), 5);
      const ParallaxResult clean = x.run(options, on(isa));
      const ParallaxGradients clean_to = x.gradients(grad_out, options, on(isa));
      for (int64_t row = 0; row < 2 * 70; ++row) {
        if (row % 70 < lengths[row / 70]) continue;
        std::fill_n(x.k.as<float>() + row * 16, 16, kNaN);
        std::fill_n(x.v.as<float>() + row * 16, 16, kNaN);
      }
      const ParallaxResult stale = x.run(options, on(isa));
      const ParallaxGradients stale_to = x.gradients(grad_out, options, on(isa));
      EXPECT_TRUE(same_bits(clean.out, stale.out));
      EXPECT_TRUE(same_bits(clean_to.q, stale_to.q) && same_bits(clean_to.r, stale_to.r));
      EXPECT_TRUE(same_bits(clean_to.k, stale_to.k) && same_bits(clean_to.v, stale_to.v));
      for (int64_t i = 2 * queries; i < 4 * queries; ++i) {  // the empty sequence
        EXPECT_EQ(stale.lse.as<float>()[i], -kInf);
        EXPECT_EQ(stale.t_mean.as<float>()[i], 0);
        EXPECT_EQ(stale.out.as<float>()[i * 16], 0);
        EXPECT_EQ(stale_to.r.as<float>()[i * 16], 0);
      }
    }
  }
}

TEST(Parallax, StatisticsThatAreNotWantedAreNotWritten) {
  const Inputs x(DType::f32, {1, 4, 30, 16}, 2, 40, 8);
  const Array out(DType::f32, {1, 4, 30, 8});
  parallax_attention(x.q, x.r, x.k, x.v, out, {});
  EXPECT_TRUE(same_bits(out, x.run().out));
}

TEST(Parallax, TensorsWithoutElements) {
  const Inputs none(DType::f32, {1, 2, 0, 8}, 2, 5, 8), no_keys(DType::f32, {1, 2, 5, 8}, 2, 0, 8),
      no_batch(DType::f32, {0, 2, 5, 8}, 2, 5, 8), no_heads(DType::f32, {1, 0, 5, 8}, 0, 5, 8);
  for (const Inputs* x : {&none, &no_keys, &no_batch, &no_heads}) {
    const ParallaxResult result = x->run();
    EXPECT_EQ(to_string(result.out.shape()), to_string(x->q.shape()));
    const ParallaxGradients to = x->gradients(result.out);
    for (const Array* t : {&result.out, &result.v_mean, &to.q, &to.r, &to.k, &to.v}) {
      for (int64_t i = 0; i < t->count(); ++i) EXPECT_EQ(t->as<float>()[i], 0);
    }
  }
}

TEST(Parallax, ErrorsNameTheArgument) {
  const Inputs x(DType::f32, {2, 4, 3, 8}, 2, 9, 8);
  const auto says = [](const std::string& message, std::initializer_list<const char*> parts) {
    for (const char* part : parts) {
      EXPECT_NE(message.find(part), std::string::npos) << message << " lacks " << part;
    }
  };
  const Array short_r = random_array(DType::f32, {2, 4, 2, 8}, 1),
              half_r = random_array(DType::bf16, {2, 4, 3, 8}, 1),
              wide = random_array(DType::f32, {2, 4, 3, 16}, 1);
  const auto with_probe = [&](const Tensor& r) {
    return error_of([&] { parallax_attention(x.q, r, x.k, x.v); });
  };
  says(with_probe({}), {"parallax_attention", "r is missing"});
  says(with_probe(short_r), {"r [2,4,2,8]", "[2,4,3,8] float32 is needed"});
  says(with_probe(half_r), {"r [2,4,3,8] bfloat16", "float32 is needed"});
  says(with_probe(Tensor(wide.view().data(), DType::f32, {2, 4, 3, 8}, {192, 48, 16, 2})),
       {"r has stride 2", "unit stride"});
  says(error_of([&] { parallax_attention(x.q, x.r, x.q, x.v); }),
       {"v has number of heads 2 but k has 4"});
  says(error_of([&] {
         parallax_attention(x.q, x.r, x.k, x.v, {.scale = std::numeric_limits<double>::infinity()});
       }),
       {"scale is inf"});
  const ParallaxResult result = x.run();
  const ParallaxStatistics good = result.statistics();
  const auto backward = [&](const ParallaxStatistics& statistics) {
    return error_of([&] {
      parallax_attention_backward(result.out, {}, x.q, x.r, x.k, x.v, result.out, statistics);
    });
  };
  says(backward({{}, good.t_mean, good.lse}), {"v_mean is missing"});
  says(backward({good.v_mean, {}, good.lse}), {"t_mean is missing"});
  says(backward({good.v_mean, good.t_mean, {}}), {"lse is missing"});
  says(backward({half_r, good.t_mean, good.lse}), {"v_mean", "[2,4,3,8] float32"});
  says(backward({good.v_mean, good.v_mean, good.lse}), {"t_mean", "[2,4,3] float32"});
  says(error_of(
           [&] { parallax_attention_backward(wide, {}, x.q, x.r, x.k, x.v, result.out, good); }),
       {"grad_out", "[2,4,3,8]"});
}

}  // namespace
}  // namespace heed
