// The registry: one record per mechanism. The command line, the checks, the benchmarks, the docs and
// the conformance tests are loops over it; no other file holds a list of mechanisms.
#pragma once
#include <functional>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cascade/cascade.h"
#include "engine/candidates.h"
#include "heed/run.h"
#include "heed/tensor.h"
#include "mechanisms/spec.h"

namespace heed {

using NamedTensors = std::map<std::string, Tensor>;
using NamedArrays = std::map<std::string, Array>;

/// Arrays by name: named_arrays({"out", "lse"}, out, lse).
template <class... Arrays>
NamedArrays named_arrays(const char* const (&names)[sizeof...(Arrays)], Arrays... arrays) {
  NamedArrays named;
  const char* const* name = names;
  (named.emplace(*name++, std::move(arrays)), ...);
  return named;
}

/// A call to try: input shapes by argument name and options in the form of a Spec.
struct ExampleCase {
  std::string name;                                  // "causal_gqa"
  std::vector<std::pair<std::string, Dims>> inputs;  // in the order of the signature
  std::string options;                               // "causal=1,window=8"; parsed by Spec
  /// Inputs that keep a type of their own; float32 ones are float64 in a float64 case.
  std::map<std::string, DType> types = {};
  /// The cascade that defines this case, for options that the record's first one leaves out.
  std::string definition = {};
  /// Where inputs of one shape are filled in several ways: "all heads open".
  std::string data = {};
};

struct CascadeText {
  std::string name;  // "softmax", "flash"
  std::string text;
  /// "kind=relu": it only speaks of cases with this option; empty: of all.
  std::string when = {};
};

/// A layer of a language model, for attention that differs from layer to layer.
struct ModelLayer {
  int64_t layer = 0, layers = 1;  // layer < layers
  int64_t heads = 1, kv_heads = 1, head_dim = 1;
  int64_t context = 1;  // tokens that the model was trained for
};

/// Causal attention of one layer of a language model: what `--attention` puts into it. q, out
/// [1,H,rows,D] belong to the tokens that are new. Exactly one of the two calls is there.
struct ModelAttention {
  /// k, v [1,Hkv,Lk,D] of all tokens so far, the new ones last: the model keeps a cache.
  std::function<void(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                     const RunOptions& run)>
      over_cache = {};
  /// k, v [1,Hkv,rows,D] of the new tokens only; what came before is in the state, which the call
  /// brings up to date: the model keeps nothing else.
  std::function<void(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                     std::span<const Tensor> state, const RunOptions& run)>
      over_state = {};
  /// Shapes of the float32 arrays of the state, which are zero before the first token.
  std::vector<Dims> state_shapes = {};
  /// A first call with all tokens of a prompt is another function than calls with parts of them.
  bool whole_prompt = false;
};

/// Gradients by input name, from those of the results.
using BackwardCall = std::function<NamedArrays(const NamedTensors& out_gradients)>;

struct Mechanism {
  std::string name;  // "flash_attention"; the same in C++ and PyTorch
  std::string title;
  std::vector<int> sheets;
  std::vector<std::string> arxiv;
  std::string engine;                          // "tiled" or "chunked" or "none"
  bool any_head_dim = false;                   // or those up to kMaxHeadDim
  std::string pass_rank;                       // the rank whose passes are counted, usually "m"
  std::string card;                            // Markdown, one page
  std::vector<CascadeText> cascades;           // the definition first, then the fast form
  std::map<std::string, std::string> outputs;  // result name -> cascade output, "out" -> "O"
  std::vector<std::string> without_gradient;   // results that the backward takes no gradient of
  std::vector<ExampleCase> cases;              // small: correctness, every option, odd sizes
  std::vector<ExampleCase> bench_cases;        // large: `heed bench`

  std::function<NamedArrays(const NamedTensors& in, const Spec& options, const RunOptions& run)>
      forward;
  /// Gradients by input name; empty where the mechanism is forward only. A record whose backward needs
  /// what the forward computed gives `forward_for_backward` instead, and this follows from it.
  std::function<NamedArrays(const NamedTensors& in, const NamedTensors& out_gradients,
                            const Spec& options, const RunOptions& run)>
      backward;
  /// Runs the forward and returns the backward alone. The inputs outlive the call returned.
  std::function<BackwardCall(const NamedTensors& in, const Spec& options, const RunOptions& run)>
      forward_for_backward;
  /// Everything the cascades need for this case: tensors in float64, sizes, scalars, predicates.
  std::function<cascade::Bindings(const NamedTensors& in, const Spec& options)> bind;
  /// Sizes of ranks where a call need not do all that the cascade says (closed gates, an absent layer):
  /// how much of them counts. Empty: all do.
  std::function<std::map<std::string, int64_t>(const NamedTensors& in)> needed_sizes;
  /// Empty where the mechanism cannot stand in for causal attention of a model.
  std::function<ModelAttention(const Spec& options, const ModelLayer& at)> model_attention;
  /// Paths in order of preference; the first that can run is chosen.
  std::function<std::vector<PathAnswer>(const NamedTensors& in, const Spec& options,
                                        const RunOptions& run)>
      explain;
  /// Inputs that are not standard normal, filled from a seed (lengths, permutations, ...). Called
  /// for every input after its default (standard normal; zeros for integers) has been written.
  std::function<void(const ExampleCase& example, const std::string& input, uint64_t seed,
                     const Tensor& to_fill)>
      fill;
  /// A small call of random shapes and options; empty: one of `cases`.
  std::function<ExampleCase(uint64_t seed)> random_case;
  /// A call like a bench case, small enough for float64; empty: the same with fewer tokens.
  std::function<ExampleCase(const ExampleCase& example)> shrink;
};

/// The cascade that defines a case: the one it names, else the one that its options need, else the first.
const CascadeText& definition_of(const Mechanism& mechanism, const ExampleCase& example);

/// Whether a cascade is there for cases that name it as their definition, with options that the record's
/// first one leaves out.
bool defines_further_options(const Mechanism& mechanism, const CascadeText& text);

/// Passes over the record's pass rank; none where the cascade is written without that rank.
std::optional<cascade::PassReport> passes_of(const Mechanism& mechanism, const CascadeText& text);

/// random_case(seed) under the name "random:<seed>", which find_case understands.
ExampleCase random_case(const Mechanism& mechanism, uint64_t seed);
/// One of the mechanism's cases, or a random one, by name; throws Error listing the names.
ExampleCase find_case(const Mechanism& mechanism, const std::string& name);

std::span<const Mechanism> mechanisms();
/// "flash": its name without "_attention".
std::string_view brief_name(const Mechanism& mechanism);
/// By full or brief name; throws Error listing the names otherwise.
const Mechanism& find_mechanism(std::string_view name);

/// The cascades that speak of a call with these options: its definition, then its fast forms. Throws
/// Error where there is none.
std::vector<const CascadeText*> cascades_for(const Mechanism& mechanism, const Spec& options);

/// Inputs of a case from a seed: floating inputs are standard normal rounded to `dtype`.
NamedArrays make_inputs(const Mechanism& mechanism, const ExampleCase& example, DType dtype,
                        uint64_t seed);
NamedTensors views(const NamedArrays& arrays);
/// An input that not every call has.
Tensor input_or_none(const NamedTensors& in, const std::string& name);

/// The backward of a call, after the forward where it needs one.
BackwardCall prepare_backward(const Mechanism& mechanism, const NamedTensors& in,
                              const Spec& options, const RunOptions& run);

/// Float64 row-major copy for the interpreter.
cascade::NdArray to_nd(const Tensor& tensor);

}  // namespace heed
