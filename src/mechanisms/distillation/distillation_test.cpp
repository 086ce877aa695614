// Identities of the paper, bits across thread counts, NaN, degenerate rows, empty tensors, messages.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <limits>

#include "engine/operands.h"
#include "heed/attention_distillation_loss.h"
#include "heed/feature_map.h"
#include "mechanisms/test_arrays.h"

namespace heed {
namespace {

Array positive(DType type, const Dims& shape, uint32_t seed) {
  Array wide = random_array(DType::f64, shape, seed);
  for (int64_t i = 0; i < wide.count(); ++i) wide.as<double>()[i] = std::exp(wide.as<double>()[i]);
  return convert(wide, type);
}

double value(const Array& loss) {
  return loss.dtype() == DType::f64 ? *loss.as<double>() : static_cast<double>(*loss.as<float>());
}

struct Call {
  Array q, k, fq, fk;
  explicit Call(DType type, int64_t queries = 70, int64_t keys = 90, int64_t features = 12)
      : q(random_array(type, {2, 4, queries, 16}, 1)),
        k(random_array(type, {2, 2, keys, 16}, 2)),
        fq(positive(type, {2, 4, queries, features}, 3)),
        fk(positive(type, {2, 2, keys, features}, 4)) {}
  double loss(const DistillationOptions& options = {}, const RunOptions& run = {}) const {
    return value(attention_distillation_loss(q, k, fq, fk, options, run));
  }
};

Array one(DType type) {
  Array array(type, {});
  type == DType::f64 ? *array.as<double>() = 1 : *array.as<float>() = 1;
  return array;
}

TEST(Distillation, SameBitsForAnyThreadCount) {
  for (DType type : {DType::f64, DType::f32, DType::bf16, DType::f16}) {
    for (int64_t keys : {300, 2200}) {
      const Call call(type, 150, keys);
      const Array gradient = one(wide_type(type));
      const auto backward = [&](int threads) {
        return attention_distillation_loss_backward(gradient, call.q, call.k, call.fq, call.fk,
                                                    {.causal = true}, {.threads = threads});
      };
      const double loss = call.loss({.causal = true}, {.threads = 1});
      const DistillationGradients first = backward(1);
      for (int threads : {2, 5}) {
        EXPECT_EQ(loss, call.loss({.causal = true}, {.threads = threads}));
        const DistillationGradients other = backward(threads);
        EXPECT_TRUE(same_bits(first.feature_q, other.feature_q));
        EXPECT_TRUE(same_bits(first.feature_k, other.feature_k));
      }
    }
  }
}

TEST(Distillation, GradientsMadeWithTheLossAreThoseOfTheBackward) {
  for (DType type : {DType::f64, DType::f32, DType::bf16, DType::f16}) {
    const Call call(type, 150, 2200);
    const DType wide = wide_type(type);
    const DistillationOptions causal{.causal = true};
    const Array loss(wide, {});
    const DistillationGradients found{Array(wide, call.fq.shape()), Array(wide, call.fk.shape())};
    attention_distillation_loss_with_gradients(call.q, call.k, call.fq, call.fk, loss,
                                               {found.feature_q, found.feature_k}, causal);
    EXPECT_EQ(value(loss), call.loss(causal));
    const DistillationGradients needed =
        attention_distillation_loss_backward(one(wide), call.q, call.k, call.fq, call.fk, causal);
    EXPECT_TRUE(same_bits(convert(found.feature_q, type), needed.feature_q)) << name_of(type);
    EXPECT_TRUE(same_bits(convert(found.feature_k, type), needed.feature_k)) << name_of(type);
    EXPECT_THROW(attention_distillation_loss_with_gradients(call.q, call.k, call.fq, call.fk, loss,
                                                            {found.feature_k, found.feature_q}),
                 Error);
  }
}

// One head is cut into parts of its queries for many threads, many heads are not.
TEST(Distillation, ManyHeadsAreManyCallsOfOne) {
  constexpr int64_t kHeads = 70;
  const Array q = random_array(DType::f64, {1, kHeads, 300, 5}, 1);
  const Array k = random_array(DType::f64, {1, kHeads, 310, 5}, 2);
  const Array fq = positive(DType::f64, {1, kHeads, 300, 3}, 3);
  const Array fk = positive(DType::f64, {1, kHeads, 310, 3}, 4);
  const DistillationOptions causal{.causal = true};
  const DistillationGradients all =
      attention_distillation_loss_backward(one(DType::f64), q, k, fq, fk, causal);
  for (int64_t h = 0; h < kHeads; h += 23) {
    const auto head = [h](const Array& heads) { return heads.view().slice(1, h, h + 1); };
    const DistillationGradients single = attention_distillation_loss_backward(
        one(DType::f64), head(q), head(k), head(fq), head(fk), causal);
    for (const auto& part :
         {&DistillationGradients::feature_q, &DistillationGradients::feature_k}) {
      const Array& found = all.*part;
      const Array& alone = single.*part;
      for (int64_t i = 0; i < alone.count(); ++i) {
        const double want = alone.as<double>()[i] / kHeads;
        ASSERT_NEAR(found.as<double>()[h * alone.count() + i], want,
                    1e-13 * (1e-5 + std::abs(want)));
      }
    }
  }
}

TEST(Distillation, ConstantFeaturesGiveTheLogarithmOfTheNumberOfKeys) {
  Call call(DType::f64, 40, 40);
  std::fill_n(call.fq.as<double>(), call.fq.count(), 0.7);
  std::fill_n(call.fk.as<double>(), call.fk.count(), 1.3);
  EXPECT_NEAR(call.loss(), std::log(40.0), 1e-13);
  double mean = 0;
  for (int64_t i = 1; i <= 40; ++i) mean += std::log(static_cast<double>(i)) / 40;
  EXPECT_NEAR(call.loss({.causal = true}), mean, 1e-13);
}

// Half a unit in the last place of such scores is more than an exponent holds.
TEST(Distillation, ScoresBeyondTheRangeOfExponents) {
  Call call(DType::f32, 40, 40);
  std::fill_n(call.fq.as<float>(), call.fq.count(), 0.7f);
  std::fill_n(call.fk.as<float>(), call.fk.count(), 1.3f);
  for (Isa isa : available_isas()) {
    RunOptions run;
    run.isa = isa;
    EXPECT_NEAR(call.loss({.scale = 1e12}, run), std::log(40.0), 1e-5) << name_of(isa);
  }
}

TEST(Distillation, IsTheEntropyOfTheTeacherWhereTheStudentIsTheTeacher) {
  // Taylor features are exact to second order: with tiny scores student and teacher agree, the loss is
  // at its least, and the gradient vanishes.
  const double size = 1e-3;
  const Array q = random_array(DType::f64, {1, 1, 30, 4}, 1, size),
              k = random_array(DType::f64, {1, 1, 30, 4}, 2, size);
  const Array fq = feature_map(q, FeatureKind::taylor2), fk = feature_map(k, FeatureKind::taylor2);
  const DistillationGradients at_best =
      attention_distillation_loss_backward(one(DType::f64), q, k, fq, fk);
  for (int64_t i = 0; i < fq.count(); ++i) {  // below the cubic term: (1e-6)^3 / 6 / 30
    EXPECT_LT(std::abs(at_best.feature_q.as<double>()[i]), 1e-16);
  }
  EXPECT_NEAR(value(attention_distillation_loss(q, k, fq, fk)), std::log(30.0), 1e-10);
  const Array other = positive(DType::f64, fq.shape(), 7);
  EXPECT_GT(value(attention_distillation_loss(q, k, other, fk)),
            value(attention_distillation_loss(q, k, fq, fk)) + 1e-12);
}

TEST(Distillation, ScalesOfTheFeaturesDoNotMatter) {
  Call call(DType::f64);
  const double before = call.loss({.causal = true});
  for (int64_t i = 0; i < call.fq.count(); ++i)
    call.fq.as<double>()[i] *= 1.0 + static_cast<double>(i / 12 % 9);
  for (int64_t i = 0; i < call.fk.count(); ++i) call.fk.as<double>()[i] *= 0.01;
  EXPECT_NEAR(call.loss({.causal = true}), before, 1e-12);
}

TEST(Distillation, TheFirstCausalQueryHasNoGradient) {
  for (DType type : {DType::f64, DType::f32}) {
    const Call call(type, 40, 40);
    const DistillationGradients g = attention_distillation_loss_backward(
        one(type), call.q, call.k, call.fq, call.fk, {.causal = true});
    const Array wide = convert(g.feature_q, DType::f64);
    for (int64_t f = 0; f < 12; ++f) EXPECT_EQ(wide.as<double>()[f], 0);
  }
}

TEST(Distillation, RowsWithoutKeysAndFeaturesWithoutSum) {
  Call call(DType::f32, 50, 20);  // causal: 30 queries see nothing
  const DistillationGradients g = attention_distillation_loss_backward(
      one(DType::f32), call.q, call.k, call.fq, call.fk, {.causal = true});
  EXPECT_TRUE(std::isfinite(call.loss({.causal = true})));
  for (int64_t i = 0; i < 30 * 12; ++i) EXPECT_EQ(g.feature_q.as<float>()[i], 0);
  std::fill_n(call.fq.as<float>(), call.fq.count(), 0.0f);
  EXPECT_NEAR(call.loss(), 12 * std::log(10.0), 1e-4);  // every weight is at the floor
  const DistillationGradients zero =
      attention_distillation_loss_backward(one(DType::f32), call.q, call.k, call.fq, call.fk);
  for (int64_t i = 0; i < zero.feature_q.count(); ++i) EXPECT_EQ(zero.feature_q.as<float>()[i], 0);
}

TEST(Distillation, NanShows) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (Isa isa : available_isas()) {
    for (int which = 0; which < 4; ++which) {
      Call call(DType::f32);
      Array* inputs[] = {&call.q, &call.k, &call.fq, &call.fk};
      inputs[which]->as<float>()[17] = nan;
      EXPECT_TRUE(std::isnan(call.loss({}, {.isa = isa}))) << which << name_of(isa);
    }
    Call causal(DType::f32, 40, 40);  // what no query sees must not matter
    const Tensor q = causal.q.view().slice(2, 0, 30), fq = causal.fq.view().slice(2, 0, 30);
    const Tensor k = causal.k.view().slice(2, 0, 30), fk = causal.fk.view().slice(2, 0, 30);
    const double before =
        value(attention_distillation_loss(q, k, fq, fk, {.causal = true}, {.isa = isa}));
    for (int64_t i = 30 * 16; i < 40 * 16; ++i) causal.k.as<float>()[i] = nan;
    EXPECT_EQ(value(attention_distillation_loss(q, k, fq, fk, {.causal = true}, {.isa = isa})),
              before);
  }
}

TEST(Distillation, EmptyTensors) {
  for (const auto& [b, h, kv, lq, lk] : {std::array<int64_t, 5>{0, 2, 2, 3, 3},
                                         {1, 0, 0, 3, 3},
                                         {1, 2, 2, 0, 3},
                                         {1, 2, 1, 3, 0},
                                         {1, 0, 2, 3, 3}}) {
    const Array q = Array::zeros(DType::f32, {b, h, lq, 4}),
                k = Array::zeros(DType::f32, {b, kv, lk, 4});
    const Array fq = Array::zeros(DType::f32, {b, h, lq, 5}),
                fk = Array::zeros(DType::f32, {b, kv, lk, 5});
    EXPECT_EQ(value(attention_distillation_loss(q, k, fq, fk)), 0);
    const DistillationGradients g =
        attention_distillation_loss_backward(one(DType::f32), q, k, fq, fk);
    for (const Array* a : {&g.feature_q, &g.feature_k}) {
      for (int64_t i = 0; i < a->count(); ++i) EXPECT_EQ(a->as<float>()[i], 0);
    }
  }
}

TEST(Distillation, ErrorsNameTheArgument) {
  const auto says = [](const std::string& message, std::initializer_list<const char*> parts) {
    for (const char* part : parts) {
      EXPECT_NE(message.find(part), std::string::npos) << message << " lacks " << part;
    }
  };
  const Call c(DType::f32);
  const auto call = [&](const Tensor& q, const Tensor& k, const Tensor& fq, const Tensor& fk,
                        const DistillationOptions& options = {}) {
    return error_of([&] { attention_distillation_loss(q, k, fq, fk, options); });
  };
  EXPECT_EQ(call(c.q, c.k, c.fq, c.fk), "");
  says(call({}, c.k, c.fq, c.fk), {"attention_distillation_loss", "q is missing"});
  says(call(c.q, c.fk, c.fq, c.fk), {"k has head dim 12", "16"});
  says(call(c.q, c.k, {}, c.fk), {"feature_q is missing"});
  says(call(c.q, c.k, c.fq.view().slice(2, 0, 9), c.fk),
       {"feature_q [2,4,9,12]", "heads and queries"});
  says(call(c.q, c.k, c.fq, c.fk.view().slice(2, 0, 9)), {"feature_k [2,2,9,12]", "keys of k"});
  says(call(c.q, c.k, c.fq, c.fk.view().slice(3, 0, 9)), {"feature_k [2,2,90,9]", "features"});
  const Array three = positive(DType::f32, {2, 3, 90, 12}, 1);
  says(call(c.q, c.k, c.fq, three), {"4 heads", "feature_k has 3", "multiple"});
  says(call(c.q, c.k, c.fq, convert(c.fk, DType::bf16)), {"feature_k", "bfloat16", "float32"});
  const Array wide_fq = convert(c.fq, DType::f64), wide_fk = convert(c.fk, DType::f64);
  says(call(c.q, c.k, wide_fq, wide_fk), {"feature_q", "of type float32; float32 is needed"});
  const Array half_q = convert(c.q, DType::bf16), half_k = convert(c.k, DType::bf16);
  says(call(half_q, half_k, c.fq, convert(c.fk, DType::bf16)), {"feature_q", "one type"});
  EXPECT_EQ(call(half_q, half_k, c.fq, c.fk), "");
  says(call(c.q, c.k, c.fq, c.fk, {.scale = std::nan("")}), {"scale is nan", "finite"});
  says(error_of([&] { attention_distillation_loss(c.q, c.k, c.fq, c.fk, c.q); }),
       {"loss", "[] of type float32"});
  says(error_of(
           [&] { attention_distillation_loss_backward(one(DType::f64), c.q, c.k, c.fq, c.fk); }),
       {"grad_loss", "float64", "[] of type float32"});
}

}  // namespace
}  // namespace heed
