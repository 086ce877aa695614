// The compositions compute what heed computes, so that a benchmark compares like with like.
#include "torch/peers.h"

#include <gtest/gtest.h>

#include <array>
#include <random>
#include <stdexcept>

#include "heed/heed.h"

namespace heed {
namespace {

Array random_array(const Dims& shape, unsigned seed) {
  Array array(DType::f64, shape);
  std::mt19937 generator(seed);
  std::normal_distribution<double> normal;
  for (int64_t i = 0; i < array.count(); ++i) array.as<double>()[i] = normal(generator);
  return array;
}

struct Call {
  Call(int64_t heads, int64_t kv_heads, int64_t queries, int64_t keys)
      : q(random_array({2, heads, queries, 6}, 1)),
        k(random_array({2, kv_heads, keys, 6}, 2)),
        v(random_array({2, kv_heads, keys, 5}, 3)) {}
  NamedTensors named() const { return {{"q", q}, {"k", k}, {"v", v}}; }
  Array q, k, v;
};

void expect_close(const Array& found, const Array& expected) {
  ASSERT_EQ(to_string(found.shape()), to_string(expected.shape()));
  ASSERT_EQ(found.dtype(), DType::f64);
  for (int64_t i = 0; i < found.count(); ++i) {
    ASSERT_NEAR(found.as<double>()[i], expected.as<double>()[i], 1e-12) << "element " << i;
  }
}

Peer ready(const char* mechanism, const NamedTensors& in, const char* options) {
  auto peer = make_peer(mechanism, in, Spec::parse_options(options));
  if (!peer) throw std::logic_error("PyTorch has no composition for this call");
  return *std::move(peer);
}

Array run(const char* mechanism, const NamedTensors& in, const char* options) {
  const Peer peer = ready(mechanism, in, options);
  peer.compute();
  return peer.result();
}

TEST(Peers, FlashAttention) {
  for (const auto& [heads, kv_heads, queries, keys] :
       {std::array{4, 4, 7, 7}, std::array{4, 2, 7, 7}, std::array{4, 1, 3, 9}}) {
    const Call call(heads, kv_heads, queries, keys);
    expect_close(run("flash_attention", call.named(), ""),
                 flash_attention(call.q, call.k, call.v).out);
    expect_close(
        run("flash_attention", call.named(), "causal=1,scale=0.3"),
        flash_attention(call.q, call.k, call.v, {.masks = {.causal = true}, .scale = 0.3}).out);
  }
}

TEST(Peers, DecodeAttention) {
  for (const int64_t queries : {1, 4}) {
    const Call call(4, 2, queries, 9);
    Array lengths(DType::i32, {2});
    const NamedTensors in = {
        {"q", call.q}, {"k_cache", call.k}, {"v_cache", call.v}, {"lengths", lengths}};
    lengths.as<int32_t>()[0] = lengths.as<int32_t>()[1] = 7;
    expect_close(run("decode_attention", in, "scale=0.3"),
                 decode_attention(call.q, call.k, call.v, lengths, {.scale = 0.3}).out);
    lengths.as<int32_t>()[1] = 6;
    EXPECT_FALSE(make_peer("decode_attention", in, {}));
  }
}

TEST(Peers, SigmoidAttention) {
  const Call call(4, 2, 3, 9);
  expect_close(run("sigmoid_attention", call.named(), ""),
               sigmoid_attention(call.q, call.k, call.v));
  expect_close(run("sigmoid_attention", call.named(), "causal=1,bias=-2,scale=0.3"),
               sigmoid_attention(call.q, call.k, call.v,
                                 {.masks = {.causal = true}, .scale = 0.3, .bias = -2.0}));
  const Array bias = random_array({4}, 4);
  NamedTensors in = call.named();
  in["bias"] = bias;
  expect_close(run("sigmoid_attention", in, ""),
               sigmoid_attention(call.q, call.k, call.v, {.bias = bias.view()}));
}

TEST(Peers, NoneForWhatPyTorchDoesNotOffer) {
  const Call call(2, 2, 3, 3);
  const NamedTensors in = call.named();
  EXPECT_FALSE(make_peer("flash_attention", in, Spec::parse_options("window=2")));
  EXPECT_FALSE(make_peer("parallax_attention", in, {}));
  NamedTensors with_lengths = in;
  with_lengths["lengths"] = call.q;
  EXPECT_FALSE(make_peer("flash_attention", with_lengths, {}));
}

TEST(Peers, ResultNeedsARun) {
  const Call call(2, 2, 3, 3);
  EXPECT_THROW(ready("flash_attention", call.named(), "").result(), Error);
}

}  // namespace
}  // namespace heed
