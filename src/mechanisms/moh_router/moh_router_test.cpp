// Identities of the paper's sheet, ties, bits across thread counts, NaN, empty tensors and messages.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <numeric>

#include "engine/operands.h"
#include "heed/heed.h"
#include "mechanisms/moh_router/routing.h"
#include "mechanisms/test_arrays.h"

namespace heed {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

std::vector<double> values(const Tensor& t) {
  const Array wide = convert(t, DType::f64);
  return {wide.as<double>(), wide.as<double>() + wide.count()};
}

MohRouterOptions top(int64_t k, MohForm form = MohForm::code) { return {k, form}; }

TEST(MohRouter, UniformLogitsTurnTheActiveHeadsOnAndTheLossIsTheirNumber) {
  const Array x = random_array(DType::f32, {2, 7, 16}, 1);
  const Array wg = Array::zeros(DType::f32, {6, 16}), shared = Array::zeros(DType::f32, {3, 16});
  const Array group = Array::zeros(DType::f32, {2, 16});
  for (Isa isa : available_isas()) {
    RunOptions run;
    run.isa = isa;
    const MohRouting code = moh_router(x, wg, shared, group, top(4), run);
    const MohRouting paper = moh_router(x, wg, shared, group, top(4, MohForm::paper), run);
    for (int64_t i = 0; i < code.gates.count(); ++i) {
      const int64_t head = i / 7 % 9;
      // Ties go to the lower heads: 3 shared, then 4 of the 6 routed.
      EXPECT_FLOAT_EQ(code.gates.as<float>()[i], head < 7 ? 1 : 0);
      EXPECT_FLOAT_EQ(paper.gates.as<float>()[i], head < 3 ? 1.0 / 6 : head < 7 ? 1.0 / 12 : 0);
    }
    EXPECT_FLOAT_EQ(*code.load_balance_loss.as<float>(), 4);
    EXPECT_FLOAT_EQ(*paper.load_balance_loss.as<float>(), 4.0 / 6);
  }
}

TEST(MohRouter, GatesOfATokenSumToWhatTheGroupsAllow) {
  const Array x = random_array(DType::f64, {1, 40, 8}, 1), wg = random_array(DType::f64, {6, 8}, 2);
  const Array shared = random_array(DType::f64, {3, 8}, 3),
              group = random_array(DType::f64, {2, 8}, 4);
  const std::vector<double> gates = values(moh_router(x, wg, shared, group, top(2)).gates);
  for (size_t t = 0; t < 40; ++t) {
    double z[2] = {}, sum = 0;
    for (size_t c = 0; c < 8; ++c) {
      for (size_t u = 0; u < 2; ++u)
        z[u] += x.as<double>()[t * 8 + c] * group.as<double>()[u * 8 + c];
    }
    const double s = 1 / (1 + std::exp(z[1] - z[0]));
    for (size_t h = 0; h < 9; ++h) sum += gates[h * 40 + t];
    EXPECT_NEAR(sum, 2 * (s * 3 + (1 - s) * 2), 1e-12);
  }
}

TEST(MohRouter, WithAllHeadsActiveTheFormsDifferByConstants) {
  const Array x = random_array(DType::f64, {2, 9, 8}, 1), wg = random_array(DType::f64, {5, 8}, 2);
  const Array shared = random_array(DType::f64, {3, 8}, 3),
              group = random_array(DType::f64, {2, 8}, 4);
  const MohRouting code = moh_router(x, wg, shared, group, top(5));
  const MohRouting paper = moh_router(x, wg, shared, group, top(5, MohForm::paper));
  for (int64_t i = 0; i < code.gates.count(); ++i) {
    const double factor = i / 9 % 8 < 3 ? 2 * 3 : 2 * 5;
    EXPECT_NEAR(paper.gates.as<double>()[i] * factor, code.gates.as<double>()[i], 1e-12);
  }
  EXPECT_NEAR(*paper.load_balance_loss.as<double>() * 5, *code.load_balance_loss.as<double>(),
              1e-12);
  EXPECT_NEAR(*code.load_balance_loss.as<double>(), 5, 1e-12);  // every load is 1
}

TEST(MohRouter, OneHeadTakingAllIsTheWorstLoad) {
  Array x = Array::zeros(DType::f64, {1, 30, 4}), wg = Array::zeros(DType::f64, {6, 4});
  for (int64_t t = 0; t < 30; ++t) x.as<double>()[t * 4] = 1;
  wg.as<double>()[2 * 4] = 1000;
  EXPECT_NEAR(*moh_router(x, wg, {}, {}, top(1)).load_balance_loss.as<double>(), 6, 1e-12);
}

TEST(MohRouter, InactiveLogitsHaveNoTaskGradientInTheCodeForm) {
  const Array x = random_array(DType::f64, {1, 1, 8}, 1), wg = random_array(DType::f64, {6, 8}, 2);
  const Array gradient = random_array(DType::f64, {1, 6, 1}, 3);
  const MohRouting routing = moh_router(x, wg, {}, {}, top(2));
  const auto code = moh_router_backward(gradient, {}, x, wg, {}, {}, top(2));
  const auto paper = moh_router_backward(gradient, {}, x, wg, {}, {}, top(2, MohForm::paper));
  for (int64_t e = 0; e < 6; ++e) {
    const bool active = routing.gates.as<double>()[e] != 0;
    for (int64_t c = 0; c < 8; ++c) {
      EXPECT_EQ(code.wg.as<double>()[e * 8 + c] != 0, active);
      EXPECT_NE(paper.wg.as<double>()[e * 8 + c], 0);
    }
  }
}

TEST(MohRouter, OneActiveHeadHasTheGateOneAndGivesTheRouterNothing) {
  const Array x = random_array(DType::f64, {1, 9, 8}, 1), wg = random_array(DType::f64, {6, 8}, 2);
  const std::vector<double> gates = values(moh_router(x, wg, {}, {}, top(1)).gates);
  for (size_t t = 0; t < 9; ++t) {
    double sum = 0;
    for (size_t e = 0; e < 6; ++e) sum += gates[e * 9 + t];
    EXPECT_EQ(sum, 1);
  }
  const Array gradient = random_array(DType::f64, {1, 6, 9}, 3);
  const auto back = moh_router_backward(gradient, {}, x, wg, {}, {}, top(1));
  for (double g : values(back.wg)) EXPECT_EQ(g, 0);
}

TEST(MohRouter, PermutingRoutedHeadsPermutesTheirGates) {
  const Array x = random_array(DType::f32, {2, 15, 8}, 1), wg = random_array(DType::f32, {5, 8}, 2);
  Array turned = convert(wg, DType::f32);
  for (int64_t e = 0; e < 5; ++e) {
    copy(wg.view().select(0, e), turned.view().select(0, (e + 2) % 5));
  }
  const MohRouting a = moh_router(x, wg, {}, {}, top(2)), b = moh_router(x, turned, {}, {}, top(2));
  for (int64_t e = 0; e < 5; ++e) {
    EXPECT_LT(
        largest_difference(a.gates.view().select(1, e), b.gates.view().select(1, (e + 2) % 5)),
        1e-6);
  }
}

TEST(MohRouter, TheLargestAreChosenTiesToTheLowerAndNaNLast) {
  std::vector<char> chosen;
  const auto choose = [&](std::vector<double> logits, int64_t k) {
    moh::choose_heads(logits.data(), static_cast<int64_t>(logits.size()), k, chosen);
    return std::vector<int>(chosen.begin(), chosen.end());
  };
  EXPECT_EQ(choose({1, 3, 2, 3}, 2), (std::vector<int>{0, 1, 0, 1}));
  EXPECT_EQ(choose({3, 1, 3, 3}, 2), (std::vector<int>{1, 0, 1, 0}));
  EXPECT_EQ(choose({kNaN, 1, -INFINITY, 2}, 3), (std::vector<int>{0, 1, 1, 1}));
  EXPECT_EQ(choose({kNaN, kNaN}, 1), (std::vector<int>{1, 0}));
}

TEST(MohRouter, NaNStaysWithItsTokenAndIsSeen) {
  Array x = random_array(DType::f32, {1, 70, 8}, 1);
  x.as<float>()[66 * 8 + 3] = static_cast<float>(kNaN);
  const Array wg = random_array(DType::f32, {6, 8}, 2), group = random_array(DType::f32, {2, 8}, 3);
  const MohRouting routing = moh_router(x, wg, {}, group, top(2));
  for (int64_t i = 0; i < routing.gates.count(); ++i) {
    EXPECT_EQ(std::isnan(routing.gates.as<float>()[i]), i % 70 == 66) << i;
  }
  EXPECT_TRUE(std::isnan(*routing.load_balance_loss.as<float>()));
}

TEST(MohRouter, SameBitsForAnyThreadCountAndStrides) {
  for (DType type : {DType::f64, DType::f32, DType::bf16, DType::f16}) {
    const Array x = random_array(type, {3, 400, 20}, 1), wg = random_array(type, {6, 20}, 2);
    const Array shared = random_array(type, {2, 20}, 3), group = random_array(type, {2, 20}, 4);
    const Array gradient = random_array(type, {3, 8, 400}, 5);
    Array loss = Array(wide_type(type), Dims{});
    copy(random_array(DType::f64, Dims{}, 6), loss);
    RunOptions run;
    run.threads = 1;
    const MohRouting one = moh_router(x, wg, shared, group, top(3), run);
    const auto back = moh_router_backward(gradient, loss, x, wg, shared, group, top(3), run);
    const Tensor tokens_last(x.view().data(), type, {3, 20, 400}, {8000, 1, 20});
    const Array turned = convert(tokens_last, type);  // [3,20,400]
    const Tensor strided(turned.view().data(), type, {3, 400, 20}, {8000, 1, 400});
    for (int threads : {1, 2, 5}) {
      run.threads = threads;
      for (const Tensor& given : {x.view(), strided}) {
        const MohRouting more = moh_router(given, wg, shared, group, top(3), run);
        EXPECT_TRUE(same_bits(one.gates, more.gates)) << name_of(type);
        EXPECT_TRUE(same_bits(one.load_balance_loss, more.load_balance_loss)) << name_of(type);
        const auto again =
            moh_router_backward(gradient, loss, given, wg, shared, group, top(3), run);
        EXPECT_TRUE(same_bits(back.x, again.x)) << name_of(type);
        EXPECT_TRUE(same_bits(back.wg, again.wg)) << name_of(type);
        EXPECT_TRUE(same_bits(back.wg_shared, again.wg_shared)) << name_of(type);
        EXPECT_TRUE(same_bits(back.wg_group, again.wg_group)) << name_of(type);
      }
    }
  }
}

TEST(MohRouter, TensorsWithoutElements) {
  for (const Dims& shape : {Dims{0, 5, 4}, Dims{2, 0, 4}, Dims{2, 5, 0}}) {
    const Array x(DType::f32, shape), wg = Array::zeros(DType::f32, {3, shape[2]});
    const MohRouting routing = moh_router(x, wg, {}, {}, top(2));
    EXPECT_EQ(routing.gates.shape(), (Dims{shape[0], 3, shape[1]}));
    EXPECT_FLOAT_EQ(*routing.load_balance_loss.as<float>(), shape[2] == 0 ? 2 : 0);
    const auto gradients =
        moh_router_backward(routing.gates, routing.load_balance_loss, x, wg, {}, {}, top(2));
    EXPECT_EQ(gradients.x.shape(), shape);
    for (double g : values(gradients.wg)) EXPECT_EQ(g, 0);
  }
}

TEST(MohRouter, ErrorsNameTheArgument) {
  const Array x = random_array(DType::f32, {2, 5, 8}, 1), wg = random_array(DType::f32, {4, 8}, 2);
  const Array shared = random_array(DType::f32, {3, 8}, 3),
              group = random_array(DType::f32, {2, 8}, 4);
  const Array no_heads(DType::f32, {0, 8});
  const auto says = [](const std::string& message, std::initializer_list<const char*> parts) {
    for (const char* part : parts) {
      EXPECT_NE(message.find(part), std::string::npos) << message << " lacks " << part;
    }
  };
  const auto call = [&](const Tensor& w, const Tensor& s, const Tensor& g, int64_t k) {
    return error_of([&] { moh_router(x, w, s, g, top(k)); });
  };
  says(call(wg, {}, {}, 0), {"moh_router", "top_k is 0", "1 to 4"});
  says(call(wg, {}, {}, 5), {"top_k is 5", "1 to 4"});
  says(call(no_heads, shared, {}, 1), {"top_k is 1", "0 to 0"});
  says(call(no_heads, {}, {}, 0), {"no heads", "wg_shared is missing"});
  says(call(no_heads, shared, group, 0), {"wg_group is given", "leave wg_group out"});
  says(call(wg, shared, {}, 2), {"wg_shared is given without wg_group", "[2,8]"});
  says(call(wg, no_heads, group, 2), {"wg_shared [0,8]", "hs >= 1"});
  says(call(group.view().slice(1, 0, 7), {}, {}, 1), {"wg [2,7]", "[2,8]"});
  says(call(wg, shared, shared, 1), {"wg_group [3,8]", "[2,8]"});
  says(call({}, {}, {}, 1), {"wg is missing"});
  EXPECT_EQ(parse_moh_form("code"), MohForm::code);
  EXPECT_EQ(parse_moh_form("paper"), MohForm::paper);
  says(error_of([] { parse_moh_form("code2"); }), {"form is 'code2'", "'code'", "'paper'"});
  says(error_of([&] { moh_router(wg, wg, {}, {}, top(1)); }), {"x [4,8]", "[B,L,C]"});
  says(error_of([&] { moh_router_backward(x, {}, x, wg, {}, {}, top(1)); }),
       {"grad_gates [2,5,8]", "[2,4,5]"});
  says(error_of([&] { moh_router_backward({}, x, x, wg, {}, {}, top(1)); }),
       {"grad_loss [2,5,8]", "[] float32"});
}

}  // namespace
}  // namespace heed
