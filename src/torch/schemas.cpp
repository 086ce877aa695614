// Every operator that PyTorch sees, one row each. python/heed gives them the signatures of the
// documentation; here `window` is two numbers (-1 = open) and results are always complete.
#include <torch/library.h>

#include <string>

#include "heed/version.h"

TORCH_LIBRARY(heed, m) {
  m.def("version", [] { return std::string(heed::kVersion); });

  m.def(
      "flash_attention(Tensor q, Tensor k, Tensor v, *, bool causal=False,"
      " SymInt window_left=-1, SymInt window_right=-1, Tensor? lengths=None, float? scale=None)"
      " -> (Tensor out, Tensor lse)");
  m.def(
      "decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, *,"
      " float? scale=None, SymInt window=-1, int splits=0) -> (Tensor out, Tensor lse)");
  m.def(
      "merge_attention(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b)"
      " -> (Tensor out, Tensor lse)");
  m.def(
      "sigmoid_attention(Tensor q, Tensor k, Tensor v, *, float? bias_value=None,"
      " Tensor? bias=None, bool causal=False, SymInt window_left=-1, SymInt window_right=-1,"
      " Tensor? lengths=None, float? scale=None, Tensor? alibi_slopes=None) -> Tensor out");
}
