// ALiBi slopes for each sequence, [B,H]: a batch is its sequences by themselves with slopes [H].
#include <gtest/gtest.h>

#include <string>

#include "heed/heed.h"
#include "mechanisms/test_arrays.h"

namespace heed {
namespace {

constexpr int64_t kBatch = 3, kHeads = 4, kKeys = 40, kDim = 8;

struct Inputs {
  explicit Inputs(int64_t queries)
      : q(random_array(DType::f64, {kBatch, kHeads, queries, kDim}, 1)),
        k(random_array(DType::f64, {kBatch, 2, kKeys, kDim}, 2)),
        v(random_array(DType::f64, {kBatch, 2, kKeys, kDim}, 3)),
        slopes(random_array(DType::f64, {kBatch, kHeads}, 4, 0.1)) {}
  Array q, k, v, slopes;
};

Tensor entry(const Array& x, int64_t b) { return x.view().slice(0, b, b + 1); }
/// [L,H,D] of a batch [B,H,L,D] of sequences of one length.
Array packed(const Tensor& x) {
  Array rows(x.dtype(), {x.size(0) * x.size(2), x.size(1), x.size(3)});
  for (int64_t b = 0; b < x.size(0); ++b) {
    for (int64_t h = 0; h < x.size(1); ++h) {
      const int64_t begin = b * x.size(2);
      copy(x.select(0, b).select(0, h),
           rows.view().slice(0, begin, begin + x.size(2)).select(1, h));
    }
  }
  return rows;
}

TEST(SlopesOfSequences, AreThoseOfCallsByThemselves) {
  for (int64_t queries : {1, 30}) {
    const Inputs in(queries);
    const Array g = random_array(DType::f64, in.q.shape(), 5);
    FlashOptions options;
    options.alibi_slopes = in.slopes;
    const AttentionResult all = flash_attention(in.q, in.k, in.v, options);
    const FlashGradients to =
        flash_attention_backward(g, {}, in.q, in.k, in.v, all.out, all.lse, options);
    SigmoidOptions sigmoid;
    sigmoid.alibi_slopes = in.slopes;
    const Array of_sigmoid = sigmoid_attention(in.q, in.k, in.v, sigmoid);
    const SigmoidGradients to_sigmoid = sigmoid_attention_backward(g, in.q, in.k, in.v, sigmoid);
    for (int64_t b = 0; b < kBatch; ++b) {
      const Tensor q = entry(in.q, b), k = entry(in.k, b), v = entry(in.v, b);
      options.alibi_slopes = sigmoid.alibi_slopes = in.slopes.view().select(0, b);
      const AttentionResult one = flash_attention(q, k, v, options);
      EXPECT_LT(largest_difference(entry(all.out, b), one.out), 1e-14);
      EXPECT_LT(largest_difference(entry(all.lse, b), one.lse), 1e-14);
      const FlashGradients own =
          flash_attention_backward(entry(g, b), {}, q, k, v, one.out, one.lse, options);
      EXPECT_LT(largest_difference(to.alibi_slopes.view().select(0, b), own.alibi_slopes), 1e-12);
      EXPECT_LT(largest_difference(entry(to.k, b), own.k), 1e-13);
      EXPECT_LT(largest_difference(entry(of_sigmoid, b), sigmoid_attention(q, k, v, sigmoid)),
                1e-14);
      const SigmoidGradients own_sigmoid =
          sigmoid_attention_backward(entry(g, b), q, k, v, sigmoid);
      EXPECT_LT(
          largest_difference(to_sigmoid.alibi_slopes.view().select(0, b), own_sigmoid.alibi_slopes),
          1e-12);
    }
  }
}

TEST(SlopesOfSequences, OfPackedSequencesAndDecodingAreThoseOfABatch) {
  const Inputs in(1);
  const int64_t ends[] = {0, kKeys, 2 * kKeys, 3 * kKeys}, queries[] = {0, 1, 2, 3};
  const Tensor cu_k(ends, DType::i64, {kBatch + 1}), cu_q(queries, DType::i64, {kBatch + 1});
  FlashOptions options;
  options.alibi_slopes = in.slopes;
  const AttentionResult batch = flash_attention(in.q, in.k, in.v, options);
  const Array g = random_array(DType::f64, in.q.shape(), 5);
  const FlashGradients to =
      flash_attention_backward(g, {}, in.q, in.k, in.v, batch.out, batch.lse, options);
  VarlenOptions varlen;
  varlen.alibi_slopes = in.slopes;
  const Array q = packed(in.q), k = packed(in.k), v = packed(in.v);
  const AttentionResult rows = flash_attention_varlen(q, k, v, cu_q, cu_k, varlen);
  EXPECT_LT(largest_difference(rows.out, packed(batch.out)), 1e-14);
  const FlashGradients to_rows = flash_attention_varlen_backward(packed(g), {}, q, k, v, rows.out,
                                                                 rows.lse, cu_q, cu_k, varlen);
  EXPECT_LT(largest_difference(to_rows.alibi_slopes, to.alibi_slopes), 1e-13);
  const int64_t lengths[] = {kKeys, kKeys, kKeys};
  DecodeOptions decode;
  decode.alibi_slopes = in.slopes;
  const AttentionResult decoded =
      decode_attention(in.q, in.k, in.v, Tensor(lengths, DType::i64, {kBatch}), decode);
  EXPECT_LT(largest_difference(decoded.out, batch.out), 1e-14);
}

TEST(SlopesOfSequences, ErrorsSayBothShapes) {
  const Inputs in(5);
  for (const Dims& shape : {Dims{3}, Dims{2, kHeads}, Dims{kBatch, 2}, Dims{1, kBatch, kHeads}}) {
    const Array slopes = random_array(DType::f32, shape, 1);
    FlashOptions options;
    options.alibi_slopes = slopes;
    const std::string message = error_of([&] { flash_attention(in.q, in.k, in.v, options); });
    for (const char* part : {"alibi_slopes", "[4] or [3,4]"}) {
      EXPECT_NE(message.find(part), std::string::npos) << message;
    }
  }
}

}  // namespace
}  // namespace heed
