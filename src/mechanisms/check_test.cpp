// The checks themselves: a toy mechanism that is right passes, every way of being wrong is found.
#include "mechanisms/check.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "heed/error.h"

namespace heed {
namespace {

constexpr const char* kProduct = R"(cascade product
rank b h l d
in   X[b,h,l,d]  Y[b,h,l,d]
P[b,h,l,d]       = X[b,h,l,d] * Y[b,h,l,d]
out S[b,h,l]     = sum P[b,h,l,d]
)";
constexpr const char* kOther = R"(cascade other
rank b h l d
in   X[b,h,l,d]  Y[b,h,l,d]
out S[b,h,l]     = sum Y[b,h,l,d] * X[b,h,l,d]
)";
constexpr const char* kWrong = R"(cascade wrong
rank b h l d
in   X[b,h,l,d]  Y[b,h,l,d]
out S[b,h,l]     = max Y[b,h,l,d] * X[b,h,l,d]
)";

const ExampleCase kCase = {
    .name = "small", .inputs = {{"x", {2, 3, 5, 7}}, {"y", {2, 3, 5, 7}}}, .options = ""};

// out = sum_d x y in float64, rounded once; `spoil` may change the float64 result.
Mechanism toy(const std::function<void(double* values, int64_t count)>& spoil = nullptr) {
  Mechanism m;
  m.name = "toy_attention";
  m.cascades = {{"product", kProduct}, {"other", kOther}};
  m.outputs = {{"out", "S"}};
  m.cases = {kCase};
  m.bind = [](const NamedTensors& in, const Spec&) {
    cascade::Bindings bindings;
    bindings.tensors = {{"X", to_nd(in.at("x"))}, {"Y", to_nd(in.at("y"))}};
    return bindings;
  };
  m.forward = [spoil](const NamedTensors& in, const Spec&, const RunOptions&) {
    const auto x = to_nd(in.at("x")), y = to_nd(in.at("y"));
    const Dims& s = in.at("x").shape();
    Array sums = Array::zeros(DType::f64, {s[0], s[1], s[2]});
    for (size_t i = 0; i < x.values.size(); ++i) {
      sums.as<double>()[static_cast<int64_t>(i) / s[3]] += x.values[i] * y.values[i];
    }
    if (spoil) spoil(sums.as<double>(), sums.count());
    NamedArrays results;
    results.emplace("out", convert(sums, in.at("x").dtype()));
    return results;
  };
  return m;
}

Mechanism with_backward(double factor) {
  Mechanism m = toy();
  m.backward = [factor](const NamedTensors& in, const NamedTensors& out_gradients, const Spec&,
                        const RunOptions&) {
    const auto gradient = to_nd(out_gradients.at("out"));
    NamedArrays results;
    for (const auto& [name, other] : {std::pair{"x", "y"}, std::pair{"y", "x"}}) {
      const auto from = to_nd(in.at(other));
      Array wide(DType::f64, in.at(other).shape());
      for (size_t i = 0; i < from.values.size(); ++i) {
        wide.as<double>()[i] =
            factor * from.values[i] * gradient.values[i / static_cast<size_t>(from.shape.back())];
      }
      results.emplace(name, convert(wide, in.at(name).dtype()));
    }
    return results;
  };
  return m;
}

std::vector<CheckRow> rows_of(const Mechanism& m, DType dtype, Layout layout = Layout::contiguous) {
  return check_kernel(make_reference(m, kCase, dtype, 1), Isa::portable, layout);
}

TEST(Check, RightKernelPassesInEveryTypeAndLayout) {
  for (DType dtype : {DType::f64, DType::f32, DType::bf16, DType::f16}) {
    for (Layout layout : kLayouts) {
      const auto rows = rows_of(toy(), dtype, layout);
      ASSERT_EQ(rows.size(), 1u);
      EXPECT_TRUE(rows[0].ok()) << name_of(dtype) << name_of(layout) << rows[0].difference.where;
    }
  }
}

TEST(Check, WrongKernelsAreFound) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  for (DType dtype : {DType::f64, DType::f32, DType::bf16, DType::f16}) {
    const double u = dtype == DType::f64 ? 1e-12 : dtype == DType::f32 ? 1e-4 : 0.5;
    EXPECT_FALSE(rows_of(toy([&](double* v, int64_t) { v[3] += u; }), dtype)[0].ok());
    EXPECT_FALSE(rows_of(toy([&](double* v, int64_t) { v[0] = nan; }), dtype)[0].ok());
    EXPECT_FALSE(rows_of(toy([](double* v, int64_t n) { v[n - 1] = INFINITY; }), dtype)[0].ok());
  }
}

TEST(Check, CascadesSpeakOfTheCasesTheyAreFor) {
  Mechanism m = toy();
  m.cascades = {
      {"wrong", kWrong, "form=max"}, {"product", kProduct, "form=sum"}, {"other", kOther}};
  const auto names = [&](const char* options) {
    std::string text;
    for (const CascadeText* c : cascades_for(m, Spec::parse_options(options)))
      text += c->name + " ";
    return text;
  };
  EXPECT_EQ(names("form=sum"), "product other ");
  EXPECT_EQ(names("form=max"), "wrong other ");
  EXPECT_EQ(names(""), "other ");
  m.cascades.pop_back();
  EXPECT_THROW(names(""), Error);
  ExampleCase example = kCase;
  example.options = "form=sum";
  const Reference reference = make_reference(m, example, DType::f32, 1);
  EXPECT_TRUE(check_kernel(reference, Isa::portable, Layout::contiguous)[0].ok());
  EXPECT_TRUE(check_cascades(m, example, 1).empty());
}

TEST(Check, ExceptionsAndMissingResultsAreFailures) {
  Mechanism throws = toy([](double*, int64_t) { throw Error("x is too small"); });
  EXPECT_EQ(rows_of(throws, DType::f32)[0].failure, "x is too small");
  EXPECT_FALSE(rows_of(throws, DType::f32)[0].ok());
  Mechanism silent = toy();
  silent.forward = [](const NamedTensors&, const Spec&, const RunOptions&) {
    return NamedArrays{};
  };
  EXPECT_FALSE(rows_of(silent, DType::f32)[0].ok());
}

TEST(Check, BackwardIsComparedWithTheGradient) {
  for (DType dtype : {DType::f64, DType::f32, DType::bf16, DType::f16}) {
    const auto right = rows_of(with_backward(1), dtype);
    ASSERT_EQ(right.size(), 3u);
    for (const CheckRow& row : right) {
      EXPECT_TRUE(row.ok()) << row.result << row.failure << row.difference.where;
    }
    const auto wrong = rows_of(with_backward(2), dtype);
    EXPECT_TRUE(wrong[0].ok());
    EXPECT_EQ(wrong[1].result, "grad x");
    EXPECT_FALSE(wrong[1].ok());
    EXPECT_FALSE(wrong[2].ok());
  }
}

TEST(Check, FurtherCascadesMustAgree) {
  Mechanism m = toy();
  auto rows = check_cascades(m, kCase, 1);
  ASSERT_EQ(rows.size(), 1u);
  EXPECT_TRUE(rows[0].ok()) << rows[0].difference.where;
  m.cascades[1].text = kWrong;
  EXPECT_FALSE(check_cascades(m, kCase, 1)[0].ok());
}

TEST(Check, ReplayNamesThePoint) {
  EXPECT_EQ(rows_of(toy(), DType::bf16, Layout::padded)[0].replay,
            "heed check toy_attention --case small --dtype bfloat16 --isa portable "
            "--layout padded --seed 1");
}

TEST(Check, LayoutsKeepTheNumbers) {
  const NamedArrays inputs = make_inputs(toy(), kCase, DType::f32, 1);
  for (Layout layout : kLayouts) {
    const Arranged arranged = arrange(inputs, layout);
    const Tensor& x = arranged.tensors.at("x");
    EXPECT_EQ(to_nd(x).values, to_nd(inputs.at("x")).values);
    EXPECT_EQ(x.strides().back(), 1);
    EXPECT_EQ(x.is_contiguous(), layout == Layout::contiguous);
    EXPECT_EQ(parse_layout(name_of(layout)), layout);
  }
  EXPECT_THROW(parse_layout("paded"), Error);
}

TEST(Check, BoundFollowsTheStatedFormula) {
  const cascade::NdArray want{{2}, {-4, 1}};
  const Bound bound = allowed_error(DType::bf16, DType::f32, 0.5, want);
  EXPECT_EQ(bound.relative, 0x1p-24);
  EXPECT_EQ(bound.absolute, 1.5 + 4 * 0x1p-8);
  EXPECT_EQ(allowed_error(DType::f32, DType::f32, 0, want).absolute, 4 * 0x1p-20);
}

}  // namespace
}  // namespace heed
