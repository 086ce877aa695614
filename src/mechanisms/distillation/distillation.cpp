#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "base/parallel.h"
#include "engine/operands.h"
#include "heed/attention_distillation_loss.h"
#include "kernels/cross_entropy_rows.h"
#include "kernels/matrix.h"

namespace heed {

namespace {

using kernels::Block;
using kernels::EntropyFactors;
using kernels::MatrixKernels;
using kernels::Rows;

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
  int64_t first_query(int64_t key) const {
    return causal ? std::clamp<int64_t>(key - offset(), 0, queries) : 0;
  }
  int64_t rows() const { return batch * heads * queries; }
};

Rows rows_of(const Tensor& t, int64_t b, int64_t h, int64_t begin, int64_t count) {
  return {t.at({b, h, begin}), t.dtype(), t.stride(2), count, t.size(3)};
}
Rows columns_of(Rows rows, int64_t begin, int64_t count) {
  rows.data =
      static_cast<const std::byte*>(rows.data) + begin * static_cast<int64_t>(size_of(rows.dtype));
  rows.width = count;
  return rows;
}
Rows slice_of(Rows rows, int64_t begin, int64_t count) {
  rows.data = static_cast<const std::byte*>(rows.data) +
              begin * rows.stride * static_cast<int64_t>(size_of(rows.dtype));
  rows.count = count;
  return rows;
}

/// Products of a tile of rows with pieces of other rows, straight from the tensors, through packed
/// pieces of a fixed size.
template <class T>
class RowProducts {
 public:
  static constexpr int64_t kPiece = 256;  // rows and columns that are packed at once

  RowProducts(const MatrixKernels<T>& kernels, int64_t tile_rows)
      : kernels_(kernels),
        stride_(kernels::row_stride(kernels, kPiece)),
        tile_(static_cast<size_t>(tile_rows * stride_)),
        piece_(static_cast<size_t>(kPiece * stride_)),
        transposed_(static_cast<size_t>(kPiece * stride_)) {}

  /// out[r][m] = a[r] . b[m]
  void scores(const Rows& a, const Rows& b, Block<T> out) {
    for (int64_t m = 0; m < b.count; m += kPiece) {
      const int64_t count = std::min(kPiece, b.count - m);
      for (int64_t e = 0; e < a.width; e += kPiece) {
        const int64_t width = std::min(kPiece, a.width - e);
        kernels_.load_rows(columns_of(a, e, width), block(tile_));
        kernels_.load_rows(columns_of(slice_of(b, m, count), e, width), block(piece_));
        kernels_.transpose(readable(piece_), count, width, block(transposed_));
        kernels_.multiply({tile_.data(), stride_, 1}, readable(transposed_), width,
                          {out.data + m, out.stride}, a.count, count, e > 0);
      }
    }
  }

  /// out[r] += sum_m weights[r][m] b[m]
  void add_weighted(Block<T> weights, int64_t rows, const Rows& b, Block<T> out) {
    for (int64_t m = 0; m < b.count; m += kPiece) {
      const int64_t count = std::min(kPiece, b.count - m);
      for (int64_t f = 0; f < b.width; f += kPiece) {
        const int64_t width = std::min(kPiece, b.width - f);
        kernels_.load_rows(columns_of(slice_of(b, m, count), f, width), block(piece_));
        kernels_.multiply({weights.data + m, weights.stride, 1}, readable(piece_), count,
                          {out.data + f, out.stride}, rows, width, true);
      }
    }
  }

 private:
  Block<T> block(std::vector<T>& values) { return {values.data(), stride_}; }
  Block<const T> readable(const std::vector<T>& values) { return {values.data(), stride_}; }

  const MatrixKernels<T>& kernels_;
  int64_t stride_;
  std::vector<T> tile_, piece_, transposed_;
};

/// Factors of all rows of a call, made by the first sweep of the backward and read by the second.
template <class T>
struct AllFactors {
  std::vector<T> maximum, inverse_sum, total, active;
  explicit AllFactors(int64_t rows)
      : maximum(static_cast<size_t>(rows)),
        inverse_sum(maximum.size()),
        total(maximum.size()),
        active(maximum.size()) {}
  EntropyFactors<T> at(int64_t row) const {
    return {maximum.data() + row, inverse_sum.data() + row, total.data() + row,
            active.data() + row};
  }
};

template <class T>
class Distillation {
 public:
  Distillation(const Call& call, const RunOptions& run)
      : call_(call),
        run_(run),
        kernels_(kernels::matrix_kernels<T>(chosen_isa(run))),
        entropy_(kernels::entropy_kernels<T>(chosen_isa(run))),
        strip_(std::min<int64_t>(2048, std::max(call.keys, call.queries))),
        tile_(tile_rows(strip_, call.features)),
        strip_stride_(kernels::row_stride(kernels_, strip_)),
        feature_stride_(kernels::row_stride(kernels_, call.features)) {}

  double loss() {
    const int64_t tiles = ceil_div(call_.queries, tile_), items = call_.batch * call_.heads * tiles;
    std::vector<double> sums(static_cast<size_t>(items));
    parallel(items, false, [&](int64_t item, Tile& tile) {
      AllFactors<T> factors(tile_);
      sums[static_cast<size_t>(item)] =
          query_tile(item / tiles, item % tiles * tile_, tile, factors, 0);
    });
    double total = 0;
    for (double sum : sums) total += sum;
    return call_.rows() == 0 ? 0 : -total / static_cast<double>(call_.rows());
  }

  void backward(double grad_loss, const DistillationGradientViews& gradients) {
    AllFactors<T> factors(call_.rows());
    const T weight =
        static_cast<T>(grad_loss / static_cast<double>(std::max<int64_t>(1, call_.rows())));
    const int64_t tiles = ceil_div(call_.queries, tile_);
    parallel(call_.batch * call_.heads * tiles, true, [&](int64_t item, Tile& tile) {
      const int64_t pair = item / tiles, begin = item % tiles * tile_;
      query_tile(pair, begin, tile, factors, pair * call_.queries + begin);
      query_gradient(pair, begin, tile, factors, weight, gradients.feature_q);
    });
    const int64_t key_tiles = ceil_div(call_.keys, tile_);
    parallel(call_.batch * call_.fk.size(1) * key_tiles, true, [&](int64_t item, Tile& tile) {
      key_gradient(item / key_tiles, item % key_tiles * tile_, tile, factors, weight,
                   gradients.feature_k);
    });
  }

 private:
  struct Tile;

  // Many rows where strips are short: what they are multiplied with is packed once for all of them. Few
  // where their gradients are long, so that a tile of them stays small.
  static int64_t tile_rows(int64_t strip, int64_t features) {
    const int64_t most = std::clamp<int64_t>((1 << 17) / std::max<int64_t>(1, strip), 64, 128);
    return std::clamp<int64_t>((1 << 18) / std::max<int64_t>(1, features), 8, most);
  }

  // Runs body(item, tile) with one tile of scratch for every thread.
  template <class Body>
  void parallel(int64_t items, bool gradients, Body&& body) {
    const int threads = threads_for(run_, items);
    std::vector<std::unique_ptr<Tile>> tiles(static_cast<size_t>(threads));
    parallel_for(items, threads, [&](int64_t item, int worker) {
      auto& tile = tiles[static_cast<size_t>(worker)];
      if (!tile) tile = std::make_unique<Tile>(*this, gradients);
      body(item, *tile);
    });
  }

  // Scratch of one thread: scores of the teacher, products of the student, sums of gradients.
  struct Tile {
    RowProducts<T> products;
    std::vector<T> scores, features, sums;
    Block<T> s, r, d;
    Tile(const Distillation& owner, bool gradients)
        : products(owner.kernels_, owner.tile_),
          scores(static_cast<size_t>(owner.tile_ * owner.strip_stride_)),
          features(scores.size()),
          sums(gradients ? static_cast<size_t>(owner.tile_ * owner.feature_stride_) : 0),
          s{scores.data(), owner.strip_stride_},
          r{features.data(), owner.strip_stride_},
          d{sums.data(), owner.feature_stride_} {}
  };

  // Heads of q that read one of t; 0 where q has none.
  int64_t group(const Tensor& t) const { return call_.heads / std::max<int64_t>(1, t.size(1)); }

  // Both products of queries [begin, begin + rows) with keys [first, last), unless they are there from
  // the last sweep over the same only strip.
  void strip_products(int64_t pair, int64_t begin, int64_t rows, int64_t first, int64_t last,
                      Tile& tile) {
    const int64_t b = pair / call_.heads, h = pair % call_.heads;
    tile.products.scores(rows_of(call_.q, b, h, begin, rows),
                         rows_of(call_.k, b, h / group(call_.k), first, last - first), tile.s);
    tile.products.scores(rows_of(call_.fq, b, h, begin, rows),
                         rows_of(call_.fk, b, h / group(call_.fk), first, last - first), tile.r);
  }

  // Calls body(row, first key, visible keys) for strips of keys that the tile's rows see. With one
  // strip its products are only made where `fresh`.
  template <class Body>
  void for_strips(int64_t pair, int64_t begin, int64_t rows, Tile& tile, bool fresh, Body&& body) {
    const int64_t end = call_.visible_keys(begin + rows - 1);
    for (int64_t first = 0; first < end; first += strip_) {
      const int64_t last = std::min(end, first + strip_);
      if (fresh || end > strip_) strip_products(pair, begin, rows, first, last, tile);
      for (int64_t row = 0; row < rows; ++row) {
        const int64_t visible = std::min(call_.visible_keys(begin + row), last) - first;
        body(row, std::max<int64_t>(visible, 0));
      }
    }
  }

  // Factors of the tile's rows, to factors[at..); returns the sum of their P log A.
  double query_tile(int64_t pair, int64_t begin, Tile& tile, AllFactors<T>& factors, int64_t at) {
    const int64_t rows = std::min(tile_, call_.queries - begin);
    const T scale = static_cast<T>(call_.scale), floor = static_cast<T>(kFloor);
    std::vector<kernels::EntropyRow<T>> stats(static_cast<size_t>(rows),
                                              {-std::numeric_limits<T>::infinity(), 0, 0});
    for_strips(pair, begin, rows, tile, true, [&](int64_t row, int64_t n) {
      entropy_.statistics(tile.s.row(row), tile.r.row(row), n, scale,
                          stats[static_cast<size_t>(row)]);
    });
    for (int64_t row = 0; row < rows; ++row) {
      const auto& of = stats[static_cast<size_t>(row)];
      const auto to = static_cast<size_t>(at + row);
      factors.maximum[to] = of.maximum == -std::numeric_limits<T>::infinity() ? 0 : of.maximum;
      factors.inverse_sum[to] = of.sum == 0 ? 0 : 1 / of.sum;
      factors.total[to] = of.total == 0 ? std::numeric_limits<T>::infinity() : of.total;
      factors.active[to] = 0;
    }
    double sum = 0;
    for_strips(pair, begin, rows, tile, false, [&](int64_t row, int64_t n) {
      sum += static_cast<double>(entropy_.loss(tile.s.row(row), tile.r.row(row), n, scale, floor,
                                               factors.at(at + row),
                                               factors.active[static_cast<size_t>(at + row)]));
    });
    return sum;
  }

  void query_gradient(int64_t pair, int64_t begin, Tile& tile, const AllFactors<T>& factors,
                      T weight, const Tensor& to) {
    const int64_t rows = std::min(tile_, call_.queries - begin);
    const int64_t b = pair / call_.heads, h = pair % call_.heads;
    const int64_t end = call_.visible_keys(begin + rows - 1);
    std::fill(tile.sums.begin(), tile.sums.end(), T{0});
    for (int64_t first = 0; first < end; first += strip_) {
      const int64_t last = std::min(end, first + strip_);
      if (end > strip_) strip_products(pair, begin, rows, first, last, tile);
      for (int64_t row = 0; row < rows; ++row) {
        const int64_t n =
            std::clamp<int64_t>(call_.visible_keys(begin + row) - first, 0, last - first);
        entropy_.gradient(tile.s.row(row), tile.r.row(row), n, static_cast<T>(call_.scale),
                          static_cast<T>(kFloor), weight,
                          factors.at(pair * call_.queries + begin + row), false);
        std::fill(tile.r.row(row) + n, tile.r.row(row) + (last - first), T{0});
      }
      tile.products.add_weighted(
          tile.r, rows, rows_of(call_.fk, b, h / group(call_.fk), first, last - first), tile.d);
    }
    store(tile, to, b, h, begin, rows);
  }

  // The same tile transposed: keys are its rows, and queries of all heads that read them its columns.
  void key_gradient(int64_t pair, int64_t begin, Tile& tile, const AllFactors<T>& factors, T weight,
                    const Tensor& to) {
    const int64_t rows = std::min(tile_, call_.keys - begin);
    const int64_t b = pair / call_.fk.size(1), head = pair % call_.fk.size(1);
    std::fill(tile.sums.begin(), tile.sums.end(), T{0});
    for (int64_t h = head * group(call_.fk); h < (head + 1) * group(call_.fk); ++h) {
      for (int64_t first = call_.first_query(begin); first < call_.queries; first += strip_) {
        const int64_t count = std::min(strip_, call_.queries - first);
        const int64_t at = (b * call_.heads + h) * call_.queries + first;
        tile.products.scores(rows_of(call_.k, b, h / group(call_.k), begin, rows),
                             rows_of(call_.q, b, h, first, count), tile.s);
        tile.products.scores(rows_of(call_.fk, b, head, begin, rows),
                             rows_of(call_.fq, b, h, first, count), tile.r);
        for (int64_t row = 0; row < rows; ++row) {
          const int64_t unseen =
              std::clamp<int64_t>(call_.first_query(begin + row) - first, 0, count);
          std::fill_n(tile.r.row(row), unseen, T{0});
          entropy_.gradient(tile.s.row(row) + unseen, tile.r.row(row) + unseen, count - unseen,
                            static_cast<T>(call_.scale), static_cast<T>(kFloor), weight,
                            factors.at(at + unseen), true);
        }
        tile.products.add_weighted(tile.r, rows, rows_of(call_.fq, b, h, first, count), tile.d);
      }
    }
    store(tile, to, b, head, begin, rows);
  }

  void store(Tile& tile, const Tensor& to, int64_t b, int64_t h, int64_t begin, int64_t rows) {
    kernels_.store_rows({tile.d.data, tile.d.stride},
                        {to.at({b, h, begin}), to.dtype(), to.stride(2), rows, call_.features});
  }

  const Call& call_;
  const RunOptions& run_;
  const MatrixKernels<T>& kernels_;
  const kernels::EntropyKernels<T>& entropy_;
  int64_t strip_, tile_, strip_stride_, feature_stride_;
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
         std::string(name_of(q.dtype())) + " or " + name_of(wide_type(q.dtype())) + " is needed");
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

}  // namespace

void attention_distillation_loss(const Tensor& q, const Tensor& k, const Tensor& feature_q,
                                 const Tensor& feature_k, const Tensor& loss,
                                 const DistillationOptions& options, const RunOptions& run) {
  const Call call = checked(q, k, feature_q, feature_k, options);
  check_loss("loss", loss, q.dtype());
  if (q.dtype() == DType::f64) {
    *loss.as<double>() = Distillation<double>(call, run).loss();
  } else {
    *loss.as<float>() = static_cast<float>(Distillation<float>(call, run).loss());
  }
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
  check_rows_like(kOp, "gradient of feature_q", gradients.feature_q, feature_q.shape(),
                  feature_q.dtype());
  check_rows_like(kOp, "gradient of feature_k", gradients.feature_k, feature_k.shape(),
                  feature_k.dtype());
  if (q.dtype() == DType::f64) {
    Distillation<double>(call, run).backward(*grad_loss.as<double>(), gradients);
  } else {
    Distillation<float>(call, run).backward(static_cast<double>(*grad_loss.as<float>()), gradients);
  }
}

DistillationGradients attention_distillation_loss_backward(const Tensor& grad_loss, const Tensor& q,
                                                           const Tensor& k, const Tensor& feature_q,
                                                           const Tensor& feature_k,
                                                           const DistillationOptions& options,
                                                           const RunOptions& run) {
  checked(q, k, feature_q, feature_k, options);
  DistillationGradients result{Array(feature_q.dtype(), feature_q.shape()),
                               Array(feature_k.dtype(), feature_k.shape())};
  attention_distillation_loss_backward(grad_loss, q, k, feature_q, feature_k, options,
                                       {result.feature_q, result.feature_k}, run);
  return result;
}

}  // namespace heed
