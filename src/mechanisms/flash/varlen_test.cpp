// Packed sequences beside batches and single ones.
#include <gtest/gtest.h>

#include <utility>
#include <vector>

#include "heed/heed.h"
#include "mechanisms/test_arrays.h"

namespace heed {
namespace {

TEST(FlashVarlen, SlopeGradientsThatAreNotWantedAreLeftOut) {
  const Array q = random_array(DType::f32, {70, 2, 16}, 1),
              slopes = random_array(DType::f32, {2}, 2);
  const int32_t boundaries[] = {0, 30, 70};
  const Tensor cu(boundaries, DType::i32, {3});
  VarlenOptions options;
  options.alibi_slopes = slopes;
  const AttentionResult result = flash_attention_varlen(q, q, q, cu, cu, options);
  const auto backward = [&](const FlashWanted& wanted) {
    return flash_attention_varlen_backward(q, {}, q, q, q, result.out, result.lse, cu, cu, options,
                                           {}, wanted);
  };
  const FlashGradients all = backward({}), some = backward({.alibi_slopes = false});
  EXPECT_TRUE(same_bits(some.q, all.q));
  EXPECT_TRUE(same_bits(some.k, all.k));
  EXPECT_TRUE(same_bits(some.v, all.v));
  EXPECT_TRUE(all.alibi_slopes.view().defined());
  EXPECT_FALSE(some.alibi_slopes.view().defined());
}

// A prompt beside sequences that go on by a token or two: each gets what it gets alone.
TEST(FlashVarlen, FewQueriesBesideManyAreReadLikeAlone) {
  const std::vector<int64_t> queries{150, 1, 0, 2, 1}, keys{150, 1300, 40, 700, 1};
  std::vector<int32_t> query_ends{0}, key_ends{0};
  for (size_t s = 0; s < queries.size(); ++s) {
    query_ends.push_back(query_ends.back() + static_cast<int32_t>(queries[s]));
    key_ends.push_back(key_ends.back() + static_cast<int32_t>(keys[s]));
  }
  for (DType type : {DType::f64, DType::f32, DType::bf16}) {
    const Array q = random_array(type, {query_ends.back(), 4, 64}, 1),
                k = random_array(type, {key_ends.back(), 2, 64}, 2),
                v = random_array(type, {key_ends.back(), 2, 32}, 3);
    for (Isa isa : available_isas()) {
      for (double dropout : {0.0, 0.3}) {
        const VarlenOptions options{.causal = true, .dropout_p = dropout, .seed = 5};
        const auto call = [&](size_t first, size_t last) {
          const auto ends = [&](const std::vector<int32_t>& all) {
            std::vector<int32_t> some;
            for (size_t s = first; s <= last; ++s) some.push_back(all[s] - all[first]);
            return some;
          };
          std::vector<int32_t> q_ends = ends(query_ends), k_ends = ends(key_ends);
          const auto part = [&](const Array& x, const std::vector<int32_t>& all) {
            return x.view().slice(0, all[first], all[last]);
          };
          const auto count = static_cast<int64_t>(q_ends.size());
          return flash_attention_varlen(part(q, query_ends), part(k, key_ends), part(v, key_ends),
                                        Tensor(q_ends.data(), DType::i32, {count}),
                                        Tensor(k_ends.data(), DType::i32, {count}), options,
                                        RunOptions{.isa = isa});
        };
        const AttentionResult all = call(0, queries.size());
        for (size_t s = 0; s < queries.size(); ++s) {
          if (dropout > 0 && s > 0) break;  // its numbers count sequences
          const AttentionResult one = call(s, s + 1);
          const Tensor rows = all.out.view().slice(0, query_ends[s], query_ends[s + 1]);
          EXPECT_TRUE(same_bits(one.out, rows))
              << name_of(type) << " " << name_of(isa) << " sequence " << s;
        }
      }
    }
  }
}

// Keys that no query of their sequence reads; rows that are longer than the least that memory is taken for.
TEST(FlashVarlen, GradientsBesideASequenceWithoutQueries) {
  for (DType type : {DType::f64, DType::f32, DType::bf16}) {
    const Array q = random_array(type, {3, 4, 100}, 1), k = random_array(type, {48, 2, 100}, 2),
                v = random_array(type, {48, 2, 40}, 3), g = random_array(type, {3, 4, 40}, 4);
    const int32_t query_ends[] = {0, 0, 3}, key_ends[] = {0, 40, 48};
    const Tensor cu_q(query_ends, DType::i32, {3}), cu_k(key_ends, DType::i32, {3});
    for (Isa isa : available_isas()) {
      const RunOptions run{.isa = isa};
      const auto gradients = [&](const Tensor& keys, const Tensor& values, const Tensor& q_ends,
                                 const Tensor& k_ends) {
        const AttentionResult result =
            flash_attention_varlen(q, keys, values, q_ends, k_ends, {}, run);
        return flash_attention_varlen_backward(g, {}, q, keys, values, result.out, result.lse,
                                               q_ends, k_ends, {}, run);
      };
      const int32_t own_queries[] = {0, 3}, own_keys[] = {0, 8};
      const FlashGradients both = gradients(k, v, cu_q, cu_k);
      const FlashGradients alone =
          gradients(k.view().slice(0, 40, 48), v.view().slice(0, 40, 48),
                    Tensor(own_queries, DType::i32, {2}), Tensor(own_keys, DType::i32, {2}));
      EXPECT_TRUE(same_bits(both.q, alone.q)) << name_of(type) << " " << name_of(isa);
      EXPECT_TRUE(same_bits(both.k.view().slice(0, 40, 48), alone.k));
      EXPECT_TRUE(same_bits(both.v.view().slice(0, 40, 48), alone.v));
      for (const Array* x : {&both.k, &both.v}) {
        const Array unread = convert(x->view().slice(0, 0, 40), DType::f64);
        for (int64_t i = 0; i < unread.count(); ++i) ASSERT_EQ(unread.as<double>()[i], 0);
      }
    }
  }
}

TEST(FlashVarlen, SequencesOfOneLengthAreABatch) {
  constexpr int64_t kBatch = 3, kQueries = 50, kKeys = 70;
  std::vector<int32_t> query_ends, key_ends;
  for (int32_t b = 0; b <= kBatch; ++b) {
    query_ends.push_back(b * kQueries);
    key_ends.push_back(b * kKeys);
  }
  const Tensor cu_q(query_ends.data(), DType::i32, {kBatch + 1});
  const Tensor cu_k(key_ends.data(), DType::i32, {kBatch + 1});
  // [B,H,L,D] as tokens [B*L,H,D] of the same memory, and back.
  const auto batch = [](const Tensor& t, int64_t length) {
    const int64_t heads = t.size(1), dim = t.size(2);
    return Tensor(t.data(), t.dtype(), {kBatch, heads, length, dim},
                  {length * heads * dim, dim, heads * dim, 1});
  };
  for (DType type : {DType::f64, DType::f32, DType::bf16, DType::f16}) {
    const Array q = random_array(type, {kBatch * kQueries, 4, 24}, 1),
                k = random_array(type, {kBatch * kKeys, 2, 24}, 2);
    const Array v = random_array(type, {kBatch * kKeys, 2, 16}, 3),
                g = random_array(type, {kBatch * kQueries, 4, 16}, 4);
    const Array slopes = random_array(DType::f32, {4}, 5), sink = random_array(DType::f32, {4}, 6);
    for (Isa isa : available_isas()) {
      RunOptions run;
      run.isa = isa;
      FlashOptions options;
      options.masks.causal = true;
      options.softcap = 2;
      options.alibi_slopes = slopes;
      options.sink = sink;
      options.dropout_p = 0.3;
      options.seed = 11;
      const VarlenOptions packed{.causal = true,
                                 .softcap = 2,
                                 .alibi_slopes = slopes,
                                 .sink = sink,
                                 .dropout_p = 0.3,
                                 .seed = 11};
      const Tensor q4 = batch(q, kQueries), k4 = batch(k, kKeys), v4 = batch(v, kKeys);
      const AttentionResult expected = flash_attention(q4, k4, v4, options, run);
      const AttentionResult found = flash_attention_varlen(q, k, v, cu_q, cu_k, packed, run);
      const FlashGradients wanted = flash_attention_backward(
          batch(g, kQueries), {}, q4, k4, v4, expected.out, expected.lse, options, run);
      const FlashGradients to = flash_attention_varlen_backward(g, {}, q, k, v, found.out,
                                                                found.lse, cu_q, cu_k, packed, run);
      const auto same = [&](const Array& a, const Array& b, int64_t length, const char* name) {
        const Tensor view = length > 0 ? batch(a, length) : a.view();
        EXPECT_EQ(largest_difference(view, b), 0)
            << name << " " << name_of(type) << " " << name_of(isa);
      };
      same(found.out, expected.out, kQueries, "out");
      same(to.q, wanted.q, kQueries, "q");
      same(to.k, wanted.k, kKeys, "k");
      same(to.v, wanted.v, kKeys, "v");
      same(to.alibi_slopes, wanted.alibi_slopes, 0, "alibi_slopes");
      same(to.sink, wanted.sink, 0, "sink");
    }
  }
}

}  // namespace
}  // namespace heed
