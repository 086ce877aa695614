// What a comparison with the cascade cannot show: equalities between calls, what zero gates leave out,
// bits across thread counts, and messages.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <utility>

#include "heed/heed.h"
#include "mechanisms/test_arrays.h"

namespace heed {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

struct Inputs {
  Inputs(DType type, int64_t batch, int64_t heads, int64_t kv_heads, int64_t length)
      : q(random_array(type, {batch, heads, length, 8}, 1)),
        k(random_array(type, {batch, kv_heads, length, 8}, 2)),
        v(random_array(type, {batch, kv_heads, length, 6}, 3)),
        gates(random_array(type, {batch, heads, length}, 4)) {}
  Array q, k, v, gates;
};

TEST(HeadGated, GatesOfOneAreFlashAttention) {
  const Inputs x(DType::f64, 2, 6, 2, 70);
  HeadGatedOptions options;
  options.masks.causal = true;
  FlashOptions flash;
  flash.masks.causal = true;
  const AttentionResult want = flash_attention(x.q, x.k, x.v, flash);
  const Array ones = filled(DType::f64, {2, 6, 70}, 1), twos = filled(DType::f64, {2, 6, 70}, -2);
  const HeadGatedResult found = head_gated_attention(x.q, x.k, x.v, ones, options);
  EXPECT_LT(largest_difference(found.out, want.out), 1e-14);
  EXPECT_LT(largest_difference(found.lse, want.lse), 1e-14);
  const HeadGatedResult scaled = head_gated_attention(x.q, x.k, x.v, twos, options);
  Array back = convert(scaled.out, DType::f64);
  for (int64_t i = 0; i < back.count(); ++i) back.as<double>()[i] /= -2;
  EXPECT_LT(largest_difference(back, want.out), 1e-14);
}

// Rows without a gate are 0, and nothing in them is looked at.
TEST(HeadGated, ZeroGatesLeaveRowsOut) {
  for (DType type : {DType::f64, DType::f32, DType::bf16}) {
    Inputs x(type, 1, 2, 1, 40);
    Array gates = convert(x.gates, DType::f64);
    for (int64_t i = 0; i < gates.count(); i += 3) gates.as<double>()[i] = i % 2 == 0 ? 0.0 : -0.0;
    const Array with_zeros = convert(gates, type);
    const HeadGatedResult clean = head_gated_attention(x.q, x.k, x.v, with_zeros);
    const Array nan = filled(type, {1, 8}, kNaN);
    for (int64_t i = 0; i < 80; i += 3) {
      copy(nan, x.q.view().select(0, 0).select(0, i / 40).slice(0, i % 40, i % 40 + 1));
    }
    const HeadGatedResult found = head_gated_attention(x.q, x.k, x.v, with_zeros);
    EXPECT_TRUE(same_bits(found.out, clean.out)) << name_of(type);
    const Array out = convert(found.out, DType::f64), lse = convert(found.lse, DType::f64);
    for (int64_t i = 0; i < 80; i += 3) {
      EXPECT_EQ(out.as<double>()[i * 6], 0);
      EXPECT_EQ(lse.as<double>()[i], -std::numeric_limits<double>::infinity());
    }
    const HeadGatedGradients gradients = head_gated_attention_backward(
        found.out, x.q, x.k, x.v, with_zeros, found.attention, found.lse);
    const Array of_gates = convert(gradients.gates, DType::f64);
    const Array of_q = convert(gradients.q, DType::f64), of_k = convert(gradients.k, DType::f64);
    for (int64_t i = 0; i < 80; ++i) {
      EXPECT_EQ(of_gates.as<double>()[i] == 0, i % 3 == 0) << i;
      EXPECT_TRUE(std::isfinite(of_q.as<double>()[i * 8]));
      if (i % 3 == 0) {
        EXPECT_EQ(of_q.as<double>()[i * 8], 0);
      }
    }
    for (int64_t i = 0; i < of_k.count(); ++i) EXPECT_TRUE(std::isfinite(of_k.as<double>()[i]));
  }
}

TEST(HeadGated, ANaNGateIsNotAZero) {
  const Inputs x(DType::f32, 1, 1, 1, 20);
  Array gates = filled(DType::f32, {1, 1, 20}, 1);
  gates.as<float>()[7] = static_cast<float>(kNaN);
  const HeadGatedResult found = head_gated_attention(x.q, x.k, x.v, gates);
  for (int64_t p = 0; p < 20; ++p) {
    EXPECT_EQ(std::isnan(found.out.as<float>()[p * 6]), p == 7);
  }
}

// gate * grad_out is beyond float16, the gradients are not.
TEST(HeadGated, LargeGradientsOfFloat16StayFinite) {
  const auto gradients = [](DType type) {
    const auto rounded = [&](const Dims& shape, uint32_t seed, double size) {
      return convert(random_array(DType::f16, shape, seed, size), type);
    };
    const Array q = rounded({1, 2, 100, 16}, 1, 0.1), k = rounded({1, 1, 100, 16}, 2, 0.1);
    const Array v = rounded({1, 1, 100, 8}, 3, 0.1), g = rounded({1, 2, 100, 8}, 5, 15000);
    const Array gates = filled(type, {1, 2, 100}, 6);
    const HeadGatedResult r = head_gated_attention(q, k, v, gates);
    return head_gated_attention_backward(g, q, k, v, gates, r.attention, r.lse);
  };
  const HeadGatedGradients want = gradients(DType::f64), found = gradients(DType::f16);
  const auto agree = [](const Array& a, const Array& b) {
    const double largest = largest_difference(b, Array::zeros(b.dtype(), b.shape()));
    EXPECT_LT(largest_difference(a, b), 0.01 * largest);
  };
  agree(found.q, want.q);
  agree(found.k, want.k);
  agree(found.v, want.v);
  agree(found.gates, want.gates);
}

TEST(HeadGated, NoGateAtAllGivesZeros) {
  const Inputs x(DType::f32, 2, 4, 2, 30);
  const Array zeros = Array::zeros(DType::f32, {2, 4, 30});
  const HeadGatedResult found = head_gated_attention(x.q, x.k, x.v, zeros);
  for (int64_t i = 0; i < found.out.count(); ++i) EXPECT_EQ(found.out.as<float>()[i], 0);
  const HeadGatedGradients gradients = head_gated_attention_backward(
      random_array(DType::f32, {2, 4, 30, 6}, 5), x.q, x.k, x.v, zeros, found.attention, found.lse);
  for (const Array* g : {&gradients.q, &gradients.k, &gradients.v, &gradients.gates}) {
    for (int64_t i = 0; i < g->count(); ++i) EXPECT_EQ(g->as<float>()[i], 0);
  }
}

TEST(HeadGated, SameBitsForAnyThreadCountAndPart) {
  for (DType type : {DType::f32, DType::bf16}) {
    const Array q = random_array(type, {2, 12, 700, 64}, 1);
    const Array k = random_array(type, {2, 4, 700, 64}, 2);
    Array gates = random_array(DType::f32, {2, 12, 700}, 3);
    for (int64_t i = 0; i < gates.count(); i += 5) gates.as<float>()[i] = 0;
    HeadGatedOptions options;
    options.masks.causal = true;
    RunOptions run;
    run.threads = 1;
    const HeadGatedResult one = head_gated_attention(q, k, k, gates, options, run);
    for (int threads : {2, 7}) {
      run.threads = threads;
      const HeadGatedResult more = head_gated_attention(q, k, k, gates, options, run);
      EXPECT_TRUE(same_bits(one.out, more.out)) << threads;
      const auto gradients = [&] {
        return head_gated_attention_backward(q, q, k, k, gates, one.attention, one.lse, options,
                                             run);
      };
      const HeadGatedGradients a = gradients(), b = gradients();
      EXPECT_TRUE(same_bits(a.q, b.q) && same_bits(a.k, b.k) && same_bits(a.v, b.v) &&
                  same_bits(a.gates, b.gates));
    }
  }
}

// A head of few rows is its own kind of call, unless one of many rows is beside it.
TEST(HeadGated, SameBitsForAnyThreadCountBesideLongHeads) {
  const Array q = random_array(DType::f32, {1, 2, 2500, 256}, 1);
  const Array k = random_array(DType::f32, {1, 2, 300, 256}, 2);
  Array gates = filled(DType::f32, {1, 2, 2500}, 1);
  std::fill_n(gates.as<float>() + 2500, 2490, 0.0F);
  RunOptions run;
  run.threads = 1;
  const HeadGatedResult one = head_gated_attention(q, k, k, gates, {}, run);
  run.threads = 5;
  EXPECT_TRUE(same_bits(one.out, head_gated_attention(q, k, k, gates, {}, run).out));
}

Array with_heads(const Array& of_key_heads, int64_t group) {
  const Tensor from = of_key_heads;
  Array all(from.dtype(), {1, from.size(1) * group, from.size(2), from.size(3)});
  for (int64_t h = 0; h < all.view().size(1); ++h) {
    copy(from.select(0, 0).select(0, h / group), all.view().select(0, 0).select(0, h));
  }
  return all;
}

// The heads of a group share what they read of its keys where their gates are alike; with keys of 17 MB
// the gradients of those that are not meet one after another.
TEST(HeadGated, GroupsAreWhatTheirHeadsAreByThemselves) {
  constexpr int64_t kGroup = 4, kQueries = 3;
  for (int64_t keys : {20, 4200}) {
    const int64_t dim = keys == 20 ? 8 : 256, heads = keys == 20 ? 2 * kGroup : kGroup;
    const Array q = random_array(DType::f64, {1, heads, kQueries, dim}, 1);
    const Array k = random_array(DType::f64, {1, heads / kGroup, keys, dim}, 2);
    const Array v = random_array(DType::f64, {1, heads / kGroup, keys, dim}, 3);
    const Array g = random_array(DType::f64, {1, heads, kQueries, dim}, 4);
    Array gates = random_array(DType::f64, {1, heads, kQueries}, 5);
    for (int64_t head = 0; head < heads; head += 2) gates.as<double>()[head * kQueries] = 0;
    std::fill_n(gates.as<double>() + 3 * kQueries, kQueries, 0.0);
    HeadGatedOptions options;
    options.masks.causal = true;
    const auto gradients = [&](const Array& some_k, const Array& some_v) {
      const HeadGatedResult r = head_gated_attention(q, some_k, some_v, gates, options);
      return std::pair(
          Array(convert(r.out, DType::f64)),
          head_gated_attention_backward(g, q, some_k, some_v, gates, r.attention, r.lse, options));
    };
    const auto [out, found] = gradients(k, v);
    const auto [own_out, own] = gradients(with_heads(k, kGroup), with_heads(v, kGroup));
    EXPECT_LT(largest_difference(out, own_out), 1e-13);
    EXPECT_LT(largest_difference(found.q, own.q), 1e-13);
    EXPECT_LT(largest_difference(found.gates, own.gates), 1e-12);
    for (const auto& [sums, each] : {std::pair(&found.k, &own.k), std::pair(&found.v, &own.v)}) {
      Array of_groups = Array::zeros(DType::f64, k.shape());
      const int64_t head = keys * dim;
      for (int64_t i = 0; i < each->count(); ++i) {
        of_groups.as<double>()[i / (kGroup * head) * head + i % head] += each->as<double>()[i];
      }
      EXPECT_LT(largest_difference(*sums, of_groups), 1e-13) << keys;
    }
  }
}

TEST(HeadGated, TensorsWithoutElements) {
  const Inputs none(DType::f32, 1, 2, 2, 0), some(DType::f32, 1, 2, 2, 5);
  EXPECT_EQ(head_gated_attention(none.q, some.k, some.v, none.gates).out.count(), 0);
  const HeadGatedResult no_keys = head_gated_attention(some.q, none.k, none.v, some.gates);
  for (int64_t i = 0; i < no_keys.out.count(); ++i) EXPECT_EQ(no_keys.out.as<float>()[i], 0);
  const HeadGatedGradients gradients = head_gated_attention_backward(
      no_keys.out, some.q, none.k, none.v, some.gates, no_keys.attention, no_keys.lse);
  for (int64_t i = 0; i < gradients.q.count(); ++i) EXPECT_EQ(gradients.q.as<float>()[i], 0);
}

TEST(HeadGated, ErrorsNameTheArgumentWhatItWasAndWhatIsNeeded) {
  const Inputs x(DType::f32, 2, 4, 2, 6);
  const auto says = [](const std::string& message, std::initializer_list<const char*> parts) {
    for (const char* part : parts) {
      EXPECT_NE(message.find(part), std::string::npos) << message << " lacks " << part;
    }
  };
  const auto call = [&](const Tensor& gates) {
    return error_of([&] { head_gated_attention(x.q, x.k, x.v, gates); });
  };
  says(call({}), {"head_gated_attention", "gates is missing", "[2,4,6]"});
  says(call(random_array(DType::f32, {2, 4, 5}, 1)), {"gates [2,4,5]", "[2,4,6]"});
  says(call(random_array(DType::f64, {2, 4, 6}, 1)), {"float64", "float32 is needed"});
  says(error_of([&] { head_gated_attention(x.q, x.k, x.q, x.gates); }), {"v", "heads"});
  const HeadGatedResult r = head_gated_attention(x.q, x.k, x.v, x.gates);
  says(error_of(
           [&] { head_gated_attention_backward(x.q, x.q, x.k, x.v, x.gates, r.attention, r.lse); }),
       {"head_gated_attention_backward", "grad_out"});
  says(error_of([&] { head_gated_attention_backward(r.out, x.q, x.k, x.v, x.gates, {}, r.lse); }),
       {"attention is missing"});
  says(error_of(
           [&] { head_gated_attention_backward(r.out, x.q, x.k, x.v, x.gates, r.attention, {}); }),
       {"lse is missing"});
}

}  // namespace
}  // namespace heed
