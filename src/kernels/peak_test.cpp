#include "kernels/peak.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

namespace heed::kernels {
namespace {

TEST(Peak, LoopsCountWhatTheyDo) {
  for (Isa isa : available_isas()) {
    for (DType dtype : {DType::f32, DType::f64}) {
      double sink = 0;
      const int64_t one = run_multiply_adds(isa, dtype, 1, sink);
      EXPECT_GT(one, 0) << name_of(isa);
      EXPECT_EQ(run_multiply_adds(isa, dtype, 1000, sink), 1000 * one);
      // x -> 0.99 x + 0.01 goes to 1 in every lane of every sum.
      run_multiply_adds(isa, dtype, 5000, sink);
      EXPECT_NEAR(sink, static_cast<double>(one), 1e-3 * static_cast<double>(one));
    }
    double sink = 0;
    const int64_t one = run_half_multiply_adds(isa, 1, sink);
    EXPECT_EQ(run_half_multiply_adds(isa, 10, sink), 10 * one);
    EXPECT_TRUE(std::isfinite(sink));
  }
}

TEST(Peak, ReadingSumsEveryFloat) {
  for (Isa isa : available_isas()) {
    for (int64_t count : {0, 1, 7, 128, 1000}) {
      std::vector<float> data(static_cast<size_t>(count));
      double want = 0;
      for (int64_t i = 0; i < count; ++i) {
        data[static_cast<size_t>(i)] = static_cast<float>(i % 64);
        want += static_cast<double>(i % 64);
      }
      EXPECT_EQ(read_floats(isa, data.data(), count), want) << name_of(isa) << count;
    }
  }
}

}  // namespace
}  // namespace heed::kernels
