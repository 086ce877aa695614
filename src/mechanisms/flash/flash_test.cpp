// What a comparison with the cascade cannot show: bits across thread counts, NaN that must and must not
// arrive, extreme scores, merging, and messages.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <tuple>
#include <vector>

#include "heed/heed.h"

namespace heed {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

Array random(DType type, const Dims& shape, uint32_t seed, double scale = 1) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> normal(0, scale);
  Array wide(DType::f64, shape);
  for (int64_t i = 0; i < wide.count(); ++i) wide.as<double>()[i] = normal(generator);
  return convert(wide, type);
}

bool same_bits(const Tensor& a, const Tensor& b) {
  return a.shape() == b.shape() && a.dtype() == b.dtype() &&
         std::memcmp(a.data(), b.data(), static_cast<size_t>(a.count()) * size_of(a.dtype())) == 0;
}

double largest_difference(const Tensor& a, const Tensor& b) {
  const Array x = convert(a, DType::f64), y = convert(b, DType::f64);
  double most = 0;
  for (int64_t i = 0; i < x.count(); ++i) {
    const double d = std::abs(x.as<double>()[i] - y.as<double>()[i]);
    if (!(d <= most)) most = d;  // NaN stays
  }
  return most;
}

void set(const Tensor& t, float value) {
  Array one(DType::f32, {1});
  *one.as<float>() = value;
  for (int64_t i = 0; i < t.size(0); ++i) copy(one, t.slice(0, i, i + 1));
}

TEST(Flash, SameBitsForAnyThreadCount) {
  for (DType type : {DType::f64, DType::f32, DType::bf16, DType::f16}) {
    for (const auto& [heads, queries] : {std::pair<int64_t, int64_t>{1, 700}, {6, 130}, {2, 3}}) {
      for (Isa isa : available_isas()) {
        const int64_t kv = heads > 1 ? heads / 2 : 1;
        Array q = random(type, {1, heads, queries, 40}, 1), k = random(type, {1, kv, 2500, 40}, 2);
        Array v = random(type, {1, kv, 2500, 24}, 3);
        FlashOptions options;
        options.masks.causal = true;
        RunOptions run;
        run.isa = isa;
        run.threads = 1;
        const AttentionResult one = flash_attention(q, k, v, options, run);
        for (int threads : {2, 3, 7}) {
          run.threads = threads;
          const AttentionResult more = flash_attention(q, k, v, options, run);
          EXPECT_TRUE(same_bits(one.out, more.out)) << name_of(type) << " " << name_of(isa);
          EXPECT_TRUE(same_bits(one.lse, more.lse)) << name_of(type) << " " << name_of(isa);
        }
      }
    }
  }
}

TEST(Flash, NaNBehindTheMaskNeverArrivesAndBeforeItAlwaysDoes) {
  for (DType type : {DType::f32, DType::bf16, DType::f16}) {
    for (Isa isa : available_isas()) {
      for (int64_t queries : {4, 90}) {
        for (int64_t bad_key : {30, 89}) {
          for (bool in_values : {false, true}) {
            for (float bad : {kNaN, kInf}) {
              if (bad == kInf && !in_values) continue;  // q . inf may be -inf: no weight at all
              Array q = random(type, {1, 1, queries, 20}, 1), k = random(type, {1, 1, 90, 20}, 2);
              Array v = random(type, {1, 1, 90, 20}, 3);
              const Array& target = in_values ? v : k;
              set(target.view().select(0, 0).select(0, 0).select(0, bad_key), bad);
              FlashOptions options;
              options.masks.causal = true;
              RunOptions run;
              run.isa = isa;
              const AttentionResult result = flash_attention(q, k, v, options, run);
              const Array out = convert(result.out, DType::f64);
              for (int64_t i = 0; i < queries; ++i) {
                const bool visible = bad_key <= i + 90 - queries;
                for (int64_t f = 0; f < 20; ++f) {
                  EXPECT_EQ(!std::isfinite(out.as<double>()[i * 20 + f]), visible)
                      << name_of(type) << " " << name_of(isa) << " row " << i << " key " << bad_key;
                }
              }
            }
          }
        }
      }
    }
  }
}

TEST(Flash, MemoryBehindLengthsIsNeverRead) {
  for (Isa isa : available_isas()) {
    for (int64_t queries : {2, 50}) {
      Array q = random(DType::f32, {2, 2, queries, 16}, 1),
            k = random(DType::f32, {2, 1, 70, 16}, 2);
      Array v = random(DType::f32, {2, 1, 70, 16}, 3);
      int32_t lengths[] = {41, 0};
      FlashOptions options;
      options.masks.lengths = Tensor(lengths, DType::i32, {2});
      RunOptions run;
      run.isa = isa;
      const AttentionResult clean = flash_attention(q, k, v, options, run);
      for (int64_t b = 0; b < 2; ++b) {
        for (int64_t j = lengths[b]; j < 70; ++j) {
          set(k.view().select(0, b).select(0, 0).select(0, j), kNaN);
          set(v.view().select(0, b).select(0, 0).select(0, j), kNaN);
        }
      }
      const AttentionResult stale = flash_attention(q, k, v, options, run);
      EXPECT_TRUE(same_bits(clean.out, stale.out));
      for (int64_t i = 0; i < 2 * queries; ++i) {  // the empty sequence
        EXPECT_EQ(stale.lse.as<float>()[2 * queries + i], -kInf);
        EXPECT_EQ(stale.out.as<float>()[(2 * queries + i) * 16], 0);
      }
    }
  }
}

// Masks with and without a run of keys, a row and a head that see nothing of a tile, shared key heads.
TEST(Flash, ValuesThatABooleanMaskHidesNeverArriveAndOthersDo) {
  constexpr int64_t kKeys = 700, kBad = 301;
  for (DType type : {DType::f64, DType::f32, DType::bf16, DType::f16}) {
    for (int64_t queries : {1, 3, 8, 40}) {
      const Array q = random(type, {1, 2, queries, 24}, 1);
      const Array k = random(type, {1, 1, kKeys, 24}, 2);
      const auto value_rows = [&](float bad) {
        Array v = random(type, {1, 1, kKeys, 20}, 3);
        if (bad != 0) set(v.view().select(0, 0).select(0, 0).select(0, kBad), bad);
        return v;
      };
      const Array clean = value_rows(0);
      Array mask(DType::boolean, {1, 2, queries, kKeys});
      std::mt19937 generator(4);
      const auto sees_bad = [&](int64_t row) { return row == queries / 2; };  // of the first head
      for (int64_t i = 0; i < mask.count(); ++i) {
        const int64_t row = i / kKeys, key = i % kKeys;
        const bool second_head = row >= queries;
        mask.as<bool>()[i] = key == kBad   ? sees_bad(row)
                             : second_head ? key < 40 || key > 650
                                           : generator() % 3 > 0;
      }
      for (Isa isa : available_isas()) {
        FlashOptions options;
        options.mask = mask;
        RunOptions run;
        run.isa = isa;
        const Array wanted = flash_attention(q, k, clean, options, run).out;
        for (float bad : {kNaN, kInf, -kInf}) {
          const Array found = flash_attention(q, k, value_rows(bad), options, run).out;
          for (int64_t row = 0; row < 2 * queries; ++row) {
            const auto row_of = [&](const Array& a) {
              return a.view().select(0, 0).select(0, row / queries).select(0, row % queries);
            };
            const Array got = convert(row_of(found), DType::f64);
            if (!sees_bad(row)) {
              // bfloat16 products round weights another way beside values that are not finite.
              EXPECT_LE(largest_difference(got, row_of(wanted)), type == DType::bf16 ? 1e-3 : 0)
                  << name_of(type) << " " << name_of(isa) << " row " << row << " " << bad;
            } else {
              const double arrived = *got.as<double>();
              EXPECT_TRUE(std::isnan(bad) ? std::isnan(arrived) : arrived == bad) << row;
            }
          }
        }
      }
    }
  }
}

TEST(Flash, HugeAndGrowingScoresStayExact) {
  for (DType type : {DType::f32, DType::bf16}) {
    for (Isa isa : available_isas()) {
      // Scores of +-1e4 and scores that grow along the keys, so that every tile moves the pivot.
      Array q = random(type, {1, 1, 60, 32}, 1, 40), k = random(type, {1, 1, 900, 32}, 2, 40);
      Array v = random(type, {1, 1, 900, 32}, 3);
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
      const Array q = random(type, {1, 2, queries, 24}, 1, size);
      const Array k = random(type, {1, 1, keys, 24}, 2, size), v = random(type, {1, 1, keys, 8}, 3);
      const Array g = random(type, {1, 2, queries, 8}, 4);
      const Array slopes = random(type == DType::f64 ? DType::f64 : DType::f32, {2}, 5);
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

TEST(Flash, ExtremeFiniteBiasesStayFinite) {
  const std::pair<DType, DType> types[] = {{DType::f32, DType::f32},
                                           {DType::f32, DType::bf16},
                                           {DType::f32, DType::f64},
                                           {DType::bf16, DType::bf16},
                                           {DType::f64, DType::f64}};
  for (const auto& [type, bias_type] : types) {
    for (int64_t queries : {1, 5, 40}) {
      const Array q = random(type, {1, 2, queries, 24}, 1), k = random(type, {1, 2, 70, 24}, 2);
      const Array v = random(type, {1, 2, 70, 8}, 3), g = random(type, {1, 2, queries, 8}, 4);
      const Array slopes = random(type == DType::f64 ? DType::f64 : DType::f32, {2}, 5);
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
  const Array q = random(DType::f32, {1, 1, 2, 8}, 1), k = random(DType::f32, {1, 1, 20, 8}, 2);
  for (DType type : {DType::f64, DType::f32, DType::bf16, DType::f16}) {
    FlashOptions options;
    const Array hidden = filled(type, {1}, -kInf);
    options.bias = hidden;
    const AttentionResult none = flash_attention(q, k, k, options);
    EXPECT_EQ(none.lse.as<float>()[0], -kInf);
    EXPECT_EQ(none.out.as<float>()[0], 0);
    for (float bad : {kInf, kNaN}) {
      Array bias = filled(type, {20}, 0);
      set(bias.view().slice(0, 7, 8), bad);
      options.bias = bias;
      EXPECT_TRUE(std::isnan(flash_attention(q, k, k, options).out.as<float>()[0]));
    }
  }
}

TEST(Flash, OneKeyGivesItsValueAndEqualKeysTheMean) {
  Array q = random(DType::f32, {1, 1, 5, 8}, 1), k = random(DType::f32, {1, 1, 1, 8}, 2);
  Array v = random(DType::f32, {1, 1, 1, 8}, 3);
  const AttentionResult one = flash_attention(q, k, v);
  for (int64_t i = 0; i < 5 * 8; ++i) EXPECT_EQ(one.out.as<float>()[i], v.as<float>()[i % 8]);
  // The same key 300 times, by a stride of 0.
  const Tensor keys(k.view().data(), DType::f32, {1, 1, 300, 8}, {8, 8, 0, 1});
  Array values = random(DType::f32, {1, 1, 300, 8}, 4);
  const AttentionResult mean = flash_attention(q, keys, values);
  for (int64_t f = 0; f < 8; ++f) {
    double sum = 0;
    for (int64_t j = 0; j < 300; ++j) sum += values.as<float>()[j * 8 + f];
    EXPECT_NEAR(mean.out.as<float>()[f], sum / 300, 1e-6);
  }
}

TEST(Flash, GradientsThatAreNotWantedAreLeftOut) {
  const Array q = random(DType::f32, {1, 2, 60, 16}, 1), slopes = random(DType::f32, {2}, 2);
  const Array bias = random(DType::f32, {2, 60, 60}, 3);
  FlashOptions options;
  options.bias = bias;
  options.alibi_slopes = slopes;
  const AttentionResult result = flash_attention(q, q, q, options);
  const auto backward = [&](const FlashWanted& wanted) {
    return flash_attention_backward(q, {}, q, q, q, result.out, result.lse, options, {}, wanted);
  };
  const FlashGradients all = backward({});
  for (const FlashWanted& wanted : {FlashWanted{false, true}, {true, false}, {false, false}}) {
    const FlashGradients some = backward(wanted);
    EXPECT_TRUE(same_bits(some.q, all.q));
    EXPECT_TRUE(same_bits(some.k, all.k));
    EXPECT_TRUE(same_bits(some.v, all.v));
    EXPECT_EQ(some.bias.view().defined(), wanted.bias);
    EXPECT_EQ(some.alibi_slopes.view().defined(), wanted.alibi_slopes);
    if (wanted.bias) {
      EXPECT_TRUE(same_bits(some.bias, all.bias));
    }
    if (wanted.alibi_slopes) {
      EXPECT_TRUE(same_bits(some.alibi_slopes, all.alibi_slopes));
    }
  }
}

TEST(Flash, MergeOfAnyPartitionIsTheWhole) {
  Array q = random(DType::f32, {2, 3, 33, 16}, 1), k = random(DType::f32, {2, 3, 120, 16}, 2);
  Array v = random(DType::f32, {2, 3, 120, 16}, 3);
  const AttentionResult whole = flash_attention(q, k, v);
  for (int64_t cut : {0, 1, 57, 119, 120}) {
    const auto part = [&](int64_t begin, int64_t end) {
      return flash_attention(q, k.view().slice(2, begin, end), v.view().slice(2, begin, end));
    };
    const AttentionResult a = part(0, cut), b = part(cut, 120);
    const AttentionResult merged = merge_attention(a.out, a.lse, b.out, b.lse);
    EXPECT_LT(largest_difference(merged.out, whole.out), 1e-6) << cut;
    EXPECT_LT(largest_difference(merged.lse, whole.lse), 1e-5) << cut;
  }
  const AttentionResult none = flash_attention(q, k.view().slice(2, 0, 0), v.view().slice(2, 0, 0));
  const AttentionResult empty = merge_attention(none.out, none.lse, none.out, none.lse);
  for (int64_t i = 0; i < empty.lse.count(); ++i) EXPECT_EQ(empty.lse.as<float>()[i], -kInf);
  for (int64_t i = 0; i < empty.out.count(); ++i) EXPECT_EQ(empty.out.as<float>()[i], 0);
}

TEST(Decode, AnySplitGivesTheSameRows) {
  for (DType type : {DType::f32, DType::bf16}) {
    Array q = random(type, {2, 6, 3, 24}, 1), k = random(type, {2, 2, 3000, 24}, 2);
    Array v = random(type, {2, 2, 3000, 24}, 3);
    int64_t lengths[] = {2750, 40};
    const Tensor given(lengths, DType::i64, {2});
    const AttentionResult chosen = decode_attention(q, k, v, given);
    for (int64_t splits : {1, 2, 5, 100}) {
      const AttentionResult cut = decode_attention(q, k, v, given, {{}, {}, splits});
      EXPECT_LT(largest_difference(cut.out, chosen.out), type == DType::f32 ? 1e-6 : 1e-2);
      EXPECT_LT(largest_difference(cut.lse, chosen.lse), 1e-5);
    }
  }
}

template <class Call>
std::string message_of(Call&& call) {
  try {
    call();
  } catch (const Error& e) {
    return e.what();
  }
  return "no error";
}

TEST(Errors, NameTheArgumentWhatItWasAndWhatIsNeeded) {
  Array q = random(DType::f32, {2, 4, 3, 8}, 1), k = random(DType::f32, {2, 2, 9, 8}, 2);
  const auto says = [](const std::string& message, std::initializer_list<const char*> parts) {
    for (const char* part : parts) {
      EXPECT_NE(message.find(part), std::string::npos) << message << " lacks " << part;
    }
  };
  Array narrow = random(DType::f32, {2, 2, 9, 7}, 2), three = random(DType::f32, {2, 3, 9, 8}, 2);
  Array wide = random(DType::f32, {1, 1, 2, 257}, 2), half = random(DType::bf16, {2, 2, 9, 8}, 2);
  says(message_of([&] { flash_attention(q, narrow, k); }), {"flash_attention", "k", "7", "q", "8"});
  says(message_of([&] { flash_attention(q, three, three); }), {"q has 4 heads", "3", "multiple"});
  says(message_of([&] { flash_attention(wide, wide, wide); }), {"257", "1 to 256"});
  says(message_of([&] { flash_attention(q, half, half); }), {"bfloat16", "float32", "one type"});
  says(message_of([&] { flash_attention(q.view().select(0, 0), k, k); }),
       {"q [4,3,8]", "4 are needed"});
  says(message_of([&] { flash_attention(Tensor(), k, k); }), {"q is missing"});
  says(message_of([&] { flash_attention(q, k, k, {{}, std::numeric_limits<double>::infinity()}); }),
       {"scale is inf", "finite"});
  const Tensor strided(k.view().data(), DType::f32, {2, 2, 9, 4}, {144, 72, 8, 2});
  Array q4 = random(DType::f32, {2, 4, 3, 4}, 1);
  says(message_of([&] { flash_attention(q4, strided, strided); }),
       {"k has stride 2", "unit stride"});
  int64_t lengths[] = {4, 4};
  const Tensor given(lengths, DType::i64, {2});
  Array many = random(DType::f32, {2, 4, 17, 8}, 1);
  says(message_of([&] { decode_attention(many, k, k, given); }), {"17 queries", "16"});
  says(message_of([&] { decode_attention(q, k, k, given, {{}, {}, -1}); }), {"splits is -1"});
  says(message_of([&] { decode_attention(q, k, k, given, {{}, -3, 0}); }), {"window left is -3"});
  const AttentionResult r = flash_attention(q, k, k);
  says(message_of([&] { merge_attention(r.out, r.lse, many, r.lse); }), {"out_b", "same shape"});
  says(message_of([&] { merge_attention(r.out, r.out, r.out, r.lse); }),
       {"lse_a", "float32 is needed"});
  says(message_of([&] { sigmoid_attention(q, k, k, {{}, {}, NAN}); }), {"bias is nan"});
  says(message_of([&] { sigmoid_attention(q, k, k, {{}, {}, r.lse.view()}); }), {"bias", "[4]"});
}

TEST(Empty, TensorsWithoutElements) {
  Array none = random(DType::f32, {1, 2, 0, 8}, 1), k = random(DType::f32, {1, 2, 5, 8}, 2);
  EXPECT_EQ(flash_attention(none, k, k).out.count(), 0);
  const AttentionResult no_keys = flash_attention(k, none, none);
  for (int64_t i = 0; i < no_keys.out.count(); ++i) EXPECT_EQ(no_keys.out.as<float>()[i], 0);
  for (int64_t i = 0; i < no_keys.lse.count(); ++i) EXPECT_EQ(no_keys.lse.as<float>()[i], -kInf);
  Array no_batch = random(DType::f32, {0, 2, 5, 8}, 1);
  EXPECT_EQ(flash_attention(no_batch, no_batch, no_batch).out.count(), 0);
  const Array sums = sigmoid_attention(k, none, none);
  for (int64_t i = 0; i < sums.count(); ++i) EXPECT_EQ(sums.as<float>()[i], 0);
}

TEST(Empty, NumbersPerHeadHaveGradientsOfZero) {
  const Array slopes = random(DType::f32, {2}, 3);
  const auto expect_zeros = [](const Array& found, const std::string& what) {
    ASSERT_EQ(found.shape(), Dims({2})) << what;
    for (int64_t i = 0; i < 2; ++i) EXPECT_EQ(found.as<float>()[i], 0) << what;
  };
  for (const auto& [batch, queries, keys] :
       {std::tuple<int64_t, int64_t, int64_t>{0, 5, 5}, {2, 0, 5}, {2, 5, 0}}) {
    const std::string what =
        std::to_string(batch) + "," + std::to_string(queries) + "," + std::to_string(keys);
    const Array q = random(DType::f32, {batch, 2, queries, 8}, 1);
    const Array k = random(DType::f32, {batch, 2, keys, 8}, 2);
    FlashOptions options;
    options.alibi_slopes = slopes;
    options.sink = slopes;
    const AttentionResult result = flash_attention(q, k, k, options);
    const FlashGradients flash =
        flash_attention_backward(q, {}, q, k, k, result.out, result.lse, options);
    expect_zeros(flash.alibi_slopes, "flash slopes " + what);
    expect_zeros(flash.sink, "flash sink " + what);
    const SigmoidGradients sigmoid =
        sigmoid_attention_backward(q, q, k, k, {{}, {}, slopes.view(), slopes});
    expect_zeros(sigmoid.bias, "sigmoid bias " + what);
    expect_zeros(sigmoid.alibi_slopes, "sigmoid slopes " + what);
  }
  const Array tokens = random(DType::f32, {0, 2, 8}, 1), lse = random(DType::f32, {2, 0}, 2);
  const int32_t boundary = 0;
  const Tensor cu(&boundary, DType::i32, {1});
  VarlenOptions options;
  options.alibi_slopes = slopes;
  const FlashGradients packed = flash_attention_varlen_backward(tokens, {}, tokens, tokens, tokens,
                                                                tokens, lse, cu, cu, options);
  expect_zeros(packed.alibi_slopes, "varlen slopes");
}

}  // namespace
}  // namespace heed
