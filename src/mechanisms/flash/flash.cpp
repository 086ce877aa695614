#include <memory>
#include <string>

#include "heed/flash_attention.h"
#include "mechanisms/flash/policy.h"
#include "mechanisms/flash/terms.h"
#include "mechanisms/results.h"

namespace heed {

namespace {

constexpr const char* kFlash = "flash_attention";

// Tiles that fall on the blocks of a block mask, so that dead blocks cost nothing; 0, which leaves the
// choice to the engine, where one block is all there is.
int64_t tile_for_block(int64_t block, int64_t extent, int64_t least, int64_t most) {
  if (block >= extent) return 0;
  if (block < least) return most / block * block;
  int64_t tile = block;
  for (int64_t parts = 2; tile > most; ++parts) {
    if (block % parts == 0) tile = block / parts;
    if (parts > block) return most;
  }
  return tile < least ? most : tile;
}

struct Call {
  tiled::Problem problem;
  FlashTerms terms;
};

std::unique_ptr<Call> make_call(const Tensor& q, const Tensor& k, const Tensor& v,
                                const Tensor& out, const Tensor& lse, const FlashOptions& options,
                                const RunOptions& run) {
  tiled::check_operands(kFlash, q, k, v, out, lse, kAnyHeadDim);
  const int64_t heads = q.size(1);
  auto call = std::make_unique<Call>(
      Call{{}, FlashTerms(options, {q.size(0), heads, q.size(2), k.size(2)}, q.dtype(), run)});
  tiled::Problem& problem = call->problem;
  problem.sequences = tiled::batch_sequences(
      q, k, v, out, lse,
      tiled::TilePlan::from_masks(kFlash, options.masks, q.size(0), q.size(2), k.size(2)));
  problem.scale = tiled::resolve_scale(kFlash, options.scale, q.size(3));
  problem.policy = softmax_policy(kFlash, q.size(0), heads, options.softcap, options.alibi_slopes,
                                  options.sink, options.dropout_p, options.seed);
  if (call->terms.needed()) problem.terms = &call->terms;
  if (options.block_mask.defined()) {
    problem.query_tile = tile_for_block(options.block_size[0], q.size(2), 16, 64);
    problem.key_tile = tile_for_block(options.block_size[1], k.size(2), 64, 256);
  }
  return call;
}

}  // namespace

void flash_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                     const Tensor& lse, const FlashOptions& options, const RunOptions& run) {
  tiled::forward(make_call(q, k, v, out, lse, options, run)->problem, run);
}

AttentionResult flash_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                const FlashOptions& options, const RunOptions& run) {
  AttentionResult result{empty_result(q, v), empty_statistic(q)};
  flash_attention(q, k, v, result.out, result.lse, options, run);
  return result;
}

FlashGradients flash_attention_backward(const Tensor& grad_out, const Tensor& grad_lse,
                                        const Tensor& q, const Tensor& k, const Tensor& v,
                                        const Tensor& out, const Tensor& lse,
                                        const FlashOptions& options, const RunOptions& run,
                                        const FlashWanted& wanted) {
  const auto call = make_call(q, k, v, out, lse, options, run);
  tiled::Problem& problem = call->problem;
  tiled::check_backward(kFlash, grad_out, grad_lse, out, lse);
  const bool slopes_wanted = wanted.alibi_slopes && options.alibi_slopes.defined();
  const bool bias_wanted = wanted.bias && options.bias.defined();
  problem.head_gradients = slopes_wanted;
  FlashGradients to;
  to.q = empty_like(q);
  to.k = empty_like(k);
  to.v = empty_like(v);
  const tiled::HeadGradients heads =
      tiled::backward(problem, tiled::batch_gradients(grad_out, grad_lse, to.q, to.k, to.v),
                      bias_wanted ? &call->terms : nullptr, run);
  if (slopes_wanted) to.alibi_slopes = head_gradient(heads.alibi_slope, options.alibi_slopes);
  to.sink = head_gradient(heads.sink, options.sink);
  if (bias_wanted) to.bias = call->terms.bias_gradient();
  return to;
}

void decode_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                      const Tensor& lengths, const Tensor& out, const Tensor& lse,
                      const DecodeOptions& options, const RunOptions& run) {
  constexpr const char* kOp = "decode_attention";
  tiled::check_operands(kOp, q, k_cache, v_cache, out, lse, kAnyHeadDim, {"k_cache", "v_cache"});
  check_decode_queries(kOp, q);
  if (options.splits < 0) {
    fail(kOp, "splits is " + std::to_string(options.splits),
         "0 (chosen) or a positive number is needed");
  }
  tiled::Problem problem;
  problem.sequences =
      tiled::batch_sequences(q, k_cache, v_cache, out, lse,
                             tiled::TilePlan::for_decoding(kOp, lengths, options.window, q.size(0),
                                                           q.size(2), k_cache.size(2)));
  problem.scale = tiled::resolve_scale(kOp, options.scale, q.size(3));
  problem.policy = softmax_policy(kOp, q.size(0), q.size(1), options.softcap, options.alibi_slopes,
                                  options.sink);
  if (options.splits > 0) problem.splits = options.splits;
  tiled::forward(problem, run);
}

AttentionResult decode_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                 const Tensor& lengths, const DecodeOptions& options,
                                 const RunOptions& run) {
  AttentionResult result{empty_result(q, v_cache), empty_statistic(q)};
  decode_attention(q, k_cache, v_cache, lengths, result.out, result.lse, options, run);
  return result;
}

}  // namespace heed
