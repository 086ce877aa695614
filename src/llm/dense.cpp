#include "llm/dense.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <c10/core/InferenceMode.h>

#include "base/parallel.h"

namespace heed {

namespace {

at::Tensor wrap(const Tensor& x) {
  return at::from_blob(x.data(), {x.size(0), x.size(1)}, {x.stride(0), x.stride(1)},
                       x.dtype() == DType::f32 ? at::kFloat : at::kBFloat16);
}

}  // namespace

void dense_product(const Tensor& x, const Tensor& w, const Tensor& y, const RunOptions& run) {
  c10::InferenceMode inference;
  // Starting threads costs more than a product of this size gains from another one.
  constexpr int64_t kMultiplyAddsPerThread = int64_t{1} << 20;
  const int threads =
      threads_for(run, 1 + x.size(0) * w.size(0) * w.size(1) / kMultiplyAddsPerThread);
  if (at::get_num_threads() != threads) at::set_num_threads(threads);
  at::Tensor out = wrap(y);
  at::mm_out(out, wrap(x), wrap(w).t());
}

bool bf16_products_are_fast() {
  return cpu_info().has("amx_bf16") || cpu_info().has("avx512_bf16");
}

}  // namespace heed
