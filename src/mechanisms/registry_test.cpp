#include "mechanisms/registry.h"

#include <gtest/gtest.h>

#include <cmath>
#include <set>

#include "heed/error.h"
#include "mechanisms/embedded.h"

namespace heed {
namespace {

Mechanism toy() {
  Mechanism m;
  m.name = "toy_attention";
  m.fill = [](const ExampleCase&, const std::string& input, uint64_t seed, const Tensor& to_fill) {
    if (input == "lengths") *to_fill.as<int32_t>() = static_cast<int32_t>(seed);
  };
  return m;
}

const ExampleCase kToyCase = {
    .name = "one",
    .inputs = {{"q", {2, 3, 5, 7}}, {"k", {2, 3, 5, 7}}, {"slopes", {3}}, {"lengths", {1}}},
    .options = "causal=1",
    .types = {{"slopes", DType::f32}, {"lengths", DType::i32}}};

std::string message_for(std::string_view name) {
  try {
    find_mechanism(name);
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

TEST(Registry, EveryRecordIsComplete) {
  std::set<std::string> names;
  ASSERT_FALSE(mechanisms().empty());
  for (const Mechanism& m : mechanisms()) {
    SCOPED_TRACE(m.name);
    EXPECT_TRUE(names.insert(m.name).second) << "two records of one name";
    EXPECT_FALSE(m.title.empty());
    EXPECT_FALSE(m.sheets.empty());
    EXPECT_FALSE(m.card.empty());
    EXPECT_FALSE(m.cascades.empty());
    EXPECT_FALSE(m.outputs.empty());
    EXPECT_FALSE(m.cases.empty());
    EXPECT_FALSE(m.bench_cases.empty());
    EXPECT_TRUE(m.forward != nullptr);
    EXPECT_TRUE(m.bind != nullptr);
    EXPECT_TRUE(m.explain != nullptr);
    EXPECT_EQ(&find_mechanism(m.name), &m);
    for (const auto* cases : {&m.cases, &m.bench_cases}) {
      std::set<std::string> case_names;
      for (const ExampleCase& example : *cases) {
        EXPECT_TRUE(case_names.insert(example.name).second) << example.name << " is there twice";
        Spec::parse_options(example.options);
      }
    }
  }
}

TEST(Registry, ShortNamesWork) {
  EXPECT_EQ(brief_name(find_mechanism("flash_attention")), "flash");
  for (const Mechanism& m : mechanisms()) {
    EXPECT_EQ(&find_mechanism(brief_name(m)), &m);
    EXPECT_FALSE(brief_name(m).ends_with("_attention"));
  }
}

TEST(Registry, UnknownNameNamesTheNearestAndAll) {
  ASSERT_FALSE(mechanisms().empty());
  const std::string& known = mechanisms().front().name;
  std::string typo = known;
  std::swap(typo[0], typo[1]);
  const std::string message = message_for(typo);
  EXPECT_NE(message.find("'" + typo + "'"), std::string::npos) << message;
  EXPECT_NE(message.find("did you mean '" + known + "'"), std::string::npos) << message;
  EXPECT_NE(message_for("").find(known), std::string::npos);
}

TEST(Inputs, SameSeedSameNumbers) {
  const Mechanism m = toy();
  const NamedArrays a = make_inputs(m, kToyCase, DType::f32, 7);
  const NamedArrays b = make_inputs(m, kToyCase, DType::f32, 7);
  const NamedArrays c = make_inputs(m, kToyCase, DType::f32, 8);
  EXPECT_EQ(to_nd(a.at("q")).values, to_nd(b.at("q")).values);
  EXPECT_NE(to_nd(a.at("q")).values, to_nd(c.at("q")).values);
  EXPECT_NE(to_nd(a.at("q")).values, to_nd(a.at("k")).values);
}

TEST(Inputs, TypesAndFill) {
  const Mechanism m = toy();
  const NamedArrays half = make_inputs(m, kToyCase, DType::bf16, 3);
  EXPECT_EQ(half.at("q").dtype(), DType::bf16);
  EXPECT_EQ(half.at("slopes").dtype(), DType::f32);
  EXPECT_EQ(half.at("lengths").dtype(), DType::i32);
  EXPECT_EQ(half.at("lengths").as<int32_t>()[0], 3);
  EXPECT_EQ(make_inputs(m, kToyCase, DType::f64, 3).at("slopes").dtype(), DType::f64);
  EXPECT_THROW(make_inputs(m, kToyCase, DType::i32, 3), Error);
}

TEST(Inputs, LowerPrecisionIsTheRoundedFloat64) {
  const Mechanism m = toy();
  const NamedArrays wide = make_inputs(m, kToyCase, DType::f64, 3);
  const NamedArrays narrow = make_inputs(m, kToyCase, DType::f16, 3);
  const auto from = to_nd(wide.at("q")).values, to = to_nd(narrow.at("q")).values;
  for (size_t i = 0; i < from.size(); ++i) EXPECT_NEAR(to[i], from[i], 0x1p-11 * std::abs(from[i]));
}

TEST(Inputs, AreStandardNormal) {
  const ExampleCase large = {.name = "large", .inputs = {{"q", {100, 1001}}}, .options = ""};
  const auto values = to_nd(make_inputs(toy(), large, DType::f64, 1).at("q")).values;
  double sum = 0, squares = 0, fourth = 0;
  for (double x : values) {
    sum += x;
    squares += x * x;
    fourth += x * x * x * x;
  }
  const auto n = static_cast<double>(values.size());  // 5 standard errors each
  EXPECT_NEAR(sum / n, 0, 5 / std::sqrt(n));
  EXPECT_NEAR(squares / n, 1, 5 * std::sqrt(2 / n));
  EXPECT_NEAR(fourth / n, 3, 5 * std::sqrt(96 / n));
}

TEST(ToNd, FollowsStridesAndTypes) {
  float memory[] = {0, 1, 2, 3, 4, 5};
  const auto transposed = to_nd(Tensor(memory, DType::f32, {3, 2}, {1, 3}));
  EXPECT_EQ(transposed.shape, (std::vector<int64_t>{3, 2}));
  EXPECT_EQ(transposed.values, (std::vector<double>{0, 3, 1, 4, 2, 5}));
  int64_t whole[] = {-1, 4};
  EXPECT_EQ(to_nd(Tensor(whole, DType::i64, {2})).values, (std::vector<double>{-1, 4}));
  EXPECT_EQ(to_nd(Tensor(memory + 4, DType::f32, {})).values, (std::vector<double>{4}));
  EXPECT_TRUE(to_nd(Tensor(memory, DType::f32, {2, 0})).values.empty());
}

TEST(Embedded, HoldsTheFilesOfTheFolders) {
  for (std::string_view name : embedded_names()) {
    EXPECT_NE(name.find('/'), std::string_view::npos) << name;
    EXPECT_FALSE(embedded(name).empty()) << name;
  }
  EXPECT_THROW(embedded("flash/no-such-file"), std::logic_error);
}

}  // namespace
}  // namespace heed
