// What a comparison with the cascade cannot show: bits across thread counts, NaN that must and must not
// arrive, merging, and messages.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <tuple>
#include <vector>

#include "heed/heed.h"
#include "mechanisms/test_arrays.h"

namespace heed {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

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
        Array q = random_array(type, {1, heads, queries, 40}, 1),
              k = random_array(type, {1, kv, 2500, 40}, 2);
        Array v = random_array(type, {1, kv, 2500, 24}, 3);
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

// 2e-3 are the roundings of bfloat16 operands and results.
TEST(Flash, WideHeads) {
  for (const auto& [type, bound] :
       {std::pair{DType::f32, 1e-5}, {DType::bf16, 6e-3}, {DType::f16, 1e-3}}) {
    for (Isa isa : available_isas()) {
      for (const auto& [queries, dim, value_dim] :
           {std::tuple<int64_t, int64_t, int64_t>{130, 300, 270}, {5, 577, 512}, {130, 40, 520}}) {
        const Array q = random_array(type, {1, 4, queries, dim}, 1),
                    k = random_array(type, {1, 2, 700, dim}, 2),
                    v = random_array(type, {1, 2, 700, value_dim}, 3),
                    g = random_array(type, {1, 4, queries, value_dim}, 4);
        const auto results = [&](DType as) {
          const Array x = convert(q, as), y = convert(k, as), z = convert(v, as);
          FlashOptions options;
          options.masks.causal = true;
          const RunOptions run{.threads = {}, .isa = isa};
          AttentionResult result = flash_attention(x, y, z, options, run);
          FlashGradients d = flash_attention_backward(convert(g, as), {}, x, y, z, result.out,
                                                      result.lse, options, run);
          std::vector<Array> all;
          for (Array* a : {&result.out, &result.lse, &d.q, &d.k, &d.v})
            all.push_back(std::move(*a));
          return all;
        };
        const std::vector<Array> found = results(type), want = results(DType::f64);
        for (size_t i = 0; i < want.size(); ++i) {
          EXPECT_LT(relative_error(found[i], want[i]), bound)
              << name_of(type) << " " << name_of(isa) << " " << dim << " result " << i;
        }
      }
    }
  }
}

TEST(Flash, NaNBehindTheMaskNeverArrivesAndBeforeItAlwaysDoes) {
  struct Case {
    int64_t queries, keys, dim;
    bool causal = true;
  };
  for (DType type : {DType::f32, DType::bf16, DType::f16}) {
    for (Isa isa : available_isas()) {
      for (const auto& [queries, keys, dim, causal] :
           {Case{4, 90, 20}, {90, 90, 20}, {6, 200, 64}, {6, 200, 64, false}}) {
        for (int64_t bad_key : {int64_t{30}, keys - 1}) {
          for (bool in_values : {false, true}) {
            for (float bad : {kNaN, kInf}) {
              if (bad == kInf && !in_values) continue;  // q . inf may be -inf: no weight at all
              Array q = random_array(type, {1, 1, queries, dim}, 1),
                    k = random_array(type, {1, 1, keys, dim}, 2);
              Array v = random_array(type, {1, 1, keys, dim}, 3);
              const Array& target = in_values ? v : k;
              set(target.view().select(0, 0).select(0, 0).select(0, bad_key), bad);
              FlashOptions options;
              options.masks.causal = causal;
              RunOptions run;
              run.isa = isa;
              const AttentionResult result = flash_attention(q, k, v, options, run);
              const Array out = convert(result.out, DType::f64);
              for (int64_t i = 0; i < queries; ++i) {
                const bool visible = !causal || bad_key <= i + keys - queries;
                for (int64_t f = 0; f < dim; ++f) {
                  const double x = out.as<double>()[i * dim + f];
                  const bool arrived = bad == kInf ? x == kInf : std::isnan(x);
                  EXPECT_EQ(visible ? arrived : !std::isfinite(x), visible)
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
      Array q = random_array(DType::f32, {2, 2, queries, 16}, 1),
            k = random_array(DType::f32, {2, 1, 70, 16}, 2);
      Array v = random_array(DType::f32, {2, 1, 70, 16}, 3);
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
      const Array q = random_array(type, {1, 2, queries, 24}, 1);
      const Array k = random_array(type, {1, 1, kKeys, 24}, 2);
      const auto value_rows = [&](float bad) {
        Array v = random_array(type, {1, 1, kKeys, 20}, 3);
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

TEST(Flash, OneKeyGivesItsValueAndEqualKeysTheMean) {
  Array q = random_array(DType::f32, {1, 1, 5, 8}, 1),
        k = random_array(DType::f32, {1, 1, 1, 8}, 2);
  Array v = random_array(DType::f32, {1, 1, 1, 8}, 3);
  const AttentionResult one = flash_attention(q, k, v);
  for (int64_t i = 0; i < 5 * 8; ++i) EXPECT_EQ(one.out.as<float>()[i], v.as<float>()[i % 8]);
  // The same key 300 times, by a stride of 0.
  const Tensor keys(k.view().data(), DType::f32, {1, 1, 300, 8}, {8, 8, 0, 1});
  Array values = random_array(DType::f32, {1, 1, 300, 8}, 4);
  const AttentionResult mean = flash_attention(q, keys, values);
  for (int64_t f = 0; f < 8; ++f) {
    double sum = 0;
    for (int64_t j = 0; j < 300; ++j) sum += values.as<float>()[j * 8 + f];
    EXPECT_NEAR(mean.out.as<float>()[f], sum / 300, 1e-6);
  }
}

TEST(Flash, GradientsThatAreNotWantedAreLeftOut) {
  const Array q = random_array(DType::f32, {1, 2, 60, 16}, 1),
              slopes = random_array(DType::f32, {2}, 2);
  const Array bias = random_array(DType::f32, {2, 60, 60}, 3);
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
    EXPECT_TRUE(same_bits_if(wanted.bias, some.bias, all.bias));
    EXPECT_TRUE(same_bits_if(wanted.alibi_slopes, some.alibi_slopes, all.alibi_slopes));
  }
}

TEST(Flash, MergeOfAnyPartitionIsTheWhole) {
  Array q = random_array(DType::f32, {2, 3, 33, 16}, 1),
        k = random_array(DType::f32, {2, 3, 120, 16}, 2);
  Array v = random_array(DType::f32, {2, 3, 120, 16}, 3);
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
    Array q = random_array(type, {2, 6, 3, 24}, 1), k = random_array(type, {2, 2, 3000, 24}, 2);
    Array v = random_array(type, {2, 2, 3000, 24}, 3);
    int64_t lengths[] = {2750, 40};
    const Tensor given(lengths, DType::i64, {2});
    const Array numbers = random_array(DType::f32, {6}, 4);
    for (const Tensor& per_head : {Tensor(), numbers.view()}) {
      DecodeOptions options{
          .sink = per_head, .softcap = per_head.defined() ? 1.5 : 0, .alibi_slopes = per_head};
      const AttentionResult chosen = decode_attention(q, k, v, given, options);
      for (int64_t splits : {int64_t{1}, int64_t{2}, int64_t{5}, int64_t{100}, INT64_MAX}) {
        options.splits = splits;
        const AttentionResult cut = decode_attention(q, k, v, given, options);
        EXPECT_LT(largest_difference(cut.out, chosen.out), type == DType::f32 ? 1e-6 : 1e-2);
        EXPECT_LT(largest_difference(cut.lse, chosen.lse), 1e-5);
      }
    }
  }
}

TEST(Flash, OneBlockMayBeLargerThanWhatItCovers) {
  const Array q = random_array(DType::f32, {1, 2, 90, 8}, 1);
  const AttentionResult whole = flash_attention(q, q, q);
  const FlashGradients wanted =
      flash_attention_backward(q, {}, q, q, q, whole.out, whole.lse, FlashOptions{});
  const bool alive = true;
  FlashOptions options;
  options.block_mask = Tensor(&alive, DType::boolean, {1, 1, 1});
  for (const int64_t size : {int64_t{90}, int64_t{1} << 40, std::numeric_limits<int64_t>::max()}) {
    options.block_size = {size, size};
    const AttentionResult blocks = flash_attention(q, q, q, options);
    EXPECT_LT(largest_difference(blocks.out, whole.out), 1e-5) << size;
    const FlashGradients found =
        flash_attention_backward(q, {}, q, q, q, blocks.out, blocks.lse, options);
    EXPECT_LT(largest_difference(found.q, wanted.q), 1e-5) << size;
    EXPECT_LT(largest_difference(found.k, wanted.k), 1e-5) << size;
  }
}

TEST(Errors, NameTheArgumentWhatItWasAndWhatIsNeeded) {
  Array q = random_array(DType::f32, {2, 4, 3, 8}, 1),
        k = random_array(DType::f32, {2, 2, 9, 8}, 2);
  const auto says = [](const std::string& message, std::initializer_list<const char*> parts) {
    for (const char* part : parts) {
      EXPECT_NE(message.find(part), std::string::npos) << message << " lacks " << part;
    }
  };
  Array narrow = random_array(DType::f32, {2, 2, 9, 7}, 2),
        three = random_array(DType::f32, {2, 3, 9, 8}, 2);
  Array empty(DType::f32, {1, 1, 2, 0}), half = random_array(DType::bf16, {2, 2, 9, 8}, 2);
  says(error_of([&] { flash_attention(q, narrow, k); }), {"flash_attention", "k", "7", "q", "8"});
  says(error_of([&] { flash_attention(q, three, three); }), {"q has 4 heads", "3", "multiple"});
  says(error_of([&] { flash_attention(empty, empty, empty); }), {"head dim 0", "at least 1"});
  says(error_of([&] { flash_attention(q, half, half); }), {"bfloat16", "float32", "one type"});
  says(error_of([&] { flash_attention(q.view().select(0, 0), k, k); }),
       {"q [4,3,8]", "4 are needed"});
  says(error_of([&] { flash_attention(Tensor(), k, k); }), {"q is missing"});
  says(error_of([&] { flash_attention(q, k, k, {{}, std::numeric_limits<double>::infinity()}); }),
       {"scale is inf", "finite"});
  const Tensor strided(k.view().data(), DType::f32, {2, 2, 9, 4}, {144, 72, 8, 2});
  Array q4 = random_array(DType::f32, {2, 4, 3, 4}, 1);
  says(error_of([&] { flash_attention(q4, strided, strided); }), {"k has stride 2", "unit stride"});
  int64_t lengths[] = {4, 4};
  const Tensor given(lengths, DType::i64, {2});
  Array many = random_array(DType::f32, {2, 4, 17, 8}, 1);
  says(error_of([&] { decode_attention(many, k, k, given); }), {"17 queries", "16"});
  says(error_of([&] { decode_attention(q, k, k, given, {{}, {}, -1}); }), {"splits is -1"});
  says(error_of([&] { decode_attention(q, k, k, given, {{}, -3, 0}); }), {"window left is -3"});
  const Array three_numbers = random_array(DType::f32, {3}, 1);
  says(error_of([&] { decode_attention(q, k, k, given, {.softcap = -1}); }),
       {"decode_attention: softcap is -1", "positive"});
  says(error_of([&] { decode_attention(q, k, k, given, {.alibi_slopes = three_numbers}); }),
       {"decode_attention: alibi_slopes [3]", "[4]"});
  says(error_of([&] { decode_attention(q, k, k, given, {.sink = three_numbers}); }),
       {"decode_attention: sink [3]", "[4]"});
  const int32_t boundaries[] = {0, 9};
  const Tensor cu(boundaries, DType::i32, {2});
  const auto packed_error = [&](const VarlenOptions& options) {
    const Array t = random_array(DType::f32, {9, 4, 8}, 1);
    return error_of([&] { flash_attention_varlen(t, t, t, cu, cu, options); });
  };
  says(packed_error({.sink = three_numbers}), {"flash_attention_varlen: sink [3]", "[4]"});
  says(packed_error({.dropout_p = 1}), {"flash_attention_varlen: dropout_p is 1", "not including"});
  says(packed_error({.dropout_p = kNaN}), {"flash_attention_varlen: dropout_p is nan"});
  const AttentionResult r = flash_attention(q, k, k);
  says(error_of([&] { merge_attention(r.out, r.lse, many, r.lse); }), {"out_b", "same shape"});
  says(error_of([&] { merge_attention(r.out, r.out, r.out, r.lse); }),
       {"lse_a", "float32 is needed"});
  says(error_of([&] { sigmoid_attention(q, k, k, {{}, {}, r.lse.view()}); }), {"bias", "[4]"});
}

TEST(Empty, TensorsWithoutElements) {
  Array none = random_array(DType::f32, {1, 2, 0, 8}, 1),
        k = random_array(DType::f32, {1, 2, 5, 8}, 2);
  EXPECT_EQ(flash_attention(none, k, k).out.count(), 0);
  const AttentionResult no_keys = flash_attention(k, none, none);
  for (int64_t i = 0; i < no_keys.out.count(); ++i) EXPECT_EQ(no_keys.out.as<float>()[i], 0);
  for (int64_t i = 0; i < no_keys.lse.count(); ++i) EXPECT_EQ(no_keys.lse.as<float>()[i], -kInf);
  Array no_batch = random_array(DType::f32, {0, 2, 5, 8}, 1);
  EXPECT_EQ(flash_attention(no_batch, no_batch, no_batch).out.count(), 0);
  const Array sums = sigmoid_attention(k, none, none);
  for (int64_t i = 0; i < sums.count(); ++i) EXPECT_EQ(sums.as<float>()[i], 0);
}

// Rows that are longer than the least that memory is taken for.
TEST(Empty, KeysWithoutQueriesHaveGradientsOfZero) {
  for (DType type : {DType::f64, DType::f32, DType::bf16, DType::f16}) {
    for (Isa isa : available_isas()) {
      for (int64_t kv_heads : {1, 4}) {
        const RunOptions run{.isa = isa};
        const Array q = random_array(type, {2, 4, 0, 100}, 1), slopes = random_array(type, {4}, 4);
        const Array k = random_array(type, {2, kv_heads, 70, 100}, 2);
        const auto expect_zeros = [&](const Array& x) {
          const Array wide = convert(x, DType::f64);
          ASSERT_EQ(wide.count(), k.count());
          for (int64_t i = 0; i < wide.count(); ++i) ASSERT_EQ(wide.as<double>()[i], 0);
        };
        const AttentionResult result = flash_attention(q, k, k, {}, run);
        const FlashGradients flash =
            flash_attention_backward(q, {}, q, k, k, result.out, result.lse, {}, run);
        expect_zeros(flash.k);
        expect_zeros(flash.v);
        const SigmoidGradients sigmoid = sigmoid_attention_backward(q, q, k, k, {}, run);
        expect_zeros(sigmoid.k);
        expect_zeros(sigmoid.v);
      }
    }
  }
}

TEST(Empty, NumbersPerHeadHaveGradientsOfZero) {
  const Array slopes = random_array(DType::f32, {2}, 3);
  const auto expect_zeros = [](const Array& found, const std::string& what) {
    ASSERT_EQ(found.shape(), Dims({2})) << what;
    for (int64_t i = 0; i < 2; ++i) EXPECT_EQ(found.as<float>()[i], 0) << what;
  };
  for (const auto& [batch, queries, keys] :
       {std::tuple<int64_t, int64_t, int64_t>{0, 5, 5}, {2, 0, 5}, {2, 5, 0}}) {
    const std::string what =
        std::to_string(batch) + "," + std::to_string(queries) + "," + std::to_string(keys);
    const Array q = random_array(DType::f32, {batch, 2, queries, 8}, 1);
    const Array k = random_array(DType::f32, {batch, 2, keys, 8}, 2);
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
  const Array tokens = random_array(DType::f32, {0, 2, 8}, 1),
              lse = random_array(DType::f32, {2, 0}, 2);
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
