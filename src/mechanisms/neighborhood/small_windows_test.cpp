// Small windows against dense attention with a mask in float64, whether they would be chosen or not.
#include "mechanisms/neighborhood/small_windows.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "engine/operands.h"
#include "heed/heed.h"
#include "mechanisms/neighborhood/grid_rows.h"
#include "mechanisms/test_arrays.h"

namespace heed::na {
namespace {

struct PlaneCase {
  int64_t lines, points, heads, kv_heads, dim, values;
  std::vector<int64_t> kernel, stride = {1}, dilation = {1};
  std::vector<bool> causal = {false};
};

NeighborhoodOptions options_of(const PlaneCase& n) {
  NeighborhoodOptions options;
  options.kernel_size = n.kernel;
  options.stride = n.stride;
  options.dilation = n.dilation;
  options.is_causal = n.causal;
  return options;
}

/// [B,Y,X,H,width] as [B,H,Y*X,width] in float64.
Array sequence_of(const Tensor& t) {
  const int64_t tokens = t.size(1) * t.size(2);
  const Array exact = convert(t, DType::f64);
  const Tensor rows(exact.view().data(), DType::f64, {t.size(0), t.size(3), tokens, t.size(4)},
                    {tokens * t.size(3) * t.size(4), t.size(4), t.size(3) * t.size(4), 1});
  return convert(rows, DType::f64);
}

/// [1,1,L,L]: whether a query sees a key.
Array seen_pairs(const tiled::Neighborhood& grid) {
  Array mask = Array::zeros(DType::boolean, {1, 1, grid.tokens(), grid.tokens()});
  for (int64_t g = 0; g < grid.groups(); ++g) {
    const tiled::GridGroup group = grid.group(g);
    const tiled::GridBox box = group.points();
    for (int64_t y = 0; y < box[1].end; ++y) {
      for (int64_t x = 0; x < box[2].end; ++x) {
        for (int64_t ky = 0; ky < box[1].end; ++ky) {
          for (int64_t kx = 0; kx < box[2].end; ++kx) {
            if (!group.sees({0, y, x}, {0, ky, kx})) continue;
            mask.as<bool>()[group.token({0, y, x}) * grid.tokens() + group.token({0, ky, kx})] =
                true;
          }
        }
      }
    }
  }
  return mask;
}

/// [B,Y,X,H] of a wide type as [B,H,Y*X] in float64.
Array sums_of(const Tensor& t) {
  const Tensor wide(t.data(), t.dtype(), {t.size(0), t.size(1), t.size(2), t.size(3), 1},
                    {t.stride(0), t.stride(1), t.stride(2), t.stride(3), 1});
  const Array rows = sequence_of(wide);
  return convert(
      Tensor(rows.view().data(), DType::f64, {t.size(0), t.size(3), rows.view().size(2)}),
      DType::f64);
}

/// A call with random input, and where its results go.
struct PlaneArrays {
  PlaneArrays(const PlaneCase& n, DType type)
      : q(make(n, type, n.heads, n.dim, 1)),
        k(make(n, type, n.kv_heads, n.dim, 2)),
        v(make(n, type, n.kv_heads, n.values, 3)),
        out(type, {kBatch, n.lines, n.points, n.heads, n.values}),
        lse(wide_type(type), {kBatch, n.lines, n.points, n.heads}),
        grad_out(make(n, type, n.heads, n.values, 4)),
        grad_lse(random_array(wide_type(type), lse.shape(), 5)),
        dq(type, q.shape()),
        dk(type, k.shape()),
        dv(type, v.shape()),
        call("test", 2, q, k, v, out, lse, options_of(n)),
        gradients{six_axes(grad_out, 2),
                  six_axes_of_sums(grad_lse, 2),
                  six_axes(dq, 2),
                  six_axes(dk, 2),
                  six_axes(dv, 2),
                  {},
                  {}} {}
  static Array make(const PlaneCase& n, DType type, int64_t heads, int64_t width, uint32_t seed) {
    return random_array(type, {kBatch, n.lines, n.points, heads, width}, seed);
  }

  static constexpr int64_t kBatch = 2;
  Array q, k, v, out, lse, grad_out, grad_lse, dq, dk, dv;
  GridCall call;
  CallGradients gradients;
};

// The reference of the backward gets the rounded results of the forward.
void check_case(const PlaneCase& n, DType type, Isa isa) {
  const std::string about = std::string(name_of(type)) + " " + name_of(isa) + " " +
                            std::to_string(n.lines) + "x" + std::to_string(n.points) + " kernel " +
                            std::to_string(n.kernel[0]) + " dim " + std::to_string(n.dim);
  const RunOptions run{.threads = 2, .isa = isa};
  const PlaneArrays x(n, type);
  ASSERT_TRUE(small_windows_forward(x.call, run)) << about;
  ASSERT_TRUE(small_windows_backward(x.call, x.gradients, run)) << about;
  const Array mask = seen_pairs(x.call.grid);
  FlashOptions dense;
  dense.mask = mask;
  const Array q = sequence_of(x.q), k = sequence_of(x.k), v = sequence_of(x.v);
  const AttentionResult want = flash_attention(q, k, v, dense);
  const double bound = type == DType::f64    ? 1e-13
                       : type == DType::f32  ? 3e-6
                       : type == DType::bf16 ? 1e-2
                                             : 1.5e-3;
  EXPECT_LT(largest_difference(sequence_of(x.out), want.out), bound) << about;
  EXPECT_LT(largest_difference(sums_of(x.lse), want.lse), type == DType::f64 ? 1e-13 : 1e-5)
      << about;
  const FlashGradients grads =
      flash_attention_backward(sequence_of(x.grad_out), sums_of(x.grad_lse), q, k, v,
                               sequence_of(x.out), sums_of(x.lse), dense);
  const std::pair<const Array*, const Array*> pairs[] = {
      {&x.dq, &grads.q}, {&x.dk, &grads.k}, {&x.dv, &grads.v}};
  for (const auto& [got, exact] : pairs) {
    const double size = largest_difference(*exact, Array::zeros(DType::f64, exact->shape()));
    EXPECT_LT(largest_difference(sequence_of(*got), *exact), bound * std::max(1.0, size)) << about;
  }
}

TEST(SmallWindows, EveryTypeIsaAndShape) {
  const std::vector<PlaneCase> cases = {
      {9, 21, 2, 1, 8, 8, {3}},
      {12, 33, 4, 2, 5, 11, {5, 7}},
      {7, 16, 1, 1, 33, 1, {7}},
      {3, 70, 2, 2, 16, 20, {1, 13}},
      {40, 3, 2, 1, 7, 16, {9, 2}},
      {14, 19, 2, 2, 6, 9, {4, 6}, {2, 3}},
      {13, 17, 2, 2, 6, 9, {3, 2}, {1}, {4, 3}},
      {11, 18, 2, 1, 9, 6, {5, 4}, {2, 1}, {2, 1}, {true, false}},
      {10, 40, 1, 1, 12, 4, {3, 9}, {3, 4}, {1}, {true, true}},
      {1, 50, 2, 2, 4, 4, {1, 5}},
      {1, 150, 1, 1, 3, 5, {1, 31}, {1}, {1, 2}},
  };
  for (Isa isa : available_isas()) {
    for (DType type : {DType::f64, DType::f32, DType::bf16, DType::f16}) {
      for (const PlaneCase& n : cases) check_case(n, type, isa);
    }
  }
}

TEST(SmallWindows, SameBitsForAnyThreadCount) {
  const PlaneCase n{60, 130, 6, 3, 20, 20, {5}};
  const PlaneArrays one(n, DType::f32);
  ASSERT_TRUE(small_windows_forward(one.call, {.threads = 1}));
  ASSERT_TRUE(small_windows_backward(one.call, one.gradients, {.threads = 1}));
  for (int threads : {2, 7, 16}) {
    const PlaneArrays more(n, DType::f32);
    ASSERT_TRUE(small_windows_forward(more.call, {.threads = threads}));
    ASSERT_TRUE(small_windows_backward(more.call, more.gradients, {.threads = threads}));
    EXPECT_TRUE(same_bits(one.out, more.out)) << threads;
    EXPECT_TRUE(same_bits(one.dq, more.dq)) << threads;
    EXPECT_TRUE(same_bits(one.dk, more.dk)) << threads;
    EXPECT_TRUE(same_bits(one.dv, more.dv)) << threads;
  }
}

// Tiles say what becomes of what is not finite.
TEST(SmallWindows, LeavesWhatIsNotFiniteToTiles) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  const PlaneCase n{9, 20, 1, 1, 8, 8, {3}};
  for (int which : {0, 1, 2}) {
    for (float bad : {kInf, -kInf, std::numeric_limits<float>::quiet_NaN(), 3e38F}) {
      Array in[3];
      for (uint32_t i = 0; i < 3; ++i) in[i] = random_array(DType::f32, {1, 9, 20, 1, 8}, i);
      in[which].as<float>()[8 * 77 + 3] = bad;
      if (bad == 3e38F) in[1 - which % 2].as<float>()[8 * 77 + 3] = bad;
      const Array out(DType::f32, in[0].shape());
      const GridCall call("test", 2, in[0], in[1], in[2], out, {}, options_of(n));
      const bool finite = which == 2 && bad == 3e38F;
      EXPECT_EQ(small_windows_forward(call, {}), finite) << which << " " << bad;
      const AttentionResult result = na2d(in[0], in[1], in[2], options_of(n));
      EXPECT_FALSE(std::isnan(result.out.as<float>()[8 * 20])) << "far from it";
    }
  }
}

TEST(SmallWindows, LeaveUnusualGradientsToTiles) {
  const PlaneCase n{9, 20, 2, 1, 8, 8, {3}};
  const auto usual = [&](const auto& change) {
    PlaneArrays x(n, DType::f32);
    EXPECT_TRUE(small_windows_forward(x.call, {}));
    change(x);
    return small_windows_backward(x.call, x.gradients, {});
  };
  constexpr float kInf = std::numeric_limits<float>::infinity();
  EXPECT_TRUE(usual([](PlaneArrays&) {}));
  EXPECT_FALSE(usual([](PlaneArrays& x) { x.k.as<float>()[100] = kInf; }));
  EXPECT_FALSE(usual([](PlaneArrays& x) { x.grad_out.as<float>()[77] = NAN; }));
  EXPECT_FALSE(usual([](PlaneArrays& x) { x.grad_lse.as<float>()[55] = kInf; }));
  EXPECT_FALSE(usual([](PlaneArrays& x) { x.lse.as<float>()[33] = -kInf; }));
  EXPECT_FALSE(usual([](PlaneArrays& x) { x.lse.as<float>()[33] = 2e6F; })) << "rounded to eighths";
}

TEST(SmallWindows, AreTakenWhereTilesWouldComputeFarMore) {
  const auto taken = [](auto takes, int64_t side, int64_t kernel, int64_t stride, DType type) {
    const Array x = Array::zeros(type, {1, side, side, 1, 32});
    const PlaneCase n{side, side, 1, 1, 32, 32, {kernel}, {stride}};
    const GridCall call("test", 2, x, x, x, {}, {}, options_of(n));
    return takes(call, shapes_for(call, {}), RunOptions());
  };
  for (const auto takes : {takes_small_windows, takes_small_windows_backward}) {
    EXPECT_TRUE(taken(takes, 56, 3, 1, DType::f32));
    EXPECT_TRUE(taken(takes, 56, 7, 1, DType::f32));
    EXPECT_TRUE(taken(takes, 56, 5, 1, DType::bf16));
    EXPECT_FALSE(taken(takes, 14, 13, 1, DType::f32));
    EXPECT_FALSE(taken(takes, 64, 24, 8, DType::f32));
  }
}

}  // namespace
}  // namespace heed::na
