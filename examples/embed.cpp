// heed without PyTorch: caller memory in, caller memory out.
#include <cstdio>
#include <vector>

#include "heed/heed.h"

int main() {
  using heed::DType;
  using heed::Tensor;
  constexpr int64_t kTokens = 4, kHeadDim = 8;
  std::vector<float> q(kHeadDim, 1.0f), k(kTokens * kHeadDim, 0.0f), v{1, 2, 3, 4}, out(1), lse(1);

  // One batch, one head; one query over four keys of equal score: the mean of v, and log 4.
  heed::flash_attention(Tensor(q.data(), DType::f32, {1, 1, 1, kHeadDim}),
                        Tensor(k.data(), DType::f32, {1, 1, kTokens, kHeadDim}),
                        Tensor(v.data(), DType::f32, {1, 1, kTokens, 1}),
                        Tensor(out.data(), DType::f32, {1, 1, 1, 1}),
                        Tensor(lse.data(), DType::f32, {1, 1, 1}), {.masks = {.causal = true}});
  std::printf("out = %.4f, lse = %.4f\n", out[0], lse[0]);
}
