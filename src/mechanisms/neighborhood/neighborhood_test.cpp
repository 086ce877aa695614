// What a comparison with the cascades cannot show: equalities between calls, tile counts of the papers,
// bits across thread counts, NaN, and messages.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "heed/heed.h"
#include "mechanisms/neighborhood/options.h"
#include "mechanisms/neighborhood/tiles.h"
#include "mechanisms/registry.h"
#include "mechanisms/test_arrays.h"

namespace heed {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

NeighborhoodOptions window(std::vector<int64_t> kernel, std::vector<int64_t> stride = {1},
                           std::vector<int64_t> dilation = {1},
                           std::vector<bool> causal = {false}) {
  NeighborhoodOptions options;
  options.kernel_size = std::move(kernel);
  options.stride = std::move(stride);
  options.dilation = std::move(dilation);
  options.is_causal = std::move(causal);
  return options;
}

/// [B,*grid,H,D] with its grid flattened, as [B,H,L,D].
Tensor as_sequence(const Tensor& t) {
  const int last = t.rank() - 1;
  int64_t tokens = 1;
  for (int a = 1; a < last - 1; ++a) tokens *= t.size(a);
  return {t.data(),
          t.dtype(),
          {t.size(0), t.size(last - 1), tokens, t.size(last)},
          {t.stride(0), t.stride(last - 1), t.stride(last - 2), 1}};
}

/// Tokens of the first two grid axes, every `step`-th from `first` on.
Tensor every(const Tensor& t, Dims first, Dims step, Dims count) {
  Dims shape = t.shape(), strides = t.strides();
  for (int a = 0; a < first.rank(); ++a) {
    shape[a + 1] = count[a];
    strides[a + 1] *= step[a];
  }
  return {t.at({0, first[0], first.rank() > 1 ? first[1] : 0}), t.dtype(), shape, strides};
}

TEST(Neighborhood, TheWholeGridIsDenseAttention) {
  const Array q = random_array(DType::f64, {2, 5, 6, 4, 8}, 1);
  const Array k = random_array(DType::f64, {2, 5, 6, 2, 8}, 2);
  const Array v = random_array(DType::f64, {2, 5, 6, 2, 7}, 3);
  const AttentionResult found = na2d(q, k, v, window({5, 6}));
  const AttentionResult dense = flash_attention(as_sequence(q), as_sequence(k), as_sequence(v));
  EXPECT_LT(largest_difference(as_sequence(found.out), dense.out), 1e-13);

  const Array line = random_array(DType::f64, {1, 70, 2, 8}, 4);
  FlashOptions causal;
  causal.masks.causal = true;
  const AttentionResult causal_line = na1d(line, line, line, window({70}, {1}, {1}, {true}));
  const Tensor rows = as_sequence(line);
  EXPECT_LT(largest_difference(as_sequence(causal_line.out),
                               flash_attention(rows, rows, rows, causal).out),
            1e-13);
}

// Queries and keys of zeros: lse is the logarithm of the number of keys.
TEST(Neighborhood, EveryQueryHasAllItsKeys) {
  const auto keys_of = [](const Dims& grid, const NeighborhoodOptions& options) {
    Dims shape{1, 1, 1, 1, 1};
    for (int a = 0; a < 2; ++a) shape[a + 1] = grid[a];
    const Array zeros = Array::zeros(DType::f64, shape);
    const AttentionResult result = na2d(zeros, zeros, zeros, options);
    std::vector<double> keys;
    for (int64_t i = 0; i < result.lse.count(); ++i) {
      keys.push_back(std::exp(result.lse.as<double>()[i]));
    }
    return keys;
  };
  for (const auto& options :
       {window({3, 4}), window({6, 2}, {5, 2}), window({2, 4}, {1}, {3, 2})}) {
    for (double n : keys_of({12, 9}, options)) {
      EXPECT_NEAR(n, static_cast<double>(options.kernel_size[0] * options.kernel_size[1]), 1e-9);
    }
  }
  // Causal with stride: i - start + 1 keys, start that of the group's last query.
  const std::vector<double> causal = keys_of({11, 1}, window({4, 1}, {3, 1}, {1}, {true, false}));
  const double want[] = {1, 2, 3, 2, 3, 4, 2, 3, 4, 3, 4};
  for (size_t i = 0; i < 11; ++i) EXPECT_NEAR(causal[i], want[i], 1e-9) << i;
}

TEST(Neighborhood, StrideOfTheKernelIsAttentionInBlocks) {
  const Array x = random_array(DType::f64, {1, 12, 10, 2, 8}, 1);
  // 10 is no multiple of 4: the last block of queries, 8 and 9, sees keys 6 to 9.
  const AttentionResult found = na2d(x, x, x, window({6, 4}, {6, 4}));
  for (int64_t y = 0; y < 12; y += 6) {
    for (int64_t begin : {0, 4, 8}) {
      const int64_t end = std::min<int64_t>(begin + 4, 10), first_key = std::min<int64_t>(begin, 6);
      const Tensor rows = x.view().slice(1, y, y + 6);
      const Tensor queries = rows.slice(2, begin, end),
                   keys = rows.slice(2, first_key, first_key + 4);
      const Array q = convert(queries, DType::f64), k = convert(keys, DType::f64);
      const AttentionResult block = flash_attention(as_sequence(q), as_sequence(k), as_sequence(k));
      const Array part =
          convert(found.out.view().slice(1, y, y + 6).slice(2, begin, end), DType::f64);
      EXPECT_LT(largest_difference(as_sequence(part), block.out), 1e-13) << y << " " << begin;
    }
  }
}

// Where the stride divides its length: else the last group's window depends on where the line ends.
TEST(Neighborhood, ACausalStridedLineIsItsBeginnings) {
  const Array q = random_array(DType::f64, {1, 60, 2, 8}, 1);
  const Array k = random_array(DType::f64, {1, 60, 2, 8}, 2);
  const NeighborhoodOptions options = window({9}, {4}, {1}, {true});
  const AttentionResult whole = na1d(q, k, k, options);
  for (int64_t length : {12, 29, 40}) {
    const auto beginning = [&](const Array& x) { return x.view().slice(1, 0, length); };
    const AttentionResult part = na1d(beginning(q), beginning(k), beginning(k), options);
    const double out = largest_difference(part.out, beginning(whole.out));
    const double lse = largest_difference(part.lse, beginning(whole.lse));
    if (length % 4 == 0) {
      EXPECT_LT(std::max(out, lse), 1e-14) << length;
    } else {
      EXPECT_GT(std::min(out, lse), 1e-3) << length;
    }
  }
}

TEST(Neighborhood, DilationIsAttentionOnEveryThirdToken) {
  const Array x = random_array(DType::f64, {2, 12, 8, 2, 8}, 1);
  for (bool causal : {false, true}) {
    const AttentionResult whole = na2d(x, x, x, window({3, 2}, {2, 1}, {3, 2}, {causal, false}));
    for (int64_t y = 0; y < 3; ++y) {
      for (int64_t xx = 0; xx < 2; ++xx) {
        const Tensor part = every(x, {y, xx}, {3, 2}, {4, 4});
        const AttentionResult alone =
            na2d(part, part, part, window({3, 2}, {2, 1}, {1}, {causal, false}));
        EXPECT_LT(largest_difference(every(whole.out, {y, xx}, {3, 2}, {4, 4}), alone.out), 1e-13);
      }
    }
  }
}

TEST(Neighborhood, InAModelItIsTheCausalLine) {
  constexpr int64_t kTokens = 43;
  const Array q = random_array(DType::f32, {1, 4, kTokens, 6}, 1);
  const Array k = random_array(DType::f32, {1, 2, kTokens, 6}, 2);
  const Array v = random_array(DType::f32, {1, 2, kTokens, 6}, 3);
  const auto heads_last = [](const Tensor& x) {
    return Tensor(x.data(), x.dtype(), {1, x.size(2), x.size(1), x.size(3)},
                  {x.stride(0), x.stride(2), x.stride(1), 1});
  };
  for (int64_t dilation : {1, 3, 8}) {
    const AttentionResult whole =
        na1d(heads_last(q), heads_last(k), heads_last(v),
             {.kernel_size = {5}, .dilation = {dilation}, .is_causal = {true}, .scale = 0.3});
    const ModelAttention attention = find_mechanism("na1d").model_attention(
        Spec::parse("na1d:kernel_size=5,scale=0.3,dilation=" + std::to_string(dilation)), {});
    for (int64_t rows : {int64_t{1}, int64_t{2}, int64_t{12}, kTokens}) {
      for (int64_t end = rows; end <= kTokens; ++end) {
        Array out(DType::f32, {1, 4, rows, 6});
        attention.over_cache(q.view().slice(2, end - rows, end), k.view().slice(2, 0, end),
                             v.view().slice(2, 0, end), out, {});
        const Tensor expected = whole.out.view().slice(1, end - rows, end);
        EXPECT_LT(largest_difference(heads_last(out), expected), 1e-6)
            << dilation << " " << rows << " " << end;
      }
    }
  }
  EXPECT_NE(error_of([] {
              (void)find_mechanism("na1d").model_attention(Spec::parse("na1d:stride=2"), {});
            }).find("'stride'"),
            std::string::npos);
  EXPECT_NE(error_of([] {
              (void)find_mechanism("na1d").model_attention(Spec::parse("na1d:dilation=0"), {});
            }).find("dilation is 0"),
            std::string::npos);
}

TEST(Neighborhood, OptionsAreOneNumberOrOnePerAxis) {
  const std::vector<int64_t> grid{10, 20};
  const auto axes = [&](const char* text) { return na::axes_of(Spec::parse_options(text), grid); };
  const auto given = axes("kernel_size=3x5,dilation=2,is_causal=0x1");
  ASSERT_EQ(given.size(), 2u);
  for (size_t a = 0; a < 2; ++a) {
    EXPECT_EQ(given[a].length, grid[a]);
    EXPECT_EQ(given[a].kernel, a == 0 ? 3 : 5);
    EXPECT_EQ(given[a].stride, 1);
    EXPECT_EQ(given[a].dilation, 2);
    EXPECT_EQ(given[a].causal, a == 1);
  }
  EXPECT_EQ(axes("")[1].kernel, 3);
  for (const auto& [text, needed] : std::vector<std::pair<const char*, const char*>>{
           {"kernel_size=3x", "kernel_size=3x: one number or one per axis is needed"},
           {"kernel_size=3,stride=0", "stride=0: 1 or more is needed"},
           {"dilation=1x2x3", "dilation: found 3 numbers, 1 or one for each of the 2 axes"}}) {
    EXPECT_NE(error_of([&] { (void)axes(text); }).find(needed), std::string::npos) << text;
  }
}

TEST(Neighborhood, ShiftedInputsGiveShiftedResultsAwayFromTheBorders) {
  const Array x = random_array(DType::f64, {1, 30, 20, 1, 8}, 1);
  const auto crop = [](const Tensor& t, int64_t y) { return t.slice(1, y, y + 26); };
  const Tensor a = crop(x, 0), b = crop(x, 4);
  const NeighborhoodOptions options = window({5, 3}, {2, 1});
  const AttentionResult of_a = na2d(a, a, a, options), of_b = na2d(b, b, b, options);
  // Rows 6 to 21 of the second are rows 10 to 25 of the whole; both are three rows from a border.
  EXPECT_LT(largest_difference(of_a.out.view().slice(1, 10, 22), of_b.out.view().slice(1, 6, 18)),
            1e-13);
}

TEST(Neighborhood, AdditionalKeysAreTheMergeOfTwoResults) {
  for (DType type : {DType::f64, DType::bf16}) {
    const Array q = random_array(type, {2, 30, 4, 8}, 1), k = random_array(type, {2, 30, 2, 8}, 2);
    const Array more = random_array(type, {2, 9, 2, 8}, 3);
    NeighborhoodOptions options = window({7}, {1}, {3});
    const AttentionResult near = na1d(q, k, k, options);
    options.additional_keys = options.additional_values = more;
    const AttentionResult both = na1d(q, k, k, options);
    const AttentionResult far =
        flash_attention(as_sequence(q), as_sequence(more), as_sequence(more));
    const Array near_out = convert(as_sequence(near.out), type);
    Array near_lse(near.lse.dtype(), {2, 4, 30});
    for (int64_t b = 0; b < 2; ++b) {
      for (int64_t h = 0; h < 4; ++h) {
        copy(near.lse.view().select(0, b).select(1, h), near_lse.view().select(0, b).select(0, h));
      }
    }
    const AttentionResult merged = merge_attention(near_out, near_lse, far.out, far.lse);
    EXPECT_LT(largest_difference(as_sequence(both.out), merged.out),
              type == DType::f64 ? 1e-13 : 3e-2);
  }
}

// arXiv 2504.16922 counts tiles of 8x8; means by its simulation of a 64x64 grid with kernel 24x24.
TEST(Tiles, CountsOfThePaper) {
  struct Row {
    int64_t stride_y, stride_x;
    double mean;
  };
  for (const Row& row :
       {Row{1, 1, 18.06}, {8, 1, 12.75}, {8, 8, 9}, {16, 16, 12.25}, {24, 24, 9}}) {
    const std::vector<tiled::NeighborhoodAxis> axes = {{64, 24, row.stride_y},
                                                       {64, 24, row.stride_x}};
    const tiled::Neighborhood grid("na2d", axes);
    const na::Boxes boxes = {na::AxisBoxes{1, 0}, {8, 0}, {8, 0}};
    const na::GroupTiles tiles(grid.group(0), boxes, boxes);
    double visited = 1, full = 1;
    for (const na::AxisTiles& axis : tiles.axes) {
      double axis_visited = 0, axis_full = 0;
      for (int64_t q = 0; q < axis.query_boxes(); ++q) {
        for (int64_t k = 0; k < axis.key_boxes(); ++k) {
          axis_visited += axis.use(q, k) != tiled::TileUse::dead;
          axis_full += axis.use(q, k) == tiled::TileUse::full;
        }
      }
      visited *= axis_visited;
      full *= axis_full;
    }
    EXPECT_NEAR(visited / 64, row.mean, 0.005) << row.stride_y << "x" << row.stride_x;
    if (row.stride_x == 8) {
      EXPECT_EQ(full, visited) << "a pair that needs a mask";
    }
  }
}

TEST(Tiles, ChosenShapesFitTheirLimits) {
  const std::vector<std::vector<tiled::NeighborhoodAxis>> grids = {
      {{1, 1}, {1, 1}},
      {{7, 3}, {5, 5}},
      {{1000, 2}, {2, 1}},
      {{56, 7}, {56, 7}},
      {{64, 24, 16}, {64, 24, 8}},
      {{13, 4, 1, 3}, {17, 8, 3, 2, true}},
      {{3, 2}, {9, 5}, {4, 4}}};
  for (const auto& axes : grids) {
    const tiled::Neighborhood grid("na", axes);
    for (int64_t dim : {1, 64, 256}) {
      const na::TileShapes shapes = na::choose_tiles(grid.group(0), grid, {dim, dim, 4});
      EXPECT_GE(na::points_per_box(shapes.queries), 1);
      EXPECT_LE(na::points_per_box(shapes.queries), 64);
      EXPECT_LE(na::points_per_box(shapes.keys), 256);
      for (int a = 0; a < tiled::kGridAxes; ++a) {
        EXPECT_LE(shapes.keys[static_cast<size_t>(a)].side, grid.axis(a).length);
        EXPECT_LT(shapes.keys[static_cast<size_t>(a)].shift,
                  shapes.keys[static_cast<size_t>(a)].side);
      }
    }
  }
}

// 40 heads of 1,024 tokens are several parts for one thread and a single one for eight.
TEST(Neighborhood, SameBitsForAnyThreadCountAndPart) {
  for (DType type : {DType::f32, DType::bf16}) {
    const Array x = random_array(type, {1, 32, 32, 40, 32}, 1);
    const NeighborhoodOptions options = window({7, 9}, {2, 1});
    RunOptions run;
    run.threads = 1;
    const AttentionResult one = na2d(x, x, x, options, run);
    for (int threads : {3, 8}) {
      run.threads = threads;
      const AttentionResult more = na2d(x, x, x, options, run);
      EXPECT_TRUE(same_bits(one.out, more.out)) << threads;
      EXPECT_TRUE(same_bits(one.lse, more.lse)) << threads;
    }
  }
}

TEST(Neighborhood, GradientsRepeatBitForBit) {
  const Array x = random_array(DType::f32, {1, 32, 32, 12, 32}, 1);
  const Array g = random_array(DType::f32, {1, 32, 32, 12, 32}, 2);
  const Array rpb = random_array(DType::f32, {12, 9, 9}, 3);
  NeighborhoodOptions options = window({5});
  options.rpb = rpb;
  RunOptions run;
  run.threads = 2;
  const AttentionResult result = na2d(x, x, x, options, run);
  const auto gradients = [&] {
    return na2d_backward(g, {}, x, x, x, result.out, result.lse, options, run);
  };
  const NeighborhoodGradients first = gradients(), second = gradients();
  EXPECT_TRUE(same_bits(first.query, second.query));
  EXPECT_TRUE(same_bits(first.key, second.key));
  EXPECT_TRUE(same_bits(first.value, second.value));
  EXPECT_TRUE(same_bits(first.rpb, second.rpb));
}

TEST(Neighborhood, NaNReachesTheQueriesThatSeeItAndNoOthers) {
  for (DType type : {DType::f64, DType::f32, DType::bf16}) {
    for (bool in_values : {false, true}) {
      const Array x = random_array(type, {1, 20, 20, 1, 8}, 1);
      Array bad = random_array(type, {1, 20, 20, 1, 8}, 2);
      Array nan(DType::f64, {1});
      *nan.as<double>() = kNaN;
      copy(nan, bad.view().select(0, 0).select(0, 11).select(0, 4).select(0, 0).slice(0, 3, 4));
      const Array good = random_array(type, {1, 20, 20, 1, 8}, 3);
      const Array& keys = in_values ? good : bad;
      const Array& values = in_values ? bad : good;
      for (int64_t stride : {1, 5}) {
        const NeighborhoodOptions options = window({5}, {stride});
        const AttentionResult result = na2d(x, keys, values, options);
        const Array out = convert(result.out, DType::f64);
        for (int64_t i = 0; i < 400; ++i) {
          const int64_t y = i / 20, xx = i % 20;
          const auto sees = [&](int64_t query, int64_t key) {
            const int64_t lead = query / stride * stride + stride / 2;
            const int64_t start = std::clamp<int64_t>(lead - 2, 0, 15);
            return key >= start && key < start + 5;
          };
          EXPECT_EQ(std::isnan(out.as<double>()[i * 8 + 3]), sees(y, 11) && sees(xx, 4))
              << name_of(type) << " stride " << stride << " query " << y << "," << xx;
        }
        const NeighborhoodGradients gradients =
            na2d_backward(x, {}, x, keys, values, result.out, result.lse, options);
        const Array dq = convert(gradients.query, DType::f64);
        for (int64_t i = 0; i < 400; ++i) {
          if (!std::isnan(out.as<double>()[i * 8 + 3])) {
            EXPECT_TRUE(std::isfinite(dq.as<double>()[i * 8])) << name_of(type) << " query " << i;
          }
        }
      }
    }
  }
}

TEST(Neighborhood, TensorsWithoutElements) {
  const Array no_batch = random_array(DType::f32, {0, 5, 6, 2, 8}, 1);
  EXPECT_EQ(na2d(no_batch, no_batch, no_batch, window({3})).out.count(), 0);
  const Array no_heads = random_array(DType::f32, {2, 5, 6, 0, 8}, 1);
  const AttentionResult none = na2d(no_heads, no_heads, no_heads, window({3}));
  EXPECT_EQ(none.out.count(), 0);
  const NeighborhoodGradients gradients = na2d_backward(none.out, none.lse, no_heads, no_heads,
                                                        no_heads, none.out, none.lse, window({3}));
  EXPECT_TRUE(gradients.query.shape() == no_heads.shape());
  const Array x = random_array(DType::f32, {2, 5, 6, 2, 8}, 1);
  EXPECT_NE(error_of([&] { na2d(x, no_heads, no_heads, window({3})); }).find("2 heads"),
            std::string::npos);
}

TEST(Neighborhood, ErrorsNameTheArgumentWhatItWasAndWhatIsNeeded) {
  const Array x = random_array(DType::f32, {1, 8, 9, 2, 4}, 1);
  const auto says = [](const std::string& message, std::initializer_list<const char*> parts) {
    for (const char* part : parts) {
      EXPECT_NE(message.find(part), std::string::npos) << message << " lacks " << part;
    }
  };
  const auto call = [&](const NeighborhoodOptions& options) {
    return error_of([&] { na2d(x, x, x, options); });
  };
  says(call({}), {"na2d", "kernel_size has 0 values", "2 are needed"});
  says(call(window({3, 3, 3})), {"kernel_size has 3 values", "one per grid axis"});
  says(call(window({9, 3})), {"kernel_size of axis 0 is 9", "from 1 to length / dilation = 8"});
  says(call(window({0})), {"kernel_size of axis 0 is 0"});
  says(call(window({3, 2}, {3})), {"stride of axis 1 is 3", "kernel size 2"});
  says(call(window({3}, {1}, {3})), {"kernel_size of axis 0 is 3", "= 2"});
  says(call(window({3}, {1}, {0})), {"dilation of axis 0 is 0"});
  says(call(window({3}, {1}, {1}, {true, false, true})), {"is_causal has 3 values"});
  NeighborhoodOptions options = window({3});
  options.scale = kNaN;
  says(call(options), {"scale is nan"});
  options = window({3});
  options.additional_keys = x;
  says(call(options), {"additional_values is missing", "together"});
  const Array extra = random_array(DType::f32, {1, 5, 2, 4}, 1);
  const Array narrow = random_array(DType::f32, {1, 5, 1, 4}, 1);
  options.additional_keys = extra;
  options.additional_values = narrow;
  says(call(options), {"additional_values has number of heads 1", "key has 2"});
  options = window({3});
  const Array rpb = random_array(DType::f32, {2, 5, 4}, 1);
  options.rpb = rpb;
  says(call(options), {"rpb [2,5,4] float32", "[2,5,5]"});
  options.stride = {2};
  says(call(options), {"rpb", "axis 0 has stride 2"});
  options.stride = {1};
  options.is_causal = {false, true};
  says(call(options), {"rpb", "axis 1 is causal"});
  const Array half = random_array(DType::bf16, {1, 8, 9, 2, 4}, 1);
  says(error_of([&] { na2d(x, half, half, window({3})); }), {"key", "bfloat16", "float32"});
  says(error_of([&] { na1d(x, x, x, window({3})); }), {"na1d", "5 dimensions", "[B,X,H,D]"});
  const Array shorter = random_array(DType::f32, {1, 8, 8, 2, 4}, 1);
  says(error_of([&] { na2d(x, shorter, x, window({3})); }),
       {"key has length of grid axis 1 8", "9"});
  const Array wide = random_array(DType::f32, {1, 3, 3, 1, 257}, 1);
  says(error_of([&] { na2d(wide, wide, wide, window({3})); }), {"257", "1 to 256"});
  const AttentionResult result = na2d(x, x, x, window({3}));
  says(error_of([&] { na2d_backward(half, {}, x, x, x, result.out, result.lse, window({3})); }),
       {"na2d_backward", "grad_out", "bfloat16", "float32"});
  says(error_of([&] { na2d_backward(x, {}, x, x, x, result.out, {}, window({3})); }),
       {"lse is missing"});
  says(error_of([&] { na2d(x, x, x, Tensor(), Tensor(), window({3})); }), {"out is missing"});
}

}  // namespace
}  // namespace heed
