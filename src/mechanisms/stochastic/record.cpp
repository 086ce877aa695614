#include <cmath>
#include <memory>

#include "engine/tiled/problem.h"
#include "heed/stochastic_attention.h"
#include "mechanisms/attention_case.h"
#include "mechanisms/embedded.h"
#include "mechanisms/stochastic/slot_order.h"

namespace heed {

namespace {

StochasticOptions options_of(const Spec& spec, const std::vector<std::string>& more = {}) {
  std::vector<std::string> known = {"window", "causal", "scale"};
  known.insert(known.end(), more.begin(), more.end());
  spec.require_known(known);
  StochasticOptions options;
  options.window = spec.integer("window").value_or(256);
  options.causal = spec.flag("causal", true);
  options.scale = spec.number("scale");
  return options;
}

/// The permutation as [B,H,L] numbers, and its inverse.
struct Orders {
  Orders(const Tensor& permutation, int64_t batch, int64_t heads, int64_t length)
      : heads_(heads), length_(length) {
    // For its errors alone: the definition does not share what the kernel makes of a permutation.
    const SlotOrder checked("stochastic_attention", permutation, batch, heads, length);
    const std::vector<double> given = to_nd(permutation).values;
    slots_.resize(static_cast<size_t>(batch * heads * length));
    tokens_.resize(slots_.size());
    for (size_t n = 0; n < slots_.size(); ++n) {
      slots_[n] = static_cast<int64_t>(given[n % given.size()]);
      const auto at = static_cast<int64_t>(n);
      tokens_[static_cast<size_t>(at / length * length + slots_[n])] = at % length;
    }
  }
  int64_t slot(int64_t b, int64_t h, int64_t token) const { return slots_[index(b, h, token)]; }
  /// -1 outside the sequence.
  int64_t token(int64_t b, int64_t h, int64_t slot) const {
    return slot < 0 || slot >= length_ ? -1 : tokens_[index(b, h, slot)];
  }

 private:
  size_t index(int64_t b, int64_t h, int64_t i) const {
    return static_cast<size_t>((b * heads_ + h) * length_ + i);
  }
  int64_t heads_, length_;
  std::vector<int64_t> slots_, tokens_;
};

cascade::Bindings bind(const NamedTensors& in, const Spec& spec) {
  const StochasticOptions options = options_of(spec);
  const Tensor& q = in.at("q");
  NamedTensors attention = {{"q", q}, {"k", in.at("k")}, {"v", in.at("v")}};
  cascade::Bindings bindings = bind_attention(attention, Spec::parse_options(""));
  if (options.scale) bindings.scalars["scale"] = *options.scale;
  const Orders orders(in.at("permutation"), q.size(0), q.size(1), q.size(2));
  const int64_t reach = options.window / 2;
  const bool causal = options.causal;
  bindings.sizes["R"] = reach;
  bindings.sizes["t"] = 2 * reach + 1;
  bindings.indices["token"] = [orders](std::span<const int64_t> i) {
    return orders.token(i[0], i[1], i[2]);
  };
  bindings.indices["slot"] = [orders](std::span<const int64_t> i) {
    return orders.slot(i[0], i[1], i[2]);
  };
  bindings.predicates["before"] = [orders, reach, causal](std::span<const int64_t> i) {
    const int64_t key = orders.token(i[0], i[1], i[2] + i[3] - reach);
    return key >= 0 && (!causal || key <= orders.token(i[0], i[1], i[2]));
  };
  bindings.predicates["near"] = [orders, reach, causal](std::span<const int64_t> i) {
    const int64_t apart = orders.slot(i[0], i[1], i[2]) - orders.slot(i[0], i[1], i[3]);
    return std::abs(apart) <= reach && (!causal || i[3] <= i[2]);
  };
  return bindings;
}

/// `permutation` has as many axes: 1 [L], 2 [H,L], 3 [B,H,L].
ExampleCase stochastic_case(std::string name, const AttentionShape& s, int axes,
                            std::string options) {
  ExampleCase example = attention_case(std::move(name), s, std::move(options));
  const Dims all{s.batch, s.heads, s.queries};
  example.inputs.emplace_back("permutation", Dims(all.span().last(static_cast<size_t>(axes))));
  example.types["permutation"] = DType::i64;
  return example;
}

void fill(const ExampleCase& /*example*/, const std::string& input, uint64_t seed,
          const Tensor& to_fill) {
  if (input != "permutation") return;
  const Array random = random_permutation(seed, to_fill.shape());
  std::copy_n(random.as<int64_t>(), random.count(), to_fill.as<int64_t>());
}

ExampleCase random_stochastic_case(uint64_t seed) {
  CaseRandom random(seed);
  AttentionShape s;
  s.batch = random.between(1, 2);
  s.kv_heads = random.between(1, 3);
  s.heads = s.kv_heads * random.between(1, 3);
  s.queries = s.keys = random.chance(0.2) ? random.between(1, 12) : random.between(1, 150);
  s.dim = random.between(1, 40);
  s.value_dim = random.between(1, 40);
  std::string options = "window=" + std::to_string(random.between(1, 2 * s.queries + 3));
  if (random.chance(0.4)) options += ",causal=0";
  if (random.chance(0.3)) options += ",scale=" + std::to_string(random.number(-0.6, 0.6));
  return stochastic_case("", s, static_cast<int>(random.between(1, 3)), options);
}

/// Whole prompts through the layer's own random slots, tokens that follow densely.
ModelAttention stochastic_in_model(const Spec& spec, const ModelLayer& at) {
  StochasticOptions options = options_of(spec, {"seed"});
  options.causal = true;
  const auto seed = static_cast<uint64_t>(spec.integer("seed").value_or(0));
  // Neighbouring seeds share no numbers, and neither do their layers.
  const uint64_t of_layer = seed + 0x9E3779B97F4A7C15 * static_cast<uint64_t>(at.layer + 1);
  ModelAttention attention;
  attention.whole_prompt = true;
  attention.over_cache = [options, of_layer](const Tensor& q, const Tensor& k, const Tensor& v,
                                             const Tensor& out, const RunOptions& run) {
    if (q.size(2) == k.size(2)) {
      const Array permutation = random_permutation(of_layer, {q.size(2)});
      stochastic_attention(q, k, v, permutation, out, {}, options, run);
      return;
    }
    Masks causal;
    causal.causal = true;
    constexpr const char* kOp = "stochastic_attention";
    tiled::Problem problem;
    problem.sequences = tiled::batch_sequences(
        q, k, v, out, {},
        tiled::TilePlan::from_masks(kOp, causal, q.size(0), q.size(2), k.size(2)));
    problem.scale = tiled::resolve_scale(kOp, options.scale, q.size(3));
    tiled::forward(problem, run);
  };
  return attention;
}

Mechanism record() {
  Mechanism m;
  m.name = "stochastic_attention";
  m.title = "Sliding-window attention in the order of random slots";
  m.sheets = {15};
  m.arxiv = {"2604.00754"};
  m.engine = "tiled";
  m.pass_rank = "t";
  m.card = embedded("stochastic/card.md");
  for (const char* name : {"stochastic", "masked"}) {
    m.cascades.push_back(
        {name, std::string(embedded(std::string("stochastic/") + name + ".cascade"))});
  }
  m.outputs = {{"out", "O"}, {"lse", "LSE"}};
  m.cases = {stochastic_case("one_token", {1, 1, 1, 1, 1, 1, 1}, 1, "window=1"),
             stochastic_case("window", {2, 3, 3, 37, 37, 7, 5}, 1, "window=9"),
             stochastic_case("bidirectional", {1, 2, 2, 70, 70, 16, 16}, 1, "window=12,causal=0"),
             stochastic_case("per_head", {2, 4, 4, 45, 45, 12, 12}, 2, "window=11"),
             stochastic_case("per_head_grouped", {1, 6, 2, 33, 33, 20, 24}, 2, "window=16"),
             stochastic_case("per_batch_grouped", {3, 4, 1, 26, 26, 8, 8}, 3, "window=7"),
             stochastic_case("grouped", {2, 6, 2, 52, 52, 9, 9}, 1, "window=20,causal=0"),
             stochastic_case("whole_sequence", {1, 2, 2, 40, 40, 8, 8}, 2, "window=500"),
             stochastic_case("own_token_alone", {1, 2, 1, 30, 30, 8, 8}, 1, "window=1"),
             stochastic_case("several_tiles", {1, 1, 1, 530, 530, 24, 24}, 1, "window=150"),
             stochastic_case("few_rows", {2, 2, 2, 7, 7, 16, 16}, 3, "window=4"),
             stochastic_case("head_dim_256", {1, 1, 1, 26, 26, 256, 256}, 1, "window=9"),
             stochastic_case("scale", {1, 2, 2, 30, 30, 8, 8}, 1, "window=10,scale=-0.7")};
  for (const char* options : {"window=256,causal=0", "window=256"}) {
    m.bench_cases.push_back(
        stochastic_case(std::string("n16384_") + (m.bench_cases.empty() ? "both" : "causal"),
                        {1, 4, 4, 16384, 16384, 64, 64}, 1, options));
  }
  m.forward = [](const NamedTensors& in, const Spec& spec, const RunOptions& run) {
    AttentionResult result = stochastic_attention(in.at("q"), in.at("k"), in.at("v"),
                                                  in.at("permutation"), options_of(spec), run);
    return named_arrays({"out", "lse"}, std::move(result.out), std::move(result.lse));
  };
  m.forward_for_backward = [](const NamedTensors& in, const Spec& spec,
                              const RunOptions& run) -> BackwardCall {
    const StochasticOptions options = options_of(spec);
    const Tensor q = in.at("q"), k = in.at("k"), v = in.at("v"), permutation = in.at("permutation");
    const auto result = std::make_shared<const AttentionResult>(
        stochastic_attention(q, k, v, permutation, options, run));
    return [=](const NamedTensors& out_gradients) {
      StochasticGradients gradients =
          stochastic_attention_backward(out_gradients.at("out"), out_gradients.at("lse"), q, k, v,
                                        permutation, result->out, result->lse, options, run);
      return named_arrays({"q", "k", "v"}, std::move(gradients.q), std::move(gradients.k),
                          std::move(gradients.v));
    };
  };
  m.bind = bind;
  m.explain = explain_attention;
  m.fill = fill;
  m.random_case = random_stochastic_case;
  m.shrink = [](const ExampleCase& example) {
    const Dims &q = example.inputs[0].second, &v = example.inputs[2].second;
    return stochastic_case(example.name, {1, 1, 1, 300, 300, q[3], v[3]}, 1, example.options);
  };
  m.model_attention = stochastic_in_model;
  return m;
}

}  // namespace

std::vector<Mechanism> stochastic_records() { return {record()}; }

}  // namespace heed
