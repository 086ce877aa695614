// Identities of the operator (sheet 19, "How to verify"), and what a comparison with the cascade cannot
// show: bits across thread counts, NaN that must and must not arrive, messages.
#include <gtest/gtest.h>

#include <functional>
#include <limits>

#include "heed/flash_attention.h"
#include "heed/relative_attention.h"
#include "mechanisms/test_arrays.h"

namespace heed {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
const RelativeOptions kFull{.causal = false};

struct Shape {
  int64_t batch = 1, heads = 1, kv_heads = 1, queries = 1, keys = 1, dim = 1, value_dim = 1;
};

struct Inputs {
  Inputs(DType type, const Shape& s, int64_t distances)
      : q(random_array(type, {s.batch, s.heads, s.queries, s.dim}, 1)),
        k(random_array(type, {s.batch, s.kv_heads, s.keys, s.dim}, 2)),
        v(random_array(type, {s.batch, s.kv_heads, s.keys, s.value_dim}, 3)),
        rel_key(random_array(type, {2 * distances, s.heads, s.dim}, 4)),
        rel_bias(random_array(type, {2 * distances, s.heads}, 5)),
        content_bias(random_array(type, {s.heads, s.dim}, 6)) {}
  RelativeResult run(const RelativeOptions& options = {}, const RunOptions& on = {}) const {
    return relative_attention(q, k, v, rel_key, rel_bias, content_bias, options, on);
  }
  RelativeGradients gradients(const Tensor& grad_out, const RelativeOptions& options = {},
                              const RunOptions& on = {}) const {
    const RelativeResult result = run(options, on);
    return relative_attention_backward(grad_out, {}, q, k, v, rel_key, rel_bias, content_bias,
                                       result.out, result.lse, options, on);
  }
  void clear_tables() {
    for (Array* t : {&rel_key, &rel_bias, &content_bias}) {
      *t = Array::zeros(t->dtype(), t->shape());
    }
  }
  Array q, k, v, rel_key, rel_bias, content_bias;
};

RunOptions on(Isa isa, int threads = 1) {
  RunOptions run;
  run.isa = isa;
  run.threads = threads;
  return run;
}

Array filled(const Dims& shape, const std::function<double(int64_t)>& f) {
  Array array(DType::f64, shape);
  for (int64_t i = 0; i < array.count(); ++i) array.as<double>()[i] = f(i);
  return array;
}

TEST(Relative, WithoutTablesItIsSoftmax) {
  for (DType type : {DType::f64, DType::f32, DType::bf16}) {
    for (bool causal : {false, true}) {
      Inputs x(type, {2, 4, 2, 60, 90, 24, 16}, 90);
      x.clear_tables();
      const RelativeResult result = x.run({.causal = causal});
      const AttentionResult softmax = flash_attention(x.q, x.k, x.v, {.masks = {.causal = causal}});
      const double bound = type == DType::f64 ? 1e-14 : type == DType::f32 ? 1e-6 : 0.02;
      EXPECT_LT(largest_difference(result.out, softmax.out), bound);
      EXPECT_LT(largest_difference(result.lse, softmax.lse), type == DType::f64 ? 1e-13 : 1e-5);
    }
  }
}

TEST(Relative, LinearBiasesAreALiBi) {
  constexpr int64_t kHeads = 3, kDistances = 80;
  Inputs x(DType::f64, {2, kHeads, 3, 40, 70, 16, 8}, kDistances);
  x.clear_tables();
  const Array slopes = filled({kHeads}, [](int64_t h) { return 0.3 / double(h + 1); });
  x.rel_bias = filled(x.rel_bias.shape(), [&](int64_t i) {
    return -std::abs(double(i / kHeads - kDistances)) * slopes.as<double>()[i % kHeads] * 4;
  });
  for (bool causal : {false, true}) {
    const AttentionResult alibi = flash_attention(
        x.q, x.k, x.v, {.masks = {.causal = causal}, .alibi_slopes = slopes.view()});
    EXPECT_LT(largest_difference(x.run({.causal = causal}).out, alibi.out), 1e-13);
  }
}

TEST(Relative, AConstantBiasChangesNothing) {
  Inputs x(DType::f64, {1, 2, 2, 40, 70, 16, 8}, 70);
  const Array before = x.run(kFull).out;
  for (int64_t i = 0; i < x.rel_bias.count(); ++i) x.rel_bias.as<double>()[i] += 3.25;
  EXPECT_LT(largest_difference(x.run(kFull).out, before), 1e-13);
}

// The middle of a longer table is the table.
TEST(Relative, OnlyDistancesCount) {
  const Shape shape{1, 2, 2, 40, 70, 16, 8};
  for (bool causal : {false, true}) {
    const Inputs longer(DType::f32, shape, 95);
    Inputs middle(DType::f32, shape, 70);
    copy(longer.rel_key.view().slice(0, 25, 165), middle.rel_key);
    copy(longer.rel_bias.view().slice(0, 25, 165), middle.rel_bias);
    EXPECT_TRUE(same_bits(middle.run({.causal = causal}).out, longer.run({.causal = causal}).out));
  }
}

// A score that depends on sines and cosines of the distance is a product of longer queries and keys:
//   (q + v) . W_R r_n with r_n = [sin(w n), cos(w n)], n = i - j, and (a, c) = W_R^T (q + v) is
//   sin(w j) (c sin(w i) - a cos(w i)) + cos(w j) (a sin(w i) + c cos(w i))
TEST(Relative, SinusoidsAreTransformerXL) {
  constexpr int64_t kTokens = 60, kDim = 8, kWaves = 3, kWide = kDim + 2 * kWaves;
  Inputs x(DType::f64, {1, 1, 1, kTokens, kTokens, kDim, 5}, kTokens);
  const Array weight = random_array(DType::f64, {kDim, 2 * kWaves}, 7),
              v = random_array(DType::f64, {kDim}, 8);
  const auto wave = [](int64_t i) { return std::pow(10.0, -double(i) / kWaves); };
  const auto r = [&](int64_t n, int64_t i) {
    const double angle = double(n) * wave(i % kWaves);
    return i < kWaves ? std::sin(angle) : std::cos(angle);
  };
  x.rel_key = filled(x.rel_key.shape(), [&](int64_t at) {
    double sum = 0;
    for (int64_t i = 0; i < 2 * kWaves; ++i) {
      sum += weight.as<double>()[at % kDim * 2 * kWaves + i] * r(kTokens - at / kDim, i);
    }
    return sum;
  });
  x.rel_bias = filled(x.rel_bias.shape(), [&](int64_t row) {
    double sum = 0;
    for (int64_t e = 0; e < kDim; ++e) {
      sum += v.as<double>()[e] * x.rel_key.as<double>()[row * kDim + e];
    }
    return sum;
  });
  const Array q = filled({1, 1, kTokens, kWide}, [&](int64_t at) {
    const int64_t token = at / kWide, e = at % kWide;
    const double* row = x.q.as<double>() + token * kDim;
    if (e < kDim) return row[e] + x.content_bias.as<double>()[e];
    const auto projected = [&](int64_t i) {
      double sum = 0;
      for (int64_t c = 0; c < kDim; ++c) {
        sum += (row[c] + v.as<double>()[c]) * weight.as<double>()[c * 2 * kWaves + i];
      }
      return sum;
    };
    const int64_t i = (e - kDim) % kWaves;
    const double angle = double(token) * wave(i), a = projected(i), c = projected(kWaves + i);
    return e < kDim + kWaves ? c * std::sin(angle) - a * std::cos(angle)
                             : a * std::sin(angle) + c * std::cos(angle);
  });
  const Array k = filled({1, 1, kTokens, kWide}, [&](int64_t at) {
    const int64_t token = at / kWide, e = at % kWide;
    return e < kDim ? x.k.as<double>()[token * kDim + e] : r(token, e - kDim);
  });
  for (bool causal : {false, true}) {
    const AttentionResult want = flash_attention(
        q, k, x.v, {.masks = {.causal = causal}, .scale = 1 / std::sqrt(double(kDim))});
    const RelativeResult got = x.run({.causal = causal});
    EXPECT_LT(largest_difference(got.out, want.out), 1e-12);
    EXPECT_LT(largest_difference(got.lse, want.lse), 1e-12);
  }
}

TEST(Relative, ASegmentWithMemoryIsTheEndOfOnePass) {
  for (DType type : {DType::f64, DType::f32, DType::bf16}) {
    const Inputs x(type, {2, 4, 2, 150, 150, 32, 24}, 150);
    for (bool causal : {false, true}) {
      const RelativeResult all = x.run({.causal = causal});
      for (int64_t begin : {40, 143, 149}) {
        const auto last = [begin](const Tensor& t) { return t.slice(2, begin, 150); };
        const RelativeResult rows = relative_attention(last(x.q), x.k, x.v, x.rel_key, x.rel_bias,
                                                       x.content_bias, {.causal = causal});
        const double bound = type == DType::f64 ? 1e-13 : type == DType::f32 ? 1e-5 : 0.03;
        EXPECT_LT(largest_difference(rows.out, last(all.out)), bound);
        EXPECT_LT(largest_difference(rows.lse, last(all.lse)), bound);
      }
    }
  }
}

// Row `row` of head 0 becomes `value`; t [B,H,L,D].
void set_row(const Array& t, int64_t row, double value) {
  const Tensor to = t.view().select(0, 0).select(0, 0).select(0, row);
  copy(filled(to.shape(), [value](int64_t) { return value; }), to);
}

TEST(Relative, LaterTokensChangeNothing) {
  for (DType type : {DType::f32, DType::bf16}) {
    Inputs x(type, {1, 1, 1, 100, 100, 16, 8}, 100);
    const Array before = x.run().out;
    for (const Array* t : {&x.q, &x.k, &x.v}) set_row(*t, 61, 2);
    const Array after = x.run().out;
    const auto rows = [](const Array& t, int64_t begin, int64_t end) {
      return convert(t.view().slice(2, begin, end), DType::f32);
    };
    EXPECT_TRUE(same_bits(rows(before, 0, 61), rows(after, 0, 61)));
    EXPECT_GT(largest_difference(rows(before, 61, 100), rows(after, 61, 100)), 0.01);
  }
}

TEST(Relative, RowsOfTheTablesThatNoScoreReadsHaveNoGradient) {
  constexpr int64_t kQueries = 30, kKeys = 50, kDistances = 90;
  const Inputs x(DType::f32, {1, 1, 1, kQueries, kKeys, 12, 12}, kDistances);
  for (bool causal : {false, true}) {
    const RelativeGradients to = x.gradients(x.q, {.causal = causal});
    for (int64_t n = 0; n < 2 * kDistances; ++n) {
      const int64_t distance = n - kDistances;
      const bool read = distance > -kKeys && distance < (causal ? 1 : kQueries);
      EXPECT_EQ(to.rel_key.as<float>()[n * 12] != 0, read) << distance;
      EXPECT_EQ(to.rel_bias.as<float>()[n] != 0, read) << distance;
    }
  }
}

TEST(Relative, SameBitsForAnyThreadCount) {
  for (DType type : {DType::f64, DType::f32, DType::bf16, DType::f16}) {
    for (int64_t queries : {3, 150}) {
      const Inputs x(type, {1, 4, 2, queries, 1300, 24, 16}, 1300);
      const Array grad_out = random_array(type, {1, 4, queries, 16}, 9);
      for (Isa isa : available_isas()) {
        const RelativeResult one = x.run({}, on(isa));
        for (int threads : {2, 3, 7}) {
          const RelativeResult more = x.run({}, on(isa, threads));
          EXPECT_TRUE(same_bits(one.out, more.out)) << name_of(type) << " " << name_of(isa);
          EXPECT_TRUE(same_bits(one.lse, more.lse)) << name_of(type) << " " << name_of(isa);
        }
        const RelativeGradients a = x.gradients(grad_out, {}, on(isa, 3)),
                                b = x.gradients(grad_out, {}, on(isa, 3));
        EXPECT_TRUE(same_bits(a.q, b.q) && same_bits(a.k, b.k) && same_bits(a.v, b.v));
        EXPECT_TRUE(same_bits(a.rel_key, b.rel_key) && same_bits(a.rel_bias, b.rel_bias) &&
                    same_bits(a.content_bias, b.content_bias));
      }
    }
  }
}

TEST(Relative, NaNInAKeyOrARowOfTheTableArrivesWhereItIsSeen) {
  for (DType type : {DType::f32, DType::bf16, DType::f16}) {
    for (int64_t queries : {4, 90}) {
      for (bool in_table : {false, true}) {
        // Key 30, or the distance from which a query sees key 30 back.
        Inputs x(type, {1, 1, 1, queries, 90, 20, 20}, 90);
        constexpr int64_t kDistance = 88;
        if (in_table) {
          const Tensor row = x.rel_key.view().select(1, 0).select(0, 90 - kDistance);
          copy(filled(row.shape(), [](int64_t) { return kNaN; }), row);
        } else {
          set_row(x.k, 30, kNaN);
        }
        const Array grad_out = random_array(type, {1, 1, queries, 20}, 9);
        for (Isa isa : available_isas()) {
          const Array out = convert(x.run({}, on(isa)).out, DType::f64),
                      dq = convert(x.gradients(grad_out, {}, on(isa)).q, DType::f64);
          for (int64_t i = 0; i < queries; ++i) {
            const int64_t position = i + 90 - queries;
            const bool seen = position >= (in_table ? kDistance : 30);
            for (int64_t f = 0; f < 20; ++f) {
              EXPECT_EQ(std::isnan(out.as<double>()[i * 20 + f]), seen)
                  << name_of(type) << " " << name_of(isa) << " row " << i;
              EXPECT_EQ(std::isnan(dq.as<double>()[i * 20 + f]), seen)
                  << name_of(type) << " " << name_of(isa) << " row " << i;
            }
          }
        }
      }
    }
  }
}

TEST(Relative, ANaNQueryStaysWithWhatItSees) {
  for (DType type : {DType::f32, DType::bf16}) {
    for (Isa isa : available_isas()) {
      Inputs x(type, {1, 1, 1, 60, 60, 20, 20}, 60);
      set_row(x.q, 17, kNaN);
      const RelativeGradients to = x.gradients(random_array(type, {1, 1, 60, 20}, 9), {}, on(isa));
      const Array dk = convert(to.k, DType::f64), dq = convert(to.q, DType::f64),
                  table = convert(to.rel_key, DType::f64), bias = convert(to.rel_bias, DType::f64);
      for (int64_t i = 0; i < 60; ++i) {
        EXPECT_EQ(std::isnan(dq.as<double>()[i * 20]), i == 17);
        EXPECT_EQ(std::isnan(dk.as<double>()[i * 20]), i <= 17);
      }
      for (int64_t n = 0; n < 120; ++n) {
        const bool seen = n >= 60 - 17 && n <= 60;
        EXPECT_EQ(std::isnan(table.as<double>()[n * 20]), seen) << n;
        EXPECT_EQ(std::isnan(bias.as<double>()[n]), seen) << n;
      }
    }
  }
}

TEST(Relative, TensorsWithoutElements) {
  for (const Shape& s : {Shape{1, 2, 2, 0, 5, 8, 8}, Shape{1, 2, 2, 5, 0, 8, 8},
                         Shape{0, 2, 2, 5, 5, 8, 8}, Shape{1, 0, 0, 5, 5, 8, 8}}) {
    for (bool causal : {false, true}) {
      const Inputs x(DType::f32, s, 5);
      const RelativeResult result = x.run({.causal = causal});
      const RelativeGradients to = x.gradients(result.out, {.causal = causal});
      EXPECT_EQ(to_string(to.rel_key.shape()), to_string(x.rel_key.shape()));
      for (const Array* t :
           {&result.out, &to.q, &to.k, &to.v, &to.rel_key, &to.rel_bias, &to.content_bias}) {
        for (int64_t i = 0; i < t->count(); ++i) EXPECT_EQ(t->as<float>()[i], 0);
      }
    }
  }
  // Without keys no table is needed.
  EXPECT_EQ(Inputs(DType::f32, {1, 2, 2, 5, 0, 8, 8}, 0).run().out.count(), 80);
}

TEST(Relative, ErrorsNameTheArgument) {
  const Inputs x(DType::f32, {2, 4, 2, 3, 9, 8, 8}, 9);
  const auto with = [&](const Tensor& rel_key, const Tensor& rel_bias, const Tensor& content_bias,
                        const RelativeOptions& options = {}) {
    return error_of(
        [&] { relative_attention(x.q, x.k, x.v, rel_key, rel_bias, content_bias, options); });
  };
  const auto says = [](const std::string& message, std::initializer_list<const char*> parts) {
    for (const char* part : parts) {
      EXPECT_NE(message.find(part), std::string::npos) << message << " lacks " << part;
    }
  };
  const auto f32 = [](const Dims& shape) { return random_array(DType::f32, shape, 1); };
  const Array &key = x.rel_key, &bias = x.rel_bias, &content = x.content_bias;
  says(with({}, bias, content), {"relative_attention", "rel_key is missing", "[2P,4,8]"});
  says(with(f32({17, 4, 8}), bias, content), {"rel_key [17,4,8]", "[2P,4,8] is needed"});
  says(with(f32({18, 2, 8}), bias, content), {"rel_key [18,2,8]", "[2P,4,8] is needed"});
  says(with(f32({18, 32}), bias, content), {"rel_key [18,32]", "[2P,4,8] is needed"});
  says(with(f32({14, 4, 8}), bias, content), {"P = 7", "P >= 8", "3 queries and 9 keys"});
  says(with(convert(key, DType::bf16), bias, content),
       {"rel_key", "bfloat16", "float32 is needed"});
  says(with(key, {}, content), {"rel_bias is missing", "[18,4]"});
  says(with(key, f32({16, 4}), content), {"rel_bias [16,4]", "[18,4] of type float32 is needed"});
  says(with(key, bias, {}), {"content_bias is missing", "[4,8]"});
  says(with(key, bias, f32({8, 4})), {"content_bias [8,4]", "[4,8] of type float32 is needed"});
  says(with(key, bias, content, {.scale = NAN}), {"scale is nan"});
  const Inputs wide(DType::f32, {1, 1, 1, 12, 9, 8, 8}, 11);
  says(error_of([&] { wide.run(kFull); }), {"P = 11", "P >= 12", "without the causal mask"});
  EXPECT_EQ(error_of([&] { wide.run(); }), "");
  const RelativeResult result = x.run();
  says(error_of([&] {
         relative_attention_backward(result.out, {}, x.q, x.k, x.v, key, bias, content, result.out,
                                     {});
       }),
       {"lse is missing"});
}

}  // namespace
}  // namespace heed
