#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <limits>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "base/blocks.h"
#include "base/huge_pages.h"
#include "base/parallel.h"
#include "base/philox.h"
#include "base/round_up.h"
#include "heed/error.h"
#include "heed/tensor.h"

namespace heed {
namespace {

TEST(HalfFloats, EveryBfloat16SurvivesTheRoundTrip) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    bfloat16 x{static_cast<uint16_t>(bits)};
    if (std::isnan(to_float(x))) {
      EXPECT_TRUE(std::isnan(to_float(to_bfloat16(to_float(x)))));
    } else {
      EXPECT_EQ(to_bfloat16(to_float(x)).bits, bits);
    }
  }
}

TEST(HalfFloats, EveryFloat16SurvivesTheRoundTripAndMatchesTheFormat) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    float16 x{static_cast<uint16_t>(bits)};
    int exponent = (bits >> 10) & 31, mantissa = bits & 1023;
    float value = to_float(x);
    if (exponent == 31) {
      EXPECT_EQ(std::isnan(value), mantissa != 0);
      EXPECT_EQ(std::isinf(value), mantissa == 0);
    } else {
      double expected =
          exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
      EXPECT_EQ(value, (bits & 0x8000) ? -expected : expected);
    }
    if (!std::isnan(value)) {
      EXPECT_EQ(to_float16(value).bits, bits);
    }
  }
}

TEST(HalfFloats, RoundToNearestEven) {
  EXPECT_EQ(to_float(to_bfloat16(1.0f + 0x1p-8f)), 1.0f);            // tie to even
  EXPECT_EQ(to_float(to_bfloat16(1.0f + 0x3p-8f)), 1.0f + 0x1p-6f);  // tie to even
  EXPECT_EQ(to_float(to_float16(1.0f + 0x1p-11f)), 1.0f);
  EXPECT_EQ(to_float(to_float16(1.0f + 0x3p-11f)), 1.0f + 0x1p-9f);
  EXPECT_EQ(to_float(to_float16(65519.0f)), 65504.0f);
  EXPECT_TRUE(std::isinf(to_float(to_float16(65520.0f))));
  EXPECT_EQ(to_float(to_float16(0x1p-25f)), 0.0f);
  EXPECT_EQ(to_float(to_float16(0x1.8p-25f)), 0x1p-24f);
}

// Rounded twice, by way of float32, the first and the last of each type would be ties.
TEST(HalfFloats, Float64IsRoundedOnce) {
  const auto converted = [](double x, DType type) {
    const Array half = convert(Tensor(&x, DType::f64, {1}), type);
    return *convert(half, DType::f64).as<double>();
  };
  constexpr double kInf = std::numeric_limits<double>::infinity();
  const std::pair<double, double> float16s[] = {{1 + 0x1p-11 + 0x1p-30, 1 + 0x1p-10},
                                                {1 + 0x1p-11, 1},
                                                {1 + 0x1p-11 - 0x1p-30, 1},
                                                {1 + 0x3p-11, 1 + 0x1p-9},
                                                {65519.999999, 65504},
                                                {65520, kInf},
                                                {0x1p-25, 0},
                                                {0x1p-25 + 0x1p-60, 0x1p-24},
                                                {1e300, kInf},
                                                {1e-300, 0},
                                                {0x3p-25 - 0x1p-60, 0x1p-24}};
  const std::pair<double, double> bfloat16s[] = {{1 + 0x1p-8 + 0x1p-33, 1 + 0x1p-7},
                                                 {1 + 0x1p-8, 1},
                                                 {1 + 0x3p-8, 1 + 0x1p-6},
                                                 {0x1.fep127, 0x1.fep127},
                                                 {0x1.fefffffffp127, 0x1.fep127},
                                                 {0x1.ffp127, kInf},
                                                 {1e300, kInf},
                                                 {0x1p-134, 0},
                                                 {0x1p-134 + 0x1p-180, 0x1p-133},
                                                 {1 + 0x3p-8 - 0x1p-40, 1 + 0x1p-7}};
  for (double sign : {1.0, -1.0}) {
    for (const auto& [x, y] : float16s) EXPECT_EQ(converted(sign * x, DType::f16), sign * y) << x;
    for (const auto& [x, y] : bfloat16s) EXPECT_EQ(converted(sign * x, DType::bf16), sign * y) << x;
  }
  for (DType type : {DType::f16, DType::bf16}) {
    EXPECT_EQ(converted(-kInf, type), -kInf);
    EXPECT_TRUE(std::isnan(converted(std::nan(""), type)));
  }
}

TEST(TensorView, SelectAndSliceFollowStrides) {
  std::vector<float> memory(2 * 3 * 4);
  for (size_t i = 0; i < memory.size(); ++i) memory[i] = static_cast<float>(i);
  Tensor t(memory.data(), DType::f32, {2, 3, 4});
  EXPECT_EQ(*t.select(1, 2).select(0, 1).slice(0, 1, 3).as<float>(), 1 * 12 + 2 * 4 + 1);
  Tensor transposed(memory.data(), DType::f32, {3, 2, 4}, {4, 12, 1});
  EXPECT_FALSE(transposed.is_contiguous());
  Array copied = convert(transposed, DType::f64);
  EXPECT_EQ(copied.as<double>()[(2 * 2 + 1) * 4 + 3], 1 * 12 + 2 * 4 + 3);
}

TEST(TensorView, ExtentsBeyondAnyMemory) {
  constexpr int64_t kMany = int64_t{1} << 40;
  float x = 0;
  EXPECT_THROW(Tensor(&x, DType::f32, {kMany, kMany}), Error);
  for (const Dims& shape : {Dims{0, kMany, kMany}, Dims{kMany, kMany, 0}}) {
    const Tensor empty(nullptr, DType::f32, shape);
    EXPECT_EQ(empty.count(), 0);
    copy(empty, empty);
  }
}

TEST(TensorView, WholeNumbersAreCopiedWithAnyStrides) {
  const int64_t from[] = {int64_t{1} << 62, 2, -3, 4};
  int64_t to[2] = {};
  copy(Tensor(from, DType::i64, {2}, {2}), Tensor(to, DType::i64, {2}));
  EXPECT_EQ(to[0], from[0]);
  EXPECT_EQ(to[1], from[2]);
  EXPECT_THROW(convert(Tensor(from, DType::i64, {4}), DType::i32), Error);
}

TEST(TensorView, RefusesWhatCannotBe) {
  EXPECT_THROW(Tensor(nullptr, DType::f32, {2, 3}), Error);
  EXPECT_NO_THROW(Tensor(nullptr, DType::f32, {2, 0}));
  EXPECT_THROW(Array(DType::f32, {int64_t{1} << 40, int64_t{1} << 40}), Error);
  EXPECT_THROW(Array(DType::f32, {-1}), Error);
  EXPECT_THROW(Dims({1, 2, 3, 4, 5, 6, 7}), Error);
  float memory[6] = {};
  const Tensor t(memory, DType::f32, {2, 3});
  for (const auto& [begin, end] : {std::pair<int64_t, int64_t>{0, 4}, {2, 1}, {-1, 2}, {4, 4}}) {
    EXPECT_THROW(t.slice(1, begin, end), Error);
  }
  EXPECT_EQ(t.slice(1, 3, 3).count(), 0);
  EXPECT_THROW(t.slice(1, INT64_MIN, 0), Error);
  for (const auto& [axis, i] : {std::pair<int, int64_t>{0, 2}, {0, -1}, {2, 0}, {-1, 0}}) {
    EXPECT_THROW(t.select(axis, i), Error);
  }
  EXPECT_THROW(t.slice(2, 0, 0), Error);
  try {
    t.slice(1, 0, 1000);
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(),
                 "slice: range 0 to 1000 of axis 1 of a tensor of shape [2,3] does not exist");
  }
}

// Test vectors published with the reference implementation (Random123, kat_vectors).
TEST(Philox, MatchesThePublishedVectors) {
  std::array<uint32_t, 4> zero{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8};
  EXPECT_EQ(philox(0, {0, 0, 0, 0}), zero);
  std::array<uint32_t, 4> ones{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd};
  EXPECT_EQ(philox(~uint64_t{0}, {~0u, ~0u, ~0u, ~0u}), ones);
  std::array<uint32_t, 4> pi{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1};
  EXPECT_EQ(philox(0x299f31d0a4093822, {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}), pi);
}

TEST(ParallelFor, VisitsEveryItemOnceAndRethrows) {
  for (int threads : {1, 2, 3}) {
    std::vector<int> visits(1000, 0);
    parallel_for(1000, threads, [&](int64_t item, int worker) {
      EXPECT_LT(worker, threads);
      ++visits[static_cast<size_t>(item)];
    });
    EXPECT_EQ(std::set<int>(visits.begin(), visits.end()), std::set<int>{1});
    EXPECT_THROW(parallel_for(100, threads,
                              [](int64_t item, int) {
                                if (item == 57) throw Error("item 57");
                              }),
                 Error);
  }
}

TEST(ParallelFor, FewItemsGoToTheThreadsOfTheirNumbers) {
  for (int threads : {2, 3, 5}) {
    for (int64_t items = 2; items <= threads; ++items) {
      std::vector<int> workers(static_cast<size_t>(items), -1);
      parallel_for(items, threads,
                   [&](int64_t item, int worker) { workers[static_cast<size_t>(item)] = worker; });
      for (int i = 0; i < items; ++i) EXPECT_EQ(workers[static_cast<size_t>(i)], i);
    }
    EXPECT_THROW(parallel_for(threads, threads, [](int64_t, int) { throw Error("every item"); }),
                 Error);
  }
}

TEST(ParallelForShares, VisitsEveryItemOnceAndRethrows) {
  for (int threads : {1, 2, 3, 7}) {
    for (int64_t items : {0, 1, 2, 7, 8, 1000}) {
      std::vector<int> visits(static_cast<size_t>(items), 0);
      parallel_for_shares(items, threads, [&](int64_t item, int worker) {
        EXPECT_LT(worker, threads);
        ++visits[static_cast<size_t>(item)];
      });
      EXPECT_EQ(std::count(visits.begin(), visits.end(), 1), items);
    }
    EXPECT_THROW(parallel_for_shares(100, threads,
                                     [](int64_t item, int) {
                                       if (item == 57) throw Error("item 57");
                                     }),
                 Error);
  }
}

TEST(ParallelForShares, OthersTakeWhatAThreadHasNotBegun) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  std::atomic<int> done{0};
  int seen = 0;
  parallel_for_shares(64, 2, [&](int64_t item, int) {
    if (item != 0) {
      ++done;
      return;
    }
    while (done.load() < 63 && std::chrono::steady_clock::now() < deadline) {
      std::this_thread::yield();
    }
    seen = done.load();
  });
  EXPECT_EQ(seen, 63);
}

TEST(HugePages, FetchedBeforeTheirFirstTouchOrAfter) {
  const int64_t count = static_cast<int64_t>(5 * kHugePage / sizeof(float)) / 2 + 3;
  const Array fresh(DType::f32, {count});
  populate(fresh, 3);
  Array written(DType::f32, {count + 1});
  for (int64_t i = 0; i <= count; ++i) written.as<float>()[i] = static_cast<float>(i % 1021);
  const auto unchanged = [&] {
    for (int64_t i = 0; i <= count; ++i) {
      if (written.as<float>()[i] != static_cast<float>(i % 1021)) return false;
    }
    return true;
  };
  populate(written, 2);
  EXPECT_TRUE(unchanged());
  populate(written.view().slice(0, 1, count), 2);  // not from the start of a page
  EXPECT_TRUE(unchanged());
  populate(Array(DType::f32, {0}), 2);
}

TEST(CeilDiv, OfNumbersOnBothSidesOfZero) {
  EXPECT_EQ(ceil_div(0, 4), 0);
  EXPECT_EQ(ceil_div(8, 4), 2);
  EXPECT_EQ(ceil_div(9, 4), 3);
  EXPECT_EQ(ceil_div(-3, 4), 0);
  EXPECT_EQ(ceil_div(-4, 4), -1);
  EXPECT_EQ(ceil_div(INT64_MAX, 2), INT64_MAX / 2 + 1);
}

TEST(Scratch, NestsWithoutSharingMemory) {
  Scratch outer(1024);
  float* a = outer.take<float>(256);
  Scratch inner(1024);
  float* b = inner.take<float>(256);
  EXPECT_TRUE(b >= a + 256 || a >= b + 256);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(a) % 64, 0u);
}

struct WorksWhenDestroyed {
  ~WorksWhenDestroyed() {
    work(size_t{1} << 16);
    const auto& isas = available_isas();
    if (std::find(isas.begin(), isas.end(), default_isa()) == isas.end()) std::abort();
    if (cpu_info().model != model) std::abort();
  }
  static void work(size_t bytes) {
    (void)default_isa();
    parallel_for(4, threads_for({.threads = 2, .isa = {}}, 4), [&](int64_t, int) {
      Scratch scratch(bytes);
      scratch.take<std::byte>(4096)[4095] = std::byte{1};
    });
  }
  std::string model;
};

TEST(StaticObjects, MayCallWhenTheyAreDestroyed) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");  // a process in which nothing has been called yet
  EXPECT_EXIT(
      {
        static WorksWhenDestroyed object;
        WorksWhenDestroyed::work(4096);
        object.model = cpu_info().model;
        std::exit(0);
      },
      testing::ExitedWithCode(0), "");
}

TEST(Isa, NamesParseAndUnknownOnesAreExplained) {
  for (Isa isa : available_isas()) EXPECT_EQ(parse_isa(name_of(isa)), isa);
  EXPECT_EQ(available_isas().front(), Isa::portable);
  try {
    parse_isa("sse9");
    FAIL() << "accepted sse9";
  } catch (const Error& e) {
    EXPECT_NE(std::string(e.what()).find("sse9"), std::string::npos);
    EXPECT_NE(std::string(e.what()).find("portable"), std::string::npos);
  }
}

TEST(Isa, OneThatTheMachineLacksIsRefused) {
  for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512, Isa::amx}) {
    RunOptions run;
    run.isa = isa;
    const auto& available = available_isas();
    if (std::find(available.begin(), available.end(), isa) != available.end()) {
      EXPECT_EQ(chosen_isa(run), isa);
    } else {
      EXPECT_THROW(chosen_isa(run), Error);
    }
  }
}

TEST(Threads, OneTo1024) {
  RunOptions run;
  for (int threads : {-1, 0, 1025, std::numeric_limits<int>::max()}) {
    EXPECT_THROW(set_threads(threads), Error);
    run.threads = threads;
    EXPECT_THROW(threads_for(run, 10), Error);
  }
}

TEST(Threads, AreWokenWhereThereIsWorkForThem) {
  RunOptions run{.threads = 5};
  EXPECT_EQ(*worth_waking(run, 0).threads, 1);
  EXPECT_EQ(*worth_waking(run, 9000).threads, 2);
  EXPECT_EQ(*worth_waking(run, 1e6).threads, 5);
  EXPECT_EQ(*worth_waking(run, 1e300).threads, 5);
  run.threads = 0;
  EXPECT_THROW(worth_waking(run, 0), Error);
}

TEST(Scratch, IsUsableAfterAnAllocationThatFailed) {
  if (!kKeepsBlocks) GTEST_SKIP() << "an address sanitizer ends a program that asks for too much";
  const std::byte* before = nullptr;
  {
    Scratch first(1024);
    before = first.take<std::byte>(1);
  }
  constexpr size_t kTooMuch = size_t{1} << 60;
  const auto refused = [](const std::function<void()>& allocate) -> std::string {
    try {
      allocate();
    } catch (const OutOfMemory& error) {
      return error.what();
    }
    return "nothing";
  };
  const std::string said = "memory: 1152921504606846976 bytes are needed, the system refuses them";
  EXPECT_EQ(refused([] { Scratch scratch(kTooMuch); }), said);
  EXPECT_EQ(refused([] { Array array(DType::boolean, {int64_t{kTooMuch}}); }), said);
  for (int i = 0; i < 2; ++i) {  // one block again, used in turn
    Scratch next(1024);
    const std::byte* memory = next.take<std::byte>(1);
    if (i == 1) {
      EXPECT_EQ(memory, before);
    }
    before = memory;
  }
}

}  // namespace
}  // namespace heed
