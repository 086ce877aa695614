// Attention over all pairs of queries and keys whose weights PyTorch has no operator for.
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/softmax.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "libtorch/peer_parts.h"

namespace heed::peers {
namespace {

using at::Tensor;

constexpr double kNothing = -std::numeric_limits<double>::infinity();

/// Where a causal query sees no key, [Lq, Lk], aligned to the end of the keys; none where all are seen.
std::optional<Tensor> hidden(const Tensors& in, bool causal) {
  if (!causal) return std::nullopt;
  const int64_t queries = in.at("q").size(2), keys = in.at("k").size(2);
  return at::ones({queries, keys}, at::kBool).triu(keys - queries + 1);
}

Tensor masked(const Tensor& x, const std::optional<Tensor>& hidden, double value) {
  return hidden ? x.masked_fill(*hidden, value) : x;
}

Tensor scores(const Tensors& t, double scale) {
  const Tensor& q = t.at("q");
  return at::matmul(q, for_heads(t.at("k"), q.size(1)).transpose(-1, -2)).mul_(scale);
}

Composition relative(const Tensors& in, const Spec& options) {
  const double scale = scale_of(in, options);
  const std::optional<Tensor> unseen = hidden(in, options.flag("causal"));
  return {"softmax of products of all pairs, tables shifted", [=](const Tensors& t) {
            const Tensor &q = t.at("q"), &k = t.at("k");
            const auto type = q.scalar_type();
            const int64_t heads = q.size(1), queries = q.size(2), keys = k.size(2);
            // From the first key to the last query on; a causal table may end with distance 0.
            const int64_t rows = t.at("rel_key").size(0), first = rows / 2 - (keys - 1);
            const int64_t there = std::min(queries + keys - 1, rows - first);
            const auto table = [&](const char* name) {
              return t.at(name).to(type).narrow(0, first, there).transpose(0, 1);
            };
            const Tensor by_distance = at::constant_pad_nd(
                at::matmul(q, table("rel_key").transpose(-1, -2)) + table("rel_bias").unsqueeze(1),
                {0, queries + keys - 1 - there});
            const Tensor content = q + t.at("content_bias").to(type).unsqueeze(1);
            const Tensor s = at::matmul(content, for_heads(k, heads).transpose(-1, -2))
                                 .add_(by_key(by_distance, keys))
                                 .mul_(scale);
            return at::matmul(at::softmax(masked(s, unseen, kNothing), -1),
                              for_heads(t.at("v"), heads));
          }};
}

/// sum over n <= order of x^n / n!
Tensor taylor(const Tensor& x, int64_t order) {
  Tensor sum = at::ones_like(x);
  for (int64_t n = order; n >= 1; --n) sum = sum * x / static_cast<double>(n) + 1;
  return sum;
}

Composition recurrent_softmax(const Tensors& in, const Spec& options) {
  const double scale = scale_of(in, options), eps = options.number("eps").value_or(1e-6);
  const bool causal = options.flag("causal", true);
  const std::string normalizer = options.text("normalizer").value_or("softmax");
  const auto order = options.integer("order");
  const auto clamp = options.number("score_clamp");
  const std::optional<Tensor> unseen = hidden(in, causal);
  return {"products of all pairs", [=](const Tensors& t) {
            const Tensor& q = t.at("q");
            Tensor s = scores(t, scale);
            if (clamp) s = s.clamp_max(*clamp);
            const bool shifted = normalizer == "softmax" && !order;
            if (shifted) s = at::softmax(masked(s, unseen, kNothing), -1);
            const Tensor w = shifted ? s : masked(order ? taylor(s, *order) : s.exp(), unseen, 0);
            const Tensor num = at::matmul(w, for_heads(t.at("v"), q.size(1)));
            Tensor out = num;
            if (normalizer == "softmax" && !shifted) out = num / w.sum(-1, true);
            if (normalizer == "l2") out = num / num.norm(2, -1, true).clamp_min(1e-12);
            if (normalizer == "rms") out = num * ((num * num).mean(-1, true) + eps).rsqrt();
            if (normalizer == "layer") {
              const Tensor centred = num - num.mean(-1, true);
              out = centred * ((centred * centred).mean(-1, true) + eps).rsqrt();
            }
            if (normalizer == "divide_by_count") {
              const int64_t queries = q.size(2), keys = t.at("k").size(2);
              const Tensor count = at::arange(keys - queries + 1, keys + 1, num.options());
              out = num / (causal ? count.view({-1, 1}) : at::ones({1}, num.options()) * keys);
            }
            if (normalizer == "clamped") out = num / w.sum(-1, true).clamp_min(1);
            const auto gate = t.find("gate");
            return gate == t.end() ? out : out * gate->second.to(out.scalar_type()).unsqueeze(-1);
          }};
}

Composition taylor_state(const Tensors& in, const Spec& options) {
  const double scale = scale_of(in, options);
  const int64_t order = options.integer("order").value_or(2);
  const int64_t tokens = in.at("q").size(2), dim = in.at("q").size(3),
                features = 1 + dim + dim * dim;
  const auto divided = [](const Tensor& both) {
    const int64_t width = both.size(3) - 1;
    return both.narrow(3, 0, width) / both.narrow(3, width, 1);
  };
  if (order == 2 && tokens == in.at("k").size(2) && tokens > 2 * features) {
    return {
        "chunks of products of features", [=](const Tensors& t) {
          // Both sides take the root; the sign stays with the queries.
          const double root = std::sqrt(std::abs(scale));
          const Tensor q = scale < 0 ? -t.at("q") : t.at("q");
          return divided(causal_sums(taylor_features(q * root), taylor_features(t.at("k") * root),
                                     with_ones(t.at("v")), {}));
        }};
  }
  const std::optional<Tensor> unseen = hidden(in, true);
  return {"products of all pairs", [=](const Tensors& t) {
            const Tensor w = masked(taylor(scores(t, scale), order), unseen, 0);
            return divided(at::matmul(w, for_heads(with_ones(t.at("v")), t.at("q").size(1))));
          }};
}

Composition distillation(const Tensors& in, const Spec& options) {
  const double scale = scale_of(in, options);
  const std::optional<Tensor> unseen = hidden(in, options.flag("causal"));
  return {"weights of all pairs", [=](const Tensors& t) {
            const Tensor teacher = at::softmax(
                masked(scores({{"q", t.at("q").detach()}, {"k", t.at("k").detach()}}, scale),
                       unseen, kNothing),
                -1);
            const Tensor products =
                masked(scores({{"q", t.at("feature_q")}, {"k", t.at("feature_k")}}, 1), unseen, 0);
            const Tensor student = products / products.sum(-1, true);
            return -(teacher * student.clamp_min(1e-12).log()).sum(-1).mean();
          }};
}

}  // namespace

Tensor by_key(const Tensor& by_distance, int64_t keys) {
  const int64_t queries = by_distance.size(-2), distances = by_distance.size(-1);
  if (queries == 1) return by_distance;
  // Each row begins one element before the last one: rows of one element less.
  return by_distance.flatten(-2)
      .narrow(-1, queries - 1, queries * (distances - 1))
      .unflatten(-1, {queries, distances - 1})
      .narrow(-1, 0, keys);
}

std::optional<Composition> pairs_family(std::string_view mechanism, const Tensors& in,
                                        const Spec& options) {
  const std::vector<std::string> tables = {"q", "k", "v", "rel_key", "rel_bias", "content_bias"};
  if (mechanism == "relative_attention" && knows(in, tables, options, {"causal", "scale"})) {
    return relative(in, options);
  }
  if (mechanism == "recurrent_softmax_attention" &&
      knows(in, {"q", "k", "v", "gate"}, options,
            {"normalizer", "order", "causal", "scale", "score_clamp", "eps"})) {
    return recurrent_softmax(in, options);
  }
  if (mechanism == "taylor_state_attention" &&
      knows(in, {"q", "k", "v"}, options, {"order", "scale"})) {
    return taylor_state(in, options);
  }
  if (mechanism == "attention_distillation_loss" &&
      knows(in, {"q", "k", "feature_q", "feature_k"}, options, {"causal", "scale"})) {
    return distillation(in, options);
  }
  return std::nullopt;
}

}  // namespace heed::peers
