// What the records of attention-shaped mechanisms share: options as text, masks, cascade bindings.
#pragma once
#include <string>
#include <vector>

#include "heed/masks.h"
#include "mechanisms/registry.h"

namespace heed {

/// Keys of a Spec that describe masks and scale: causal, window (= left), left, right, scale.
const std::vector<std::string>& mask_keys();
/// Throws Error on keys that are neither mask keys nor in `more`.
void require_attention_keys(const Spec& options, const std::vector<std::string>& more = {});

/// Masks from options and, if present, the input "lengths".
Masks masks_of(const NamedTensors& in, const Spec& options);

/// Q, K, V in float64, scale, g(h) = h / (H/Hkv), keep(b,p,m) by the text of masks.h, and the split
/// size M0 of tiled cascades.
cascade::Bindings bind_attention(const NamedTensors& in, const Spec& options);

/// Alibi_Slopes[sb(b),h]: the input [H] or [B,H] as [1,H] or [B,H], zeros where there is none.
void bind_slopes(const NamedTensors& in, cascade::Bindings& bindings);
/// The gradient of such an input as the cascade has it.
Array slopes_gradient(Array gradient);

/// Fills "lengths" with values from 0 to the number of keys; leaves other inputs alone.
void fill_lengths(const ExampleCase& example, const std::string& input, uint64_t seed,
                  const Tensor& to_fill);

/// The tiled engine's answer for inputs q, k, v.
std::vector<PathAnswer> explain_attention(const NamedTensors& in, const Spec& options,
                                          const RunOptions& run);

/// Inputs q [B,H,Lq,D], k [B,Hkv,Lk,D], v [B,Hkv,Lk,Dv].
struct AttentionShape {
  int64_t batch = 1, heads = 1, kv_heads = 1, queries = 1, keys = 1, dim = 1, value_dim = 1;
};
ExampleCase attention_case(std::string name, const AttentionShape& shape, std::string options);
/// The same with right padding.
ExampleCase padded_case(std::string name, const AttentionShape& shape, std::string options);

/// Random numbers for random cases, a function of the seed alone.
class CaseRandom {
 public:
  explicit CaseRandom(uint64_t seed) : seed_(seed) {}
  int64_t between(int64_t least, int64_t most);  // both ends included
  bool chance(double probability);
  double number(double least, double most);

 private:
  uint64_t seed_, drawn_ = 0;
};
/// A call of the tiled engine with random shapes (few rows now and then, several key tiles), masks and
/// scale. `extra` options are appended.
ExampleCase random_attention_case(CaseRandom& random, const std::string& extra = "");

/// Shapes that every mechanism of the tiled engine is tried on: one key, odd sizes, grouped heads,
/// more queries than keys, several tiles; each with `options` added.
std::vector<ExampleCase> common_attention_cases(const std::string& options = "");
/// The shapes of `heed bench`: head dims 32, 64, 80, 128, 512 to 4,096 tokens, full and causal.
std::vector<ExampleCase> attention_bench_cases();

}  // namespace heed
