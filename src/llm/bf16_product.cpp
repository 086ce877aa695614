#include "llm/bf16_product.h"

#include "base/parallel.h"
#include "libtorch/library.h"

namespace heed {

bool has_bf16_products() { return torch_library() != nullptr; }

bool bf16_products_are_fast(const RunOptions& run) {
  if (chosen_isa(run) < Isa::avx512) return false;
  return cpu_info().has("amx_bf16") || cpu_info().has("avx512_bf16");
}

void bf16_product(const Tensor& x, const Tensor& w, const Tensor& y, const RunOptions& run) {
  // Starting threads costs more than a product of this size gains from another one.
  constexpr int64_t kMultiplyAddsPerThread = int64_t{1} << 20;
  const int threads =
      threads_for(run, 1 + x.size(0) * w.size(0) * w.size(1) / kMultiplyAddsPerThread);
  torch_library()->product(x, w, y, threads);
}

}  // namespace heed
