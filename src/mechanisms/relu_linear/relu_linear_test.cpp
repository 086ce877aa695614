// Identities of the paper, bits across thread counts, NaN, extreme values, empty tensors, messages.
#include <gtest/gtest.h>

#include <cstring>
#include <limits>

#include "engine/operands.h"
#include "heed/relu_linear_attention.h"
#include "mechanisms/chunked_test.h"
#include "mechanisms/test_arrays.h"

namespace heed {
namespace {

struct Call {
  Array q, k, v, temperature;
  explicit Call(DType type, int64_t heads = 4, int64_t kv_heads = 2, int64_t queries = 70,
                int64_t keys = 90, int64_t dim = 16, int64_t value_dim = 12)
      : q(random_array(type, {2, heads, queries, dim}, 1)),
        k(random_array(type, {2, kv_heads, keys, dim}, 2)),
        v(random_array(type, {2, kv_heads, keys, value_dim}, 3)),
        temperature(random_array(type, {heads}, 4)) {}
  Array run(const ReluLinearOptions& options = {}, const RunOptions& how = {}) const {
    return relu_linear_attention(q, k, v, temperature, options, how);
  }
};

TEST(ReluLinear, SameBitsForAnyThreadCount) {
  for (DType type : {DType::f64, DType::f32, DType::bf16, DType::f16}) {
    for (const auto& [heads, tokens] : {std::pair<int64_t, int64_t>{1, 3000}, {6, 100}}) {
      const Call call(type, heads, heads > 1 ? 3 : 1, tokens, tokens, 24, 40);
      const Array gradient = random_array(type, {2, heads, tokens, 40}, 5);
      const auto backward = [&](int threads) {
        return relu_linear_attention_backward(gradient, call.q, call.k, call.v, call.temperature,
                                              {.clamp = 500}, {.threads = threads});
      };
      const Array one = call.run({.clamp = 500}, {.threads = 1});
      const ReluLinearGradients first = backward(1);
      for (int threads : {2, 5}) {
        EXPECT_TRUE(same_bits(one, call.run({.clamp = 500}, {.threads = threads})));
        const ReluLinearGradients other = backward(threads);
        EXPECT_TRUE(same_bits(first.q, other.q) && same_bits(first.k, other.k));
        EXPECT_TRUE(same_bits(first.v, other.v) && same_bits(first.temperature, other.temperature));
      }
    }
  }
}

TEST(ReluLinear, BackwardReadsTheStateOfTheForward) {
  for (DType type : {DType::f64, DType::f32, DType::bf16}) {
    for (Isa isa : available_isas()) {
      const Call call(type, 4, 2, 130, 1500, 24, 40);
      const RunOptions run{.threads = {}, .isa = isa};
      const Array gradient = random_array(type, {2, 4, 130, 40}, 5);
      Array s(wide_type(type), {2, 4, 24, 40}), z(wide_type(type), {2, 4, 24});
      Array out(type, {2, 4, 130, 40});
      relu_linear_attention(call.q, call.k, call.v, call.temperature, out, {s, z}, {}, run);
      EXPECT_TRUE(same_bits(out, call.run({}, run)));
      const auto backward = [&](const ReluLinearState& state) {
        return relu_linear_attention_backward(gradient, call.q, call.k, call.v, call.temperature,
                                              {.forward_state = state}, run);
      };
      const ReluLinearGradients alone = backward({}), given = backward({s, z});
      EXPECT_TRUE(same_bits(alone.q, given.q) && same_bits(alone.k, given.k) &&
                  same_bits(alone.v, given.v) && same_bits(alone.temperature, given.temperature))
          << name_of(type) << " " << name_of(isa);
      std::memset(s.view().data(), 0, static_cast<size_t>(s.count()) * size_of(s.dtype()));
      EXPECT_FALSE(same_bits(backward({s, z}).q, given.q));
    }
  }
}

// num and den give gradients of queries that nearly cancel there. Rounding alone is 2e-3.
TEST(ReluLinear, BfloatGradientsOfValuesFarFromZero) {
  for (Isa isa : available_isas()) {
    Call call(DType::bf16, 4, 2, 300, 333, 24, 20);
    Array values = random_array(DType::f64, {2, 2, 333, 20}, 3);
    for (int64_t i = 0; i < values.count(); ++i) values.as<double>()[i] += 5;
    call.v = convert(values, DType::bf16);
    const Array gradient = random_array(DType::bf16, {2, 4, 300, 20}, 5);
    const auto backward = [&](DType type) {
      const auto as = [&](const Array& x) { return convert(x, type); };
      return relu_linear_attention_backward(as(gradient), as(call.q), as(call.k), as(call.v),
                                            as(call.temperature), {.clamp = 3},
                                            {.threads = {}, .isa = isa});
    };
    const ReluLinearGradients found = backward(DType::bf16), want = backward(DType::f64);
    EXPECT_LT(relative_error(found.q, want.q), 0.006) << name_of(isa);
    EXPECT_LT(relative_error(found.k, want.k), 0.006) << name_of(isa);
    EXPECT_LT(relative_error(found.v, want.v), 0.006) << name_of(isa);
    EXPECT_LT(relative_error(found.temperature, want.temperature), 0.006) << name_of(isa);
  }
}

TEST(ReluLinear, ConstantValuesComeBackTimesTheTemperature) {
  Call call(DType::f64);
  std::fill_n(call.v.as<double>(), call.v.count(), 3.0);
  const Array out = call.run({.clamp = 1e-9});
  for (int64_t i = 0; i < out.count(); ++i) {
    const double tau = call.temperature.as<double>()[i / (70 * 12) % 4];
    EXPECT_NEAR(out.as<double>()[i], 3 * tau, 1e-12);
  }
}

TEST(ReluLinear, IsLinearInTheQueriesWhereTheClampIsReachedAndScaleFreeWhereItIsNot) {
  Call call(DType::f64);
  const Array linear = call.run({.clamp = 1e9}), normalised = call.run({.clamp = 1e-9});
  for (int64_t i = 0; i < call.q.count(); ++i) call.q.as<double>()[i] *= 2;
  const Array twice = call.run({.clamp = 1e9}), same = call.run({.clamp = 1e-9});
  for (int64_t i = 0; i < linear.count(); ++i) {
    EXPECT_NEAR(twice.as<double>()[i], 2 * linear.as<double>()[i], 1e-14);
    EXPECT_NEAR(same.as<double>()[i], normalised.as<double>()[i], 1e-12);
  }
}

TEST(ReluLinear, TheOrderOfKeysDoesNotMatter) {
  const Call call(DType::f64);
  const Array out = call.run();
  // The keys and values backwards, as views.
  const auto reversed = [](const Array& a) {
    const Tensor t = a.view();
    return Tensor(t.at({0, 0, t.size(2) - 1}), t.dtype(), t.shape(),
                  {t.stride(0), t.stride(1), -t.stride(2), 1});
  };
  EXPECT_LT(
      largest_difference(
          relu_linear_attention(call.q, reversed(call.k), reversed(call.v), call.temperature), out),
      1e-13);
}

TEST(ReluLinear, QueriesWithoutAPositiveElementGiveZero) {
  for (Isa isa : available_isas()) {
    Call call(DType::f32);
    for (int64_t i = 0; i < 16; ++i) call.q.as<float>()[i] = -static_cast<float>(i);
    const Array out = call.run({.clamp = 1e-30}, {.isa = isa});
    for (int64_t f = 0; f < 12; ++f) EXPECT_EQ(out.as<float>()[f], 0);
    // A clamp below float32's range does not become 0 / 0.
    const Array tiny = call.run({.clamp = 1e-300}, {.isa = isa});
    for (int64_t f = 0; f < 12; ++f) EXPECT_EQ(tiny.as<float>()[f], 0);
  }
}

TEST(ReluLinear, NanReachesWhatReadsIt) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (Isa isa : available_isas()) {
    Call call(DType::f32);
    const Array clean = call.run({}, {.isa = isa});
    call.q.as<float>()[5 * 16 + 3] = nan;  // query 5 of head 0
    const Array one = call.run({}, {.isa = isa});
    for (int64_t i = 0; i < one.count(); ++i) {
      if (i / 12 == 5) {
        ASSERT_TRUE(std::isnan(one.as<float>()[i]));
      } else {
        ASSERT_EQ(one.as<float>()[i], clean.as<float>()[i]);
      }
    }
    Call other(DType::f32);
    other.k.as<float>()[16] = nan;  // key 1 of key head 0: query heads 0 and 1 read it
    const Array all = other.run({}, {.isa = isa});
    for (int64_t i = 0; i < all.count(); ++i) {
      ASSERT_EQ(std::isnan(all.as<float>()[i]), i < 2 * 70 * 12) << i;
    }
  }
}

// Whatever blocks are padded to, features of other rows and stale memory stay out of a row.
TEST(ReluLinear, MinusInfinityIsAZeroFeature) {
  for (Isa isa : available_isas()) {
    for (DType type : {DType::f32, DType::bf16, DType::f16}) {
      for (int64_t dim : {1, 8, 16, 33}) {
        const auto with = [&](double value) {
          Call call(type, 2, 1, 70, 90, dim, 12);
          for (Array* x : {&call.q, &call.k}) {
            Array wide = convert(*x, DType::f64);
            for (int64_t i : {int64_t{0}, 5 * dim, 65 * dim - 1}) wide.as<double>()[i] = value;
            *x = convert(wide, type);
          }
          return call.run({.clamp = 3}, {.isa = isa});
        };
        EXPECT_TRUE(same_bits(with(0), with(-std::numeric_limits<double>::infinity())))
            << name_of(isa) << " " << name_of(type) << " " << dim;
      }
    }
  }
}

TEST(ReluLinear, EmptyTensors) {
  const auto tensors = [](int64_t b, int64_t h, int64_t kv, int64_t lq, int64_t lk) {
    const Array q = Array::zeros(DType::f32, {b, h, lq, 4}),
                k = Array::zeros(DType::f32, {b, kv, lk, 4});
    const Array v = Array::zeros(DType::f32, {b, kv, lk, 3}), tau = Array::zeros(DType::f32, {h});
    const Array out = relu_linear_attention(q, k, v, tau);
    const ReluLinearGradients g = relu_linear_attention_backward(out, q, k, v, tau);
    for (const Array* a : {&out, &g.q, &g.k, &g.v, &g.temperature}) {
      for (int64_t i = 0; i < a->count(); ++i) EXPECT_EQ(a->as<float>()[i], 0);
    }
  };
  tensors(0, 2, 2, 3, 3);
  tensors(1, 0, 0, 3, 3);
  tensors(1, 0, 2, 3, 3);
  tensors(1, 2, 2, 0, 3);
  tensors(1, 2, 1, 3, 0);
}

TEST(ReluLinear, ErrorsNameTheArgument) {
  const auto says = [](const std::string& message, std::initializer_list<const char*> parts) {
    for (const char* part : parts) {
      EXPECT_NE(message.find(part), std::string::npos) << message << " lacks " << part;
    }
  };
  const Call c(DType::f32);
  const auto call = [&](const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& tau,
                        double clamp = 100) {
    return error_of([&] { relu_linear_attention(q, k, v, tau, {.clamp = clamp}); });
  };
  EXPECT_EQ(call(c.q, c.k, c.v, c.temperature), "");
  says(call({}, c.k, c.v, c.temperature), {"relu_linear_attention", "q is missing"});
  says(call(c.q, c.v, c.v, c.temperature), {"k has head dim 12", "16"});
  says(call(c.q, c.k, c.v.view().slice(2, 0, 5), c.temperature), {"v has number of keys 5", "90"});
  says(call(c.q.view().slice(1, 0, 3), c.k, c.v, c.temperature), {"3 heads", "multiple"});
  says(call(c.q, c.k, c.v, {}), {"temperature is missing", "[4]"});
  says(call(c.q, c.k, c.v, c.temperature.view().slice(0, 0, 2)), {"temperature [2]", "[4]"});
  says(call(c.q, c.k, c.v, convert(c.temperature, DType::bf16)),
       {"temperature", "bfloat16", "float32"});
  says(call(c.q, convert(c.k, DType::bf16), c.v, c.temperature), {"k", "bfloat16", "one type"});
  for (double clamp : {0.0, -1.0, std::nan(""), double{INFINITY}}) {
    says(call(c.q, c.k, c.v, c.temperature, clamp), {"clamp is", "positive"});
  }
  says(error_of([&] { relu_linear_attention(c.q, c.k, c.v, c.temperature, c.q); }),
       {"out", "[2,4,70,12]"});
  says(error_of([&] { relu_linear_attention_backward(c.q, c.q, c.k, c.v, c.temperature); }),
       {"grad_out", "[2,4,70,12]"});
  const Array s(DType::f32, {2, 4, 16, 11});
  says(error_of([&] { c.run({.forward_state = {s, {}}}); }),
       {"forward_state s", "[2,4,16,11]", "[2,4,16,12]"});
  const Array out = c.run();
  says(error_of([&] {
         relu_linear_attention_backward(out, c.q, c.k, c.v, c.temperature, {}, {c.q, c.k, c.v, {}});
       }),
       {"gradient of temperature is missing", "[4]"});
  says(error_of([&] { c.run({}, {.threads = 0}); }), {"threads is 0"});
}

}  // namespace
}  // namespace heed
