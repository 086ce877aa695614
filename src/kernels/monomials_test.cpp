// Monomials and their derivatives against plain products, on every instruction set this machine has.
#include "kernels/monomials.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>

namespace heed::kernels {
namespace {

TEST(Monomials, EachUnorderedChoiceOnceInOrder) {
  for (int64_t tile : {int64_t{4}, int64_t{7}, int64_t{512}}) {
    const MonomialList list(3, 3, tile);
    ASSERT_EQ(list.size(), 1 + 3 + 6 + 10);
    const auto factors = list.factors();
    std::vector<std::vector<int64_t>> found;
    for (const auto& f : factors) found.emplace_back(f.element, f.element + f.degree);
    const std::vector<std::vector<int64_t>> wanted = {
        {},        {0},       {1},       {2},       {0, 0},    {0, 1},    {0, 2},
        {1, 1},    {1, 2},    {2, 2},    {0, 0, 0}, {0, 0, 1}, {0, 0, 2}, {0, 1, 1},
        {0, 1, 2}, {0, 2, 2}, {1, 1, 1}, {1, 1, 2}, {1, 2, 2}, {2, 2, 2}};
    EXPECT_EQ(found, wanted);
    for (const MonomialRun* run = list.begin(0); run != list.end(); ++run) {
      EXPECT_EQ(run->first / tile, (run->end() - 1) / tile);
    }
  }
}

template <class T>
class MonomialRows : public testing::Test {};
using Types = testing::Types<float, double>;
TYPED_TEST_SUITE(MonomialRows, Types);

TYPED_TEST(MonomialRows, MapAndPull) {
  using T = TypeParam;
  constexpr DType kOwn = dtype_of<T>;
  constexpr int64_t kRows = 3;
  const double unit = sizeof(T) == 8 ? 1e-13 : 1e-4;
  std::mt19937 generator(1);
  std::normal_distribution<double> normal;
  for (Isa isa : available_isas()) {
    const MonomialKernels<T>& k = monomial_kernels<T>(isa);
    for (const auto& [width, order] :
         {std::pair<int64_t, int>{1, 3}, {5, 0}, {5, 1}, {19, 2}, {9, 3}, {64, 2}, {256, 1}}) {
      constexpr int64_t kTile = 64;
      const MonomialList list(width, order, kTile);
      const std::vector<double> exact = list.coefficients(0.7);
      std::vector<T> coefficients(exact.begin(), exact.end()), x(kRows * (width + 2) + 32);
      coefficients.resize(exact.size() + 16);
      for (T& value : x) value = static_cast<T>(normal(generator));
      const Rows rows{x.data(), kOwn, width + 2, kRows, width};
      const auto factors = list.factors();
      std::vector<double> pulled(kRows * width, 0);
      std::vector<T> into(static_cast<size_t>(kRows * (width + 3)), T{0});
      for (int64_t first = 0; first < list.size(); first += kTile) {
        const int64_t count = std::min(kTile, list.size() - first), stride = (count + 15) / 16 * 16;
        std::vector<T> to(static_cast<size_t>(kRows * stride), T{9}), g(to.size() + 16);
        for (T& value : g) value = static_cast<T>(normal(generator));
        k.map(list, rows, coefficients.data(), first, count, {to.data(), stride});
        k.pull(list, rows, coefficients.data(), first, count, {g.data(), stride},
               {into.data(), width + 3});
        for (int64_t r = 0; r < kRows; ++r) {
          for (int64_t i = 0; i < stride; ++i) {
            double want = i < count ? exact[static_cast<size_t>(first + i)] : 0;
            if (i < count) {
              const auto& f = factors[static_cast<size_t>(first + i)];
              for (int n = 0; n < f.degree; ++n) {
                double others = exact[static_cast<size_t>(first + i)];
                for (int m = 0; m < f.degree; ++m) {
                  if (m != n)
                    others *= double(x[static_cast<size_t>(r * (width + 2) + f.element[m])]);
                }
                pulled[static_cast<size_t>(r * width + f.element[n])] +=
                    others * double(g[static_cast<size_t>(r * stride + i)]);
                want *= double(x[static_cast<size_t>(r * (width + 2) + f.element[n])]);
              }
            }
            ASSERT_NEAR(to[static_cast<size_t>(r * stride + i)], want, unit * (1 + std::abs(want)))
                << name_of(isa);
          }
        }
      }
      for (int64_t r = 0; r < kRows; ++r) {
        for (int64_t e = 0; e < width; ++e) {
          const double want = pulled[static_cast<size_t>(r * width + e)];
          ASSERT_NEAR(into[static_cast<size_t>(r * (width + 3) + e)], want,
                      unit * (20 + std::abs(want)))
              << name_of(isa) << " " << width << " " << order;
        }
      }
    }
  }
}

}  // namespace
}  // namespace heed::kernels
