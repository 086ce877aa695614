// What a comparison with the cascades cannot show: equalities between calls, who influences whom, the
// spread of information over layers, random permutations, bits, NaN, and messages.
#include <gtest/gtest.h>

#include <algorithm>
#include <bitset>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

#include "heed/heed.h"
#include "mechanisms/registry.h"
#include "mechanisms/test_arrays.h"

namespace heed {
namespace {

Array identity(int64_t length) {
  Array slots(DType::i64, {length});
  std::iota(slots.as<int64_t>(), slots.as<int64_t>() + length, 0);
  return slots;
}

struct Inputs {
  Inputs(DType type, int64_t batch, int64_t heads, int64_t kv_heads, int64_t length, int64_t dim)
      : q(random_array(type, {batch, heads, length, dim}, 1)),
        k(random_array(type, {batch, kv_heads, length, dim}, 2)),
        v(random_array(type, {batch, kv_heads, length, dim}, 3)) {}
  Array q, k, v;
};

TEST(Stochastic, UnpermutedTokensAreASlidingWindow) {
  const Inputs x(DType::f64, 2, 4, 2, 90, 8);
  for (bool causal : {false, true}) {
    FlashOptions window;
    window.masks.causal = causal;
    window.masks.window = {6, 6};
    const AttentionResult want = flash_attention(x.q, x.k, x.v, window);
    const AttentionResult found =
        stochastic_attention(x.q, x.k, x.v, identity(90), {13, causal, {}});
    EXPECT_LT(largest_difference(found.out, want.out), 1e-13);
    EXPECT_LT(largest_difference(found.lse, want.lse), 1e-13);
  }
}

TEST(Stochastic, AWindowOverAllSlotsIsFullAttention) {
  const Inputs x(DType::f64, 1, 3, 3, 70, 8);
  for (bool causal : {false, true}) {
    FlashOptions full;
    full.masks.causal = causal;
    const AttentionResult want = flash_attention(x.q, x.k, x.v, full);
    for (int64_t window : {int64_t{139}, std::numeric_limits<int64_t>::max()}) {
      const AttentionResult found =
          stochastic_attention(x.q, x.k, x.v, random_permutation(5, {3, 70}), {window, causal, {}});
      EXPECT_LT(largest_difference(found.out, want.out), 1e-13);
    }
  }
}

TEST(Stochastic, HeadsWithTheirOwnOrderAreCallsOfTheirOwn) {
  const Inputs x(DType::f64, 2, 4, 2, 40, 8);
  const Array orders = random_permutation(3, {2, 4, 40});
  const AttentionResult all = stochastic_attention(x.q, x.k, x.v, orders, {9, true, {}});
  for (int64_t b = 0; b < 2; ++b) {
    for (int64_t h = 0; h < 4; ++h) {
      const auto head = [&](const Array& t, int64_t n) {
        return t.view().slice(0, b, b + 1).slice(1, n, n + 1);
      };
      const AttentionResult one =
          stochastic_attention(head(x.q, h), head(x.k, h / 2), head(x.v, h / 2),
                               orders.view().select(0, b).select(0, h), {9, true, {}});
      EXPECT_LT(largest_difference(head(all.out, h), one.out), 1e-14) << b << " " << h;
    }
  }
}

TEST(Stochastic, EqualValuesComeBack) {
  Inputs x(DType::f32, 1, 2, 2, 60, 8);
  for (int64_t i = 0; i < x.v.count(); ++i) x.v.as<float>()[i] = 0.75F;
  const AttentionResult found =
      stochastic_attention(x.q, x.k, x.v, random_permutation(1, {60}), {11, true, {}});
  for (int64_t i = 0; i < found.out.count(); ++i) EXPECT_NEAR(found.out.as<float>()[i], 0.75, 1e-6);
}

// A token changes the rows that see it and no others; behind a causal mask no earlier ones.
TEST(Stochastic, ATokenInfluencesExactlyTheRowsThatSeeIt) {
  constexpr int64_t kLength = 50, kChanged = 21, kReach = 4;
  const Array order = random_permutation(9, {kLength});
  for (DType type : {DType::f32, DType::bf16}) {
    for (bool causal : {false, true}) {
      const Inputs x(type, 1, 1, 1, kLength, 8);
      const Array other = random_array(type, {1, 1, kLength, 8}, 7);
      Inputs changed(type, 1, 1, 1, kLength, 8);
      for (const auto& [from, to] : {std::pair(&other, &changed.k), {&other, &changed.v}}) {
        copy(from->view().slice(2, kChanged, kChanged + 1),
             to->view().slice(2, kChanged, kChanged + 1));
      }
      const StochasticOptions options{2 * kReach, causal, {}};
      const AttentionResult a = stochastic_attention(x.q, x.k, x.v, order, options);
      const AttentionResult b =
          stochastic_attention(changed.q, changed.k, changed.v, order, options);
      const int64_t* slots = order.as<int64_t>();
      for (int64_t i = 0; i < kLength; ++i) {
        const bool sees =
            std::abs(slots[i] - slots[kChanged]) <= kReach && (!causal || kChanged <= i);
        const Array before = convert(a.out.view().select(0, 0).select(0, 0).select(0, i), type);
        const Array after = convert(b.out.view().select(0, 0).select(0, 0).select(0, i), type);
        EXPECT_EQ(!same_bits(before, after), sees) << name_of(type) << " token " << i;
      }
    }
  }
}

TEST(Stochastic, NaNBehindTheMaskNeverArrives) {
  constexpr int64_t kLength = 60, kBad = 31;
  const Array order = random_permutation(4, {kLength});
  for (DType type : {DType::f64, DType::f32, DType::bf16, DType::f16}) {
    Inputs x(type, 1, 1, 1, kLength, 8);
    Array nan(DType::f64, {1});
    *nan.as<double>() = std::numeric_limits<double>::quiet_NaN();
    copy(nan, x.v.view().select(0, 0).select(0, 0).select(0, kBad).slice(0, 2, 3));
    const AttentionResult found = stochastic_attention(x.q, x.k, x.v, order, {10, true, {}});
    const Array out = convert(found.out, DType::f64);
    const int64_t* slots = order.as<int64_t>();
    for (int64_t i = 0; i < kLength; ++i) {
      const bool sees = std::abs(slots[i] - slots[kBad]) <= 5 && kBad <= i;
      EXPECT_EQ(std::isnan(out.as<double>()[i * 8 + 2]), sees) << name_of(type) << " token " << i;
    }
  }
}

TEST(Stochastic, SameBitsForAnyThreadCountAndPart) {
  for (DType type : {DType::f32, DType::bf16}) {
    const Inputs x(type, 2, 8, 4, 1500, 64);  // several parts for one thread
    const Array order = random_permutation(1, {8, 1500});
    RunOptions run;
    run.threads = 1;
    const AttentionResult one = stochastic_attention(x.q, x.k, x.v, order, {100, true, {}}, run);
    for (int threads : {2, 7}) {
      run.threads = threads;
      const AttentionResult more = stochastic_attention(x.q, x.k, x.v, order, {100, true, {}}, run);
      EXPECT_TRUE(same_bits(one.out, more.out)) << threads;
      EXPECT_TRUE(same_bits(one.lse, more.lse)) << threads;
      const auto gradients = [&] {
        return stochastic_attention_backward(one.out, one.lse, x.q, x.k, x.v, order, one.out,
                                             one.lse, {100, true, {}}, run);
      };
      const StochasticGradients a = gradients(), b = gradients();
      EXPECT_TRUE(same_bits(a.q, b.q) && same_bits(a.k, b.k) && same_bits(a.v, b.v));
    }
  }
}

TEST(RandomPermutation, IsAPermutationAndAFunctionOfSeedAndRow) {
  const Array a = random_permutation(7, {3, 5, 100}), b = random_permutation(7, {3, 5, 100});
  EXPECT_TRUE(same_bits(a, b));
  EXPECT_FALSE(same_bits(a, random_permutation(8, {3, 5, 100})));
  for (int64_t row = 0; row < 15; ++row) {
    std::vector<int64_t> slots(a.as<int64_t>() + row * 100, a.as<int64_t>() + (row + 1) * 100);
    if (row > 0) {
      EXPECT_FALSE(std::equal(slots.begin(), slots.end(), a.as<int64_t>()));
    }
    std::sort(slots.begin(), slots.end());
    for (int64_t i = 0; i < 100; ++i) ASSERT_EQ(slots[static_cast<size_t>(i)], i);
  }
  EXPECT_EQ(random_permutation(1, {1}).as<int64_t>()[0], 0);
  EXPECT_EQ(random_permutation(1, {4, 0}).count(), 0);
  EXPECT_NE(error_of([] { random_permutation(1, {}); }).find("shape is []"), std::string::npos);
}

// Every token is in every slot equally often: 5 standard errors over 12,000 draws.
TEST(RandomPermutation, IsUniform) {
  constexpr int64_t kLength = 12, kDraws = 12000;
  const Array draws = random_permutation(11, {kDraws, kLength});
  std::vector<int64_t> count(static_cast<size_t>(kLength * kLength), 0);
  for (int64_t n = 0; n < draws.count(); ++n) {
    ++count[static_cast<size_t>(n % kLength * kLength + draws.as<int64_t>()[n])];
  }
  const double p = 1.0 / kLength, bound = 5 * std::sqrt(kDraws * p * (1 - p));
  for (int64_t c : count) EXPECT_NEAR(static_cast<double>(c), kDraws * p, bound);
}

// The share of pairs that are linked after some layers with 1,024 tokens and window 17, each layer with
// its own permutation: 0.017, 0.251, 0.992, 1; with windows alone 0.062 after four.
TEST(RandomPermutation, IndependentOnesReachAllTokensInFewLayers) {
  constexpr int64_t kLength = 1024, kReach = 8;
  using Row = std::bitset<kLength>;
  using Links = std::vector<Row>;
  const Array orders = random_permutation(2, {4, kLength});
  const double want[] = {0.017, 0.251, 0.992, 1.0};
  auto reached = std::make_unique<Links>(kLength);
  for (size_t i = 0; i < kLength; ++i) (*reached)[i].set(i);
  for (int64_t layer = 0; layer < 4; ++layer) {
    const int64_t* slots = orders.as<int64_t>() + layer * kLength;
    std::vector<size_t> tokens(kLength);
    for (size_t i = 0; i < kLength; ++i) tokens[static_cast<size_t>(slots[i])] = i;
    auto next = std::make_unique<Links>(kLength);
    double pairs = 0;
    for (int64_t u = 0; u < kLength; ++u) {
      Row& row = (*next)[tokens[static_cast<size_t>(u)]];
      for (int64_t w = std::max<int64_t>(0, u - kReach); w <= std::min(kLength - 1, u + kReach);
           ++w) {
        row |= (*reached)[tokens[static_cast<size_t>(w)]];
      }
      pairs += static_cast<double>(row.count());
    }
    reached = std::move(next);
    EXPECT_NEAR(pairs / (kLength * kLength), want[layer], 0.004) << layer;
  }
}

TEST(Stochastic, InAModelPromptsAreStochasticAndLaterTokensDense) {
  const Mechanism& mechanism = find_mechanism("stochastic");
  const Inputs x(DType::f32, 1, 2, 1, 40, 8);
  const auto call = [&](const char* spec, int64_t layer, const Tensor& q) {
    const ModelAttention attention = mechanism.model_attention(
        Spec::parse(spec), {.layer = layer, .layers = 4, .heads = 2, .kv_heads = 1, .head_dim = 8});
    EXPECT_TRUE(attention.whole_prompt);
    Array out(DType::f32, q.shape());
    attention.over_cache(q, x.k, x.v, out, {});
    return out;
  };
  const char* const spec = "stochastic:window=8,seed=3";
  const Array first = call(spec, 0, x.q);
  EXPECT_TRUE(same_bits(first, call(spec, 0, x.q)));
  EXPECT_FALSE(same_bits(first, call(spec, 1, x.q))) << "every layer has its own permutation";
  EXPECT_FALSE(same_bits(first, call("stochastic:window=8,seed=4", 0, x.q)));
  FlashOptions dense;
  dense.masks.causal = true;
  const Tensor last = x.q.view().slice(2, 37, 40);
  EXPECT_LT(largest_difference(call(spec, 0, last), flash_attention(last, x.k, x.v, dense).out),
            1e-6);
  EXPECT_LT(largest_difference(call("stochastic:window=100", 0, x.q),
                               flash_attention(x.q, x.k, x.v, dense).out),
            1e-6)
      << "a window over all slots";
}

TEST(Stochastic, TensorsWithoutElements) {
  const Inputs none(DType::f32, 2, 3, 3, 0, 8), no_batch(DType::f32, 0, 3, 3, 5, 8);
  EXPECT_EQ(stochastic_attention(none.q, none.k, none.v, identity(0), {4, true, {}}).out.count(),
            0);
  EXPECT_EQ(stochastic_attention(no_batch.q, no_batch.k, no_batch.v, identity(5), {4, true, {}})
                .out.count(),
            0);
}

TEST(Stochastic, ErrorsNameTheArgumentWhatItWasAndWhatIsNeeded) {
  const Inputs x(DType::f32, 2, 4, 2, 6, 8);
  const auto says = [](const std::string& message, std::initializer_list<const char*> parts) {
    for (const char* part : parts) {
      EXPECT_NE(message.find(part), std::string::npos) << message << " lacks " << part;
    }
  };
  const auto call = [&](const Tensor& permutation, int64_t window = 4) {
    return error_of([&] { stochastic_attention(x.q, x.k, x.v, permutation, {window, true, {}}); });
  };
  says(call({}), {"permutation is missing", "[6], [4,6] or [2,4,6] int64"});
  says(call(identity(5)), {"permutation [5] int64", "[6]"});
  says(call(random_permutation(1, {3, 6})), {"permutation [3,6]", "[4,6]"});
  const Array wrong_type = Array::zeros(DType::i32, {6});
  says(call(wrong_type), {"int32", "int64"});
  Array twice = identity(6);
  twice.as<int64_t>()[4] = 1;
  says(call(twice), {"tokens 1 and 4 slot 1", "every slot once"});
  twice.as<int64_t>()[4] = 6;
  says(call(twice), {"slot 6 for token 4", "0 to 5"});
  twice.as<int64_t>()[4] = -1;
  says(call(twice), {"slot -1"});
  says(call(identity(6), 0), {"window is 0", ">= 1"});
  const Array five = identity(5);
  const NamedTensors inputs{{"q", x.q}, {"k", x.k}, {"v", x.v}, {"permutation", five}};
  says(
      error_of([&] { find_mechanism("stochastic").bind(inputs, Spec::parse_options("window=4")); }),
      {"permutation [5] int64", "[6]"});
  const Array longer = random_array(DType::f32, {2, 2, 7, 8}, 1);
  says(error_of([&] { stochastic_attention(x.q, longer, longer, identity(6), {4, true, {}}); }),
       {"k has 7 tokens but q has 6"});
  const AttentionResult result = stochastic_attention(x.q, x.k, x.v, identity(6), {4, true, {}});
  says(error_of([&] {
         stochastic_attention_backward(x.k, {}, x.q, x.k, x.v, identity(6), result.out, result.lse,
                                       {4, true, {}});
       }),
       {"stochastic_attention_backward", "grad_out"});
}

}  // namespace
}  // namespace heed
