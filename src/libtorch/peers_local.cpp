// Attention over neighbours: a slice of keys for a run of queries at a time, with a mask for what the
// slice holds beyond their windows. That does a fraction of the work of all pairs and, unlike gathering
// a window for each query, copies no key.
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <ATen/ops/zeros.h>

#include <limits>

#include "engine/tiled/neighborhood.h"
#include "libtorch/peer_parts.h"
#include "mechanisms/neighborhood/options.h"

namespace heed::peers {
namespace {

using at::Tensor;
using tiled::Interval;

constexpr int64_t kRunTokens = 256;  // queries of a run, about

struct Slice {
  Interval queries, keys;
  Tensor mask;  // additive, broadcastable to [B,H,queries,keys]
};

/// 0 where `seen` is true, -inf elsewhere: what PyTorch would make of it at every call.
Tensor additive(const Tensor& seen, at::ScalarType type) {
  return at::zeros(seen.sizes(), type)
      .masked_fill_(~seen, -std::numeric_limits<double>::infinity());
}

/// q, k, v [B,H,L,D].
Tensor attend(const std::vector<Slice>& slices, const Tensor& q, const Tensor& k, const Tensor& v,
              std::optional<double> scale) {
  std::vector<Tensor> parts;
  for (const Slice& s : slices) {
    const auto of = [](const Tensor& t, Interval i) {
      return t.narrow(2, i.begin, i.end - i.begin);
    };
    parts.push_back(at::scaled_dot_product_attention(of(q, s.queries), of(k, s.keys), of(v, s.keys),
                                                     s.mask, 0.0, false, scale,
                                                     q.size(1) != k.size(1)));
  }
  return at::cat(parts, 2);
}

// --- grids -----------------------------------------------------------------------------------------

/// [L,L], true where a query of the axis sees a key.
Tensor seen_on(const tiled::NeighborhoodAxis& axis) {
  Tensor seen = at::zeros({axis.length, axis.length}, at::kBool);
  auto* const data = seen.mutable_data_ptr<bool>();
  for (int64_t residue = 0; residue < axis.dilation; ++residue) {
    const tiled::WindowLine line(axis, residue);
    for (int64_t i = 0; i < line.length(); ++i) {
      const Interval window = line.keys_of(i);
      for (int64_t j = window.begin; j < window.end; ++j) {
        data[(i * axis.dilation + residue) * axis.length + j * axis.dilation + residue] = true;
      }
    }
  }
  return seen;
}

/// Of [A,A'] and [B,B'] the pairs [A B, A' B'] that both allow.
Tensor both(const Tensor& a, const Tensor& b) {
  const Tensor wide = a.view({a.size(0), 1, a.size(1), 1}) & b.view({1, b.size(0), 1, b.size(1)});
  return wide.reshape({a.size(0) * b.size(0), a.size(1) * b.size(1)});
}

std::vector<Slice> grid_slices(const std::vector<tiled::NeighborhoodAxis>& axes,
                               at::ScalarType type) {
  Tensor within = at::ones({1, 1}, at::kBool);  // what the other axes allow
  for (size_t a = 1; a < axes.size(); ++a) within = both(within, seen_on(axes[a]));
  const int64_t plane = within.size(0);  // tokens of one step along the first axis
  const int64_t run = std::max<int64_t>(1, kRunTokens / plane), length = axes[0].length;
  const Tensor first = seen_on(axes[0]);
  std::vector<Slice> slices;
  for (int64_t begin = 0; begin < length; begin += run) {
    const Interval rows{begin, std::min(begin + run, length)};
    const Tensor seen = first.narrow(0, rows.begin, rows.end - rows.begin);
    const Tensor used = seen.any(0).nonzero();
    const Interval keys{used.min().item<int64_t>(), used.max().item<int64_t>() + 1};
    const Tensor mask = both(seen.narrow(1, keys.begin, keys.end - keys.begin), within);
    slices.push_back({{rows.begin * plane, rows.end * plane},
                      {keys.begin * plane, keys.end * plane},
                      additive(mask, type)});
  }
  return slices;
}

Composition neighborhood(const Tensors& in, const Spec& options) {
  const Tensor& query = in.at("query");
  const auto lengths =
      query.sizes().slice(1, static_cast<size_t>(query.dim()) - 3);  // [B,*grid,H,D]
  const auto axes = na::axes_of(options, {lengths.data(), lengths.size()});
  const auto slices = grid_slices(axes, query.scalar_type());
  const auto scale = options.number("scale");
  const auto rank = static_cast<int64_t>(axes.size());
  return {"scaled_dot_product_attention on slices of keys", [=](const Tensors& t) {
            const auto rows = [&](const char* name) {  // [B,*grid,H,D] as [B,H,L,D]
              return t.at(name).flatten(1, rank).transpose(1, 2);
            };
            const Tensor out = attend(slices, rows("query"), rows("key"), rows("value"), scale);
            std::vector<int64_t> shape = t.at("query").sizes().vec();
            shape.back() = t.at("value").size(-1);
            return out.transpose(1, 2).reshape(shape);
          }};
}

// --- random slots ----------------------------------------------------------------------------------

/// Rows of x [B,H,L,D] in an order [L] or [B or 1,H or 1,L].
Tensor in_order(const Tensor& x, const Tensor& order) {
  if (order.dim() == 1) return x.index_select(2, order);
  return x.gather(2, order.unsqueeze(-1).expand({x.size(0), x.size(1), order.size(2), x.size(3)}));
}

Composition stochastic(const Tensors& in, const Spec& options) {
  Tensor slots = in.at("permutation").to(at::kLong);
  while (slots.dim() == 2) slots = slots.unsqueeze(0);
  const Tensor tokens = slots.argsort(int64_t{-1});
  const int64_t length = slots.size(-1), reach = options.integer("window").value_or(256) / 2;
  const bool causal = options.flag("causal", true);
  std::vector<Slice> slices;
  for (int64_t begin = 0; begin < length; begin += kRunTokens) {
    const Interval rows{begin, std::min(begin + kRunTokens, length)};
    const Interval keys{std::max<int64_t>(0, rows.begin - reach),
                        std::min(rows.end + reach, length)};
    const Tensor distance =
        at::arange(rows.begin, rows.end).view({-1, 1}) - at::arange(keys.begin, keys.end);
    Tensor seen = distance.abs() <= reach;
    if (causal) {
      const auto of = [&](Interval i) { return tokens.narrow(-1, i.begin, i.end - i.begin); };
      seen = seen & (of(keys).unsqueeze(-2) <= of(rows).unsqueeze(-1));
    }
    slices.push_back({rows, keys, additive(seen, in.at("q").scalar_type())});
  }
  const auto scale = options.number("scale");
  return {"index_select and scaled_dot_product_attention on slices of keys", [=](const Tensors& t) {
            const int64_t heads = t.at("q").size(1);
            // Heads of one key head may have slots of their own.
            const auto sorted = [&](const Tensor& x) { return in_order(x, tokens); };
            const Tensor out =
                attend(slices, sorted(t.at("q")), sorted(for_heads(t.at("k"), heads)),
                       sorted(for_heads(t.at("v"), heads)), scale);
            return in_order(out, slots);
          }};
}

}  // namespace

std::optional<Composition> local_family(std::string_view mechanism, const Tensors& in,
                                        const Spec& options) {
  if ((mechanism == "na1d" || mechanism == "na2d" || mechanism == "na3d") &&
      knows(in, {"query", "key", "value"}, options,
            {"kernel_size", "stride", "dilation", "is_causal", "scale"})) {
    return neighborhood(in, options);
  }
  if (mechanism == "stochastic_attention" &&
      knows(in, {"q", "k", "v", "permutation"}, options, {"window", "causal", "scale"})) {
    return stochastic(in, options);
  }
  return std::nullopt;
}

}  // namespace heed::peers
