#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "base/parallel.h"
#include "base/round_up.h"
#include "engine/candidates.h"
#include "engine/operands.h"
#include "heed/attention_distillation_loss.h"
#include "kernels/cross_entropy_rows.h"
#include "kernels/matrix.h"
#include "kernels/tile.h"
#include "mechanisms/distillation/path.h"
#include "mechanisms/parameter.h"
#include "mechanisms/results.h"
#include "mechanisms/row_blocks.h"

namespace heed {

namespace {

using kernels::Block;
using kernels::EntropyFactors;
using kernels::EntropyRow;
using kernels::Rows;
using kernels::TileKernels;

constexpr const char* kOp = "attention_distillation_loss";
constexpr double kFloor = 1e-12;  // of the student's weights

struct Call {
  Tensor q, k, fq, fk;
  int64_t batch, heads, queries, keys, dim, features;
  bool causal;
  double scale;

  int64_t offset() const { return keys - queries; }  // query p sees keys up to p + offset
  int64_t visible_keys(int64_t query) const {
    return causal ? std::clamp<int64_t>(query + offset() + 1, 0, keys) : keys;
  }
  int64_t rows() const { return batch * heads * queries; }
};

Rows slice_of(Rows rows, int64_t begin, int64_t count) {
  rows.data = static_cast<const std::byte*>(rows.data) +
              begin * rows.stride * static_cast<int64_t>(size_of(rows.dtype));
  rows.count = count;
  return rows;
}

/// Products of a tile of rows with other rows, which are packed in pieces. Weights are T, their padding
/// columns zero.
template <class T>
class RowProducts {
 public:
  RowProducts(const TileKernels<T>& kernels, int64_t tile_rows, int64_t width,
              int64_t weight_stride)
      : kernels_(kernels),
        piece_keys_(std::clamp<int64_t>((1 << 16) / width / 64 * 64, 64, 256)),
        rows_(bytes(std::max(kernels.query_bytes(tile_rows, width),
                             kernels.column_bytes(tile_rows, width)))),
        piece_(bytes(std::max(kernels.key_bytes(piece_keys_, width),
                              kernels.value_bytes(piece_keys_, width)))) {
    if (kernels.half_operands) {
      rounded_ = Array(DType::bf16, {round_up(tile_rows, 2) * weight_stride});
    }
  }

  /// out[r][m] = a[r] . b[m]
  void scores(const Rows& a, const Rows& b, Block<T> out) {
    kernels_.pack_queries(a, false, rows_.as<void>());
    for_pieces(b, [&](const Rows& piece, int64_t m) {
      kernels_.pack_keys(piece, piece_.as<void>());
      kernels_.scores(rows_.as<void>(), a.count, piece_.as<void>(), piece.count, a.width, nullptr,
                      {out.data + m, out.stride}, nullptr);
    });
  }

  /// out[r] += sum_m weights[r][m] b[m]
  void add_weighted(Block<T> weights, int64_t rows, const Rows& b, Block<T> out) {
    const std::byte* operand = reinterpret_cast<const std::byte*>(weights.data);
    int64_t element = sizeof(T);
    if (kernels_.half_operands) {
      kernels_.round_weights({weights.data, weights.stride}, rows, b.count, rounded_.as<void>(),
                             weights.stride);
      operand = rounded_.as<std::byte>();
      element = sizeof(bfloat16);
    }
    for_pieces(b, [&](const Rows& piece, int64_t m) {
      kernels_.pack_values(piece, piece_.as<void>());
      kernels_.accumulate(operand + m * element, weights.stride, rows, piece_.as<void>(),
                          piece.count, piece.width, nullptr, nullptr, out, nullptr);
    });
  }

  /// out[f][m] += sum_r weights[r][m] a[r][f], m < columns; of a no more rows than a tile has
  void add_columns(Block<T> weights, int64_t columns, const Rows& a, Block<T> out) {
    const void* operand = weights.data;
    if (kernels_.half_operands) {
      kernels_.pair_weights({weights.data, weights.stride}, a.count, columns, rounded_.as<void>(),
                            weights.stride);
      operand = rounded_.as<void>();
    }
    kernels_.pack_columns(a, false, rows_.as<void>());
    kernels_.accumulate_columns(rows_.as<void>(), a.count, a.width, operand, weights.stride,
                                columns, nullptr, out);
  }

 private:
  // Zeros, as padding rows take part in products.
  static Array bytes(int64_t count) { return Array::zeros(DType::f32, {ceil_div(count, 4)}); }

  template <class Body>
  void for_pieces(const Rows& rows, Body&& body) {
    for (int64_t m = 0; m < rows.count; m += piece_keys_) {
      body(slice_of(rows, m, std::min(piece_keys_, rows.count - m)), m);
    }
  }

  const TileKernels<T>& kernels_;
  int64_t piece_keys_;
  Array rows_, piece_, rounded_;
};

template <class T>
class Distillation {
 public:
  Distillation(const Call& call, const RunOptions& run)
      : call_(call),
        run_(run),
        products_(product_kernels(call, run)),
        entropy_(kernels::entropy_kernels<T>(chosen_isa(run))),
        add_(kernels::matrix_kernels<T>(chosen_isa(run)).add),
        strip_(std::min<int64_t>(2048, std::max(call.keys, call.queries))),
        tile_(tile_rows(strip_, call.features)),
        padded_tile_(round_up(tile_, products_.row_multiple)),
        strip_stride_(kernels::row_stride<T>(strip_, products_.key_multiple)),
        query_stride_(round_up(call.features, products_.dim_multiple)),
        key_stride_(kernels::row_stride<T>(call.keys, products_.key_multiple)),
        key_sums_(round_up(call.features, products_.column_multiple) * key_stride_) {}

  double loss() {
    std::vector<double> sums = no_sums();
    parallel(static_cast<int64_t>(sums.size()), [&](int64_t item, Tile& tile) {
      const int64_t head = item / query_tiles(), t = item % query_tiles();
      sums[static_cast<size_t>(item)] = weigh(rows_at(head, t), tile);
    });
    return loss_of(sums);
  }

  // Returns the loss too. An item is a part of the query tiles that read one head of feature_k: each tile's
  // gradients by its products serve its queries, and are added to those of the keys. The parts' are added
  // in order.
  double gradients(double grad_loss, const DistillationGradientViews& gradients) {
    std::vector<double> losses = no_sums();
    const T weight =
        static_cast<T>(grad_loss / static_cast<double>(std::max<int64_t>(1, call_.rows())));
    const int64_t heads = call_.batch * call_.fk.size(1);
    const int64_t tiles = group(call_.fk) * query_tiles(), parts = parts_of(heads, tiles);
    std::vector<T> kept(static_cast<size_t>(parts > 1 ? heads * parts * key_sums_ : 0));
    parallel(heads * parts, [&](int64_t item, Tile& tile) {
      const int64_t head = item / parts, part = item % parts;
      if (parts == 1) tile.key_sums.assign(static_cast<size_t>(key_sums_), T{0});
      const Block<T> sums{parts > 1 ? kept.data() + item * key_sums_ : tile.key_sums.data(),
                          key_stride_};
      const int64_t end = share_begin(tiles, part + 1, parts);
      for (int64_t t = share_begin(tiles, part, parts); t < end; ++t) {
        const int64_t query_head = head * group(call_.fk) + t / query_tiles();
        const RowBlock at = rows_at(query_head, t % query_tiles());
        losses[static_cast<size_t>(query_head * query_tiles() + t % query_tiles())] =
            weigh(at, tile);
        gradient(at, weight, tile, sums, gradients.feature_q);
      }
      if (parts == 1) store_keys(sums, gradients.feature_k, head, 0, call_.keys);
    });
    if (parts > 1) add_parts(heads, parts, kept, gradients.feature_k);
    return loss_of(losses);
  }

 private:
  // The sums of all query tiles.
  std::vector<double> no_sums() const {
    return std::vector<double>(static_cast<size_t>(call_.batch * call_.heads * query_tiles()));
  }
  double loss_of(const std::vector<double>& sums) const {
    const double total = std::accumulate(sums.begin(), sums.end(), 0.0);
    return call_.rows() == 0 ? 0 : -total / static_cast<double>(call_.rows());
  }

  // The gradient of feature_k from the parts of its heads.
  void add_parts(int64_t heads, int64_t parts, std::vector<T>& kept, const Tensor& to) {
    constexpr int64_t kKeys = 128;
    const int64_t blocks = ceil_div(call_.keys, kKeys);
    parallel_for(heads * blocks, threads_for(run_, heads * blocks), [&](int64_t item, int) {
      const int64_t head = item / blocks, first = item % blocks * kKeys;
      const int64_t keys = std::min(kKeys, call_.keys - first);
      const Block<T> sums{kept.data() + head * parts * key_sums_ + first, key_stride_};
      for (int64_t f = 0; f < call_.features; ++f) {
        for (int64_t part = 1; part < parts; ++part) {
          add_(sums.row(f), sums.row(f) + part * key_sums_, keys);
        }
      }
      store_keys(sums, to, head, first, keys);
    });
  }

  // Scratch of one thread: scores of the teacher, products of the student, factors of the rows, and, sized
  // by those who need them, sums of gradients.
  struct Tile {
    RowProducts<T> products;
    std::vector<T> scores, features, query_sums, key_sums;
    std::vector<EntropyFactors<T>> factors;
    Block<T> s, r;
    explicit Tile(const Distillation& owner)
        : products(owner.products_, owner.padded_tile_,
                   std::max(owner.call_.dim, owner.call_.features), owner.strip_stride_),
          scores(static_cast<size_t>(owner.padded_tile_ * owner.strip_stride_)),
          features(scores.size()),
          factors(static_cast<size_t>(owner.tile_)),
          s{scores.data(), owner.strip_stride_},
          r{features.data(), owner.strip_stride_} {}
  };

  // Many rows where strips are short: what they are multiplied with is packed once for all of them. Few
  // where their gradients are long, so that a tile of them stays small.
  static int64_t tile_rows(int64_t strip, int64_t features) {
    const int64_t most = std::clamp<int64_t>((1 << 17) / std::max<int64_t>(1, strip), 64, 128);
    return std::clamp<int64_t>((1 << 18) / std::max<int64_t>(1, features), 8, most);
  }

  // Parts of the query tiles of a head of feature_k: enough for many threads, as long as their sums stay
  // small. The shape decides alone, so threads do not change results.
  int64_t parts_of(int64_t heads, int64_t tiles) const {
    constexpr int64_t kItems = 64, kMostSums = 1 << 25;
    const int64_t sums = std::max<int64_t>(1, heads * key_sums_);
    const int64_t wanted = ceil_div(kItems, std::max<int64_t>(1, heads));
    return std::max<int64_t>(1, std::min({wanted, tiles, kMostSums / sums}));
  }

  int64_t query_tiles() const { return ceil_div(call_.queries, tile_); }
  RowBlock rows_at(int64_t head, int64_t tile) const {
    const int64_t begin = tile * tile_;
    return {head / call_.heads, head % call_.heads, begin, std::min(tile_, call_.queries - begin)};
  }

  // Runs body(item, tile) with one tile of scratch for every thread.
  template <class Body>
  void parallel(int64_t items, const Body& body) {
    std::vector<std::unique_ptr<Tile>> tiles;
    const auto make = [this] { return std::make_unique<Tile>(*this); };
    parallel_for_with(tiles, items, threads_for(run_, items), make, body);
  }

  // Heads of q that read one of t; 0 where q has none.
  int64_t group(const Tensor& t) const { return call_.heads / std::max<int64_t>(1, t.size(1)); }

  // Heads of t that rows of q read, as keys [first, first + count).
  Rows keys_of(const Tensor& t, const RowBlock& at, int64_t first, int64_t count) const {
    return rows_of(t, {at.batch, at.head / group(t), first, count});
  }

  // Calls body(first, last) for strips of keys that the rows see, with both products in the tile. Those of
  // an only strip are made where `fresh`, and are there still from the last time elsewhere.
  template <class Body>
  void for_strips(const RowBlock& at, Tile& tile, bool fresh, Body&& body) {
    const int64_t end = call_.visible_keys(at.begin + at.count - 1);
    for (int64_t first = 0; first < end; first += strip_) {
      const int64_t last = std::min(end, first + strip_);
      if (fresh || end > strip_) {
        tile.products.scores(rows_of(call_.q, at), keys_of(call_.k, at, first, last - first),
                             tile.s);
        tile.products.scores(rows_of(call_.fq, at), keys_of(call_.fk, at, first, last - first),
                             tile.r);
      }
      body(first, last);
    }
  }

  // The same for each row: body(row, keys of the strip that it sees).
  template <class Body>
  void for_rows(const RowBlock& at, Tile& tile, bool fresh, Body&& body) {
    for_strips(at, tile, fresh, [&](int64_t first, int64_t last) {
      for (int64_t row = 0; row < at.count; ++row) body(row, seen(at.begin + row, first, last));
    });
  }
  int64_t seen(int64_t query, int64_t first, int64_t last) const {
    return std::clamp<int64_t>(call_.visible_keys(query) - first, 0, last - first);
  }

  // Makes the factors of the rows; returns the sum of their P log A.
  double weigh(const RowBlock& at, Tile& tile) {
    constexpr T kNothing = -std::numeric_limits<T>::infinity();
    const T scale = static_cast<T>(call_.scale), floor = static_cast<T>(kFloor);
    std::vector<EntropyRow<T>> stats(static_cast<size_t>(at.count), {kNothing, 0, 0});
    for_rows(at, tile, true, [&](int64_t row, int64_t n) {
      entropy_.statistics(tile.s.row(row), tile.r.row(row), n, scale,
                          stats[static_cast<size_t>(row)]);
    });
    std::transform(stats.begin(), stats.end(), tile.factors.begin(), [](const EntropyRow<T>& row) {
      return EntropyFactors<T>{row.maximum == kNothing ? 0 : row.maximum,
                               row.sum == 0 ? 0 : 1 / row.sum,
                               row.total == 0 ? std::numeric_limits<T>::infinity() : row.total, 0};
    });
    double sum = 0;
    for_rows(at, tile, false, [&](int64_t row, int64_t n) {
      sum += static_cast<double>(entropy_.loss(tile.s.row(row), tile.r.row(row), n, scale, floor,
                                               tile.factors[static_cast<size_t>(row)]));
    });
    return sum;
  }

  // After weigh: the gradient of the rows' features, and their share of those of the keys.
  void gradient(const RowBlock& at, T weight, Tile& tile, Block<T> key_sums, const Tensor& to) {
    tile.query_sums.assign(static_cast<size_t>(padded_tile_ * query_stride_), T{0});
    const Block<T> sums{tile.query_sums.data(), query_stride_};
    for_strips(at, tile, false, [&](int64_t first, int64_t last) {
      for (int64_t row = 0; row < at.count; ++row) {
        const int64_t n = seen(at.begin + row, first, last);
        entropy_.gradient(tile.s.row(row), tile.r.row(row), n, static_cast<T>(call_.scale),
                          static_cast<T>(kFloor), weight, tile.factors[static_cast<size_t>(row)]);
        std::fill(tile.r.row(row) + n,
                  tile.r.row(row) + round_up(last - first, products_.key_multiple), T{0});
      }
      tile.products.add_weighted(tile.r, at.count, keys_of(call_.fk, at, first, last - first),
                                 sums);
      tile.products.add_columns(tile.r, last - first, rows_of(call_.fq, at),
                                {key_sums.data + first, key_sums.stride});
    });
    products_.finish(sums, at.count, call_.features, nullptr, to.at({at.batch, at.head, at.begin}),
                     to.dtype(), to.stride(2));
  }

  // Keys of one head of `to`, heads counted through all sequences.
  void store_keys(Block<T> sums, const Tensor& to, int64_t head, int64_t first, int64_t keys) {
    products_.finish_columns(sums, keys, call_.features, 1,
                             to.at({head / to.size(1), head % to.size(1), first}), to.dtype(),
                             to.stride(2), nullptr);
  }

  static const TileKernels<T>& product_kernels(const Call& call, const RunOptions& run) {
    const Candidate path =
        choose_candidate(call.q.dtype(), no_half_operands(call.fq.dtype(), call.keys), run);
    return kernels::tile_kernels<T>(path.isa, path.half_operands);
  }

  const Call& call_;
  const RunOptions& run_;
  const TileKernels<T>& products_;
  const kernels::EntropyKernels<T>& entropy_;
  void (*add_)(T* x, const T* y, int64_t n);
  // Keys of a strip, rows of a tile; strides and sizes of their blocks. Gradients of keys are transposed.
  int64_t strip_, tile_, padded_tile_, strip_stride_, query_stride_, key_stride_, key_sums_;
};

void check_features(const Tensor& fq, const Tensor& fk, const Tensor& q, const Tensor& k) {
  check_rows(kOp, "feature_q", fq);
  check_rows(kOp, "feature_k", fk);
  const Dims fq_shape{q.size(0), q.size(1), q.size(2), fq.size(3)};
  if (!(fq.shape() == fq_shape) || fq.size(3) < 1) {
    fail(kOp, describe("feature_q", fq) + " beside " + describe("q", q),
         "the same batch size, heads and queries, and one feature or more are needed");
  }
  const Dims fk_shape{k.size(0), fk.size(1), k.size(2), fq.size(3)};
  if (!(fk.shape() == fk_shape)) {
    fail(kOp,
         describe("feature_k", fk) + " beside " + describe("k", k) + " and " +
             describe("feature_q", fq),
         "the batch size and keys of k and the features of feature_q are needed");
  }
  check_heads(kOp, "feature_k", fk, q);
  for (const auto& [name, t] : {std::pair{"feature_q", &fq}, std::pair{"feature_k", &fk}}) {
    if (t->dtype() == q.dtype() || t->dtype() == wide_type(q.dtype())) continue;
    fail(kOp, describe(name, *t) + " beside q of type " + name_of(q.dtype()),
         parameter_types(q.dtype()) + " is needed");
  }
  if (fq.dtype() != fk.dtype()) {
    fail(kOp, describe("feature_q", fq) + " but " + describe("feature_k", fk),
         "give both features one type");
  }
}

Call checked(const Tensor& q, const Tensor& k, const Tensor& fq, const Tensor& fk,
             const DistillationOptions& options) {
  check_attention(kOp, q, k, k);
  check_features(fq, fk, q, k);
  const double scale = options.scale.value_or(1 / std::sqrt(static_cast<double>(q.size(3))));
  if (!std::isfinite(scale)) {
    fail(kOp, "scale is " + std::to_string(scale), "a finite number is needed");
  }
  return {q,         k,         fq,        fk,         q.size(0),      q.size(1),
          q.size(2), k.size(2), q.size(3), fq.size(3), options.causal, scale};
}

void check_loss(const char* name, const Tensor& loss, DType inputs) {
  if (loss.defined() && loss.rank() == 0 && loss.dtype() == wide_type(inputs)) return;
  fail(kOp, describe(name, loss),
       std::string("[] of type ") + name_of(wide_type(inputs)) + " is needed");
}

void check_gradients(const DistillationGradientViews& gradients, const Call& call, DType dtype) {
  check_rows_like(kOp, "gradient of feature_q", gradients.feature_q, call.fq.shape(), dtype);
  check_rows_like(kOp, "gradient of feature_k", gradients.feature_k, call.fk.shape(), dtype);
}

}  // namespace

void attention_distillation_loss(const Tensor& q, const Tensor& k, const Tensor& feature_q,
                                 const Tensor& feature_k, const Tensor& loss,
                                 const DistillationOptions& options, const RunOptions& run) {
  const Call call = checked(q, k, feature_q, feature_k, options);
  check_loss("loss", loss, q.dtype());
  with_wide_type(q.dtype(), [&]<class T>(T) {
    *loss.as<T>() = static_cast<T>(Distillation<T>(call, run).loss());
  });
}

Array attention_distillation_loss(const Tensor& q, const Tensor& k, const Tensor& feature_q,
                                  const Tensor& feature_k, const DistillationOptions& options,
                                  const RunOptions& run) {
  checked(q, k, feature_q, feature_k, options);
  Array loss(wide_type(q.dtype()), {});
  attention_distillation_loss(q, k, feature_q, feature_k, loss, options, run);
  return loss;
}

void attention_distillation_loss_backward(const Tensor& grad_loss, const Tensor& q, const Tensor& k,
                                          const Tensor& feature_q, const Tensor& feature_k,
                                          const DistillationOptions& options,
                                          const DistillationGradientViews& gradients,
                                          const RunOptions& run) {
  const Call call = checked(q, k, feature_q, feature_k, options);
  check_loss("grad_loss", grad_loss, q.dtype());
  check_gradients(gradients, call, feature_q.dtype());
  with_wide_type(q.dtype(), [&]<class T>(T) {
    Distillation<T>(call, run).gradients(static_cast<double>(*grad_loss.as<T>()), gradients);
  });
}

void attention_distillation_loss_with_gradients(const Tensor& q, const Tensor& k,
                                                const Tensor& feature_q, const Tensor& feature_k,
                                                const Tensor& loss,
                                                const DistillationGradientViews& gradients,
                                                const DistillationOptions& options,
                                                const RunOptions& run) {
  const Call call = checked(q, k, feature_q, feature_k, options);
  check_loss("loss", loss, q.dtype());
  check_gradients(gradients, call, wide_type(q.dtype()));
  with_wide_type(q.dtype(), [&]<class T>(T) {
    *loss.as<T>() = static_cast<T>(Distillation<T>(call, run).gradients(1, gradients));
  });
}

DistillationGradients attention_distillation_loss_backward(const Tensor& grad_loss, const Tensor& q,
                                                           const Tensor& k, const Tensor& feature_q,
                                                           const Tensor& feature_k,
                                                           const DistillationOptions& options,
                                                           const RunOptions& run) {
  checked(q, k, feature_q, feature_k, options);
  DistillationGradients result{empty_like(feature_q), empty_like(feature_k)};
  attention_distillation_loss_backward(grad_loss, q, k, feature_q, feature_k, options,
                                       {result.feature_q, result.feature_k}, run);
  return result;
}

}  // namespace heed
