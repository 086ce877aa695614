// All pairs of tokens, tile by tile: scores of features times the weights of offsets, like a linear
// attention that cannot be reordered. A column of ones beside the values makes the denominators, or a sum
// of each row where that column would take a vector of its own. The backward meets every pair once: shares
// of a head's queries add up what they give to all keys, and these parts are added in order.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "base/parallel.h"
#include "mechanisms/kernelized_rpe/features.h"
#include "mechanisms/row_blocks.h"

namespace heed::rpe {

namespace {

constexpr int64_t kTile = 64;    // tokens whose results are computed together
constexpr int64_t kPiece = 256;  // tokens on the other side that they meet at once

template <class T>
Block<const T> readable(Block<T> x) {
  return {x.data, x.stride};
}

/// Rows of all tokens of some heads, and the same transposed in pieces of kPiece tokens.
template <class T>
struct TokenRows {
  int64_t tokens = 0, width = 0, stride = 0, piece_stride = 0;
  std::vector<T> rows, pieces;

  TokenRows(const kernels::MatrixKernels<T>& kernels, int64_t heads, int64_t tokens_of_head,
            int64_t width_of_row, bool with_pieces)
      : tokens(tokens_of_head),
        width(width_of_row),
        stride(kernels::row_stride(kernels, width_of_row)),
        piece_stride(kernels::row_stride(kernels, kPiece, true)),
        rows(static_cast<size_t>(heads * tokens * stride)),
        pieces(with_pieces
                   ? static_cast<size_t>(heads * ceil_div(tokens, kPiece) * width * piece_stride)
                   : 0) {}

  Block<T> at(int64_t head, int64_t token) {
    return {rows.data() + (head * tokens + token) * stride, stride};
  }
  /// [width, tokens from `token` to the end of its piece]
  Block<T> transposed(int64_t head, int64_t token) {
    const int64_t piece = head * ceil_div(tokens, kPiece) + token / kPiece;
    return {pieces.data() + piece * width * piece_stride + token % kPiece, piece_stride};
  }
  /// Brings rows [token, token + count) of one piece into it.
  void transpose(const kernels::MatrixKernels<T>& kernels, int64_t head, int64_t token,
                 int64_t count) {
    kernels.transpose(readable(at(head, token)), count, width, transposed(head, token));
  }
};

template <class T>
class Direct {
 public:
  Direct(const Call& call, const RunOptions& run)
      : call_(call),
        run_(run),
        kernels_(kernels::matrix_kernels<T>(chosen_isa(run))),
        features_(call, kernels_, chosen_isa(run)),
        weights_(offset_weights<T>(call)),
        l_(call.tokens),
        e_(call.sizes.value_dim),
        group_(call.sizes.group()),
        tiles_(ceil_div(l_, kTile)),
        key_heads_(call.sizes.batch * call.sizes.kv_heads),
        sums_rows_(e_ % kernels_.lanes == 0),
        ones_(static_cast<size_t>(kPiece), T{1}) {}

  void forward(const Tensor& out) {
    for_flights(false, [&](Flight& flight) {
      parallel(flight.count * group_ * tiles_, [&](int64_t item, Work& work) {
        const int64_t head = item / tiles_, begin = item % tiles_ * kTile;
        const int64_t rows = std::min(kTile, l_ - begin);
        const auto [b, h] = call_.place(flight.first, head);
        features_.queries(b, h, begin, rows, work.features, work.phi);
        sums(flight, head, h, begin, rows, work, work.phi);
        for (int64_t r = 0; r < rows; ++r) divide(h, begin + r, work.sums.row(r));
        kernels_.store_rows(readable(work.sums), out_rows(out, {b, h, begin, rows}));
      });
    });
  }

  void backward(const Tensor& grad_out, const KernelizedRpeGradientViews& gradients) {
    constexpr int64_t kBytes = 512 << 10;  // of the second-level cache
    keeps_scores_ = kTile * l_ * static_cast<int64_t>(sizeof(T)) <= kBytes;
    shares_ = shares_of_queries();
    std::vector<double> drpb(static_cast<size_t>(call_.sizes.heads * call_.offsets()));
    for_flights(true, [&](Flight& flight) {
      std::vector<Part> parts = query_sweep(flight, grad_out, gradients.q);
      add_offset_gradients(flight, parts, drpb);
      finish_keys(flight, parts, gradients);
    });
    store_rpb_gradient(call_, drpb, gradients.rpb);
  }

  /// A row's sum of weights, none above 1, came close to the least numbers of T.
  bool underflow() const { return underflow_; }

 private:
  static constexpr T kSmallest = sizeof(T) == 4 ? static_cast<T>(1e-30) : T{0};

  /// Into how many shares the backward cuts the queries of a head, whatever the threads: 16 over all heads, but
  /// no more than 4 where they take much memory.
  int64_t shares_of_queries() const {
    constexpr int64_t kShares = 16, kFew = 4, kBytes = 64 << 20;
    const int64_t bytes = l_ * (call_.features + e_) * static_cast<int64_t>(sizeof(T));
    const int64_t most = std::max(kFew, kBytes / (bytes + 1));
    return std::clamp<int64_t>(ceil_div(kShares, key_heads_ * group_), 1, std::min(most, tiles_));
  }

  struct Flight {
    int64_t first, count;
    TokenRows<T> keys, values;        // features of keys by query head; values and 1 by key head
    std::vector<T> largest;           // exponents of keys, by query head and tile
    std::vector<char> finite_values;  // by key head and tile
    std::vector<char> finite_keys;    // by query head and tile
    Flight(const Direct& owner, int64_t first_head, int64_t heads, bool backward)
        : first(first_head),
          count(heads),
          keys(owner.kernels_, heads * owner.group_, owner.l_, owner.call_.features, true),
          values(owner.kernels_, heads, owner.l_, owner.e_ + 1, backward),
          largest(static_cast<size_t>(heads * owner.group_ * owner.tiles_)),
          finite_values(static_cast<size_t>(heads * owner.tiles_)),
          finite_keys(largest.size()) {}
  };

  /// What one share of a head's queries adds to the gradients of features of keys, of values and of offsets.
  struct Part {
    TokenRows<T> features, values;
    std::vector<T> offsets;
    explicit Part(const Direct& owner)
        : features(owner.kernels_, 1, owner.l_, owner.call_.features, false),
          values(owner.kernels_, 1, owner.l_, owner.e_, false),
          offsets(static_cast<size_t>(owner.call_.offsets())) {}
  };

  /// Scratch of one thread.
  struct Work {
    typename Features<T>::Work features;
    std::vector<T> phi_values, sum_values, score_values, weight_values, dphi_values, g_values;
    Block<T> phi, sums, scores, weights, dphi, g;
    explicit Work(const Direct& owner) : features(owner.features_, kTile) {
      const auto block = [&](std::vector<T>& values, int64_t width) {
        const int64_t stride = kernels::row_stride(owner.kernels_, width, width >= kPiece);
        values.resize(static_cast<size_t>(kTile * stride));
        return Block<T>{values.data(), stride};
      };
      phi = block(phi_values, owner.call_.features);
      sums = block(sum_values, owner.e_ + 1);
      scores = block(score_values, owner.keeps_scores_ ? owner.l_ : kPiece);
      weights = block(weight_values, kPiece);
      dphi = block(dphi_values, owner.call_.features);
      g = block(g_values, owner.e_ + 1);
    }
  };

  template <class Body>
  void parallel(int64_t items, const Body& body) {
    const auto make = [this] { return std::make_unique<Work>(*this); };
    parallel_for_with(works_, items, threads_for(run_, items), make, body);
  }

  // As many heads at a time as fit into kBytes, but enough for all threads.
  template <class Body>
  void for_flights(bool backward, Body&& body) {
    constexpr int64_t kBytes = 16 << 20;
    const int64_t parts = backward ? shares_ * group_ * (call_.features + e_) : 0;
    const int64_t floats = (2 * (call_.features * group_ + e_ + 1) + parts) * l_;
    const int64_t threads = threads_for(run_, 1 << 20);
    const int64_t wanted = std::max(kBytes / (floats * static_cast<int64_t>(sizeof(T)) + 1),
                                    ceil_div(4 * threads, tiles_ * group_));
    const int64_t step = std::clamp<int64_t>(wanted, 1, key_heads_);
    for (int64_t first = 0; first < key_heads_; first += step) {
      Flight flight(*this, first, std::min(step, key_heads_ - first), backward);
      load_keys(flight, backward);
      body(flight);
    }
  }

  void load_keys(Flight& flight, bool backward) {
    parallel(flight.count * tiles_, [&](int64_t item, Work& work) {
      const int64_t key_head = item / tiles_, tile = item % tiles_, begin = tile * kTile;
      const int64_t rows = std::min(kTile, l_ - begin);
      for (int64_t member = 0; member < group_; ++member) {
        const int64_t head = key_head * group_ + member;
        const auto [b, h] = call_.place(flight.first, head);
        flight.largest[static_cast<size_t>(head * tiles_ + tile)] =
            features_.key_exponents(b, h, begin, rows, work.features, flight.keys.at(head, begin));
      }
      load_values(flight, key_head, tile, rows);
      if (backward) flight.values.transpose(kernels_, key_head, begin, rows);
    });
    parallel(flight.count * group_ * tiles_, [&](int64_t item, Work&) {
      const int64_t head = item / tiles_, begin = item % tiles_ * kTile;
      const int64_t rows = std::min(kTile, l_ - begin);
      const T* first = flight.largest.data() + head * tiles_;
      features_.finish_keys(rows, *std::max_element(first, first + tiles_),
                            flight.keys.at(head, begin));
      flight.finite_keys[static_cast<size_t>(item)] =
          all_finite(flight.keys.at(head, begin), rows, call_.features);
      flight.keys.transpose(kernels_, head, begin, rows);
    });
  }

  void load_values(Flight& flight, int64_t key_head, int64_t tile, int64_t rows) {
    const int64_t begin = tile * kTile, pair = flight.first + key_head;
    const int64_t b = pair / call_.sizes.kv_heads, kv = pair % call_.sizes.kv_heads;
    const Block<T> to = flight.values.at(key_head, begin);
    kernels_.load_rows(rows_of(call_.v, {b, kv, begin, rows}), to);
    flight.finite_values[static_cast<size_t>(key_head * tiles_ + tile)] = all_finite(to, rows, e_);
    for (int64_t r = 0; r < rows; ++r) {
      std::fill(to.row(r) + e_, to.row(r) + to.stride, T{0});
      to.row(r)[e_] = 1;
    }
  }

  static bool all_finite(Block<T> x, int64_t rows, int64_t width) {
    T sum = 0;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < width; ++i) sum += 0 * x.row(r)[i];
    }
    return sum == 0;
  }

  int64_t last_key(int64_t query) const { return call_.options.causal ? query + 1 : l_; }
  /// Whether all queries from `begin` on see all keys before `end`.
  bool see_all(int64_t begin, int64_t end) const { return !call_.options.causal || end <= begin; }

  // scores[r][m] = phi[r] . feature of key first + m, for keys of one piece
  void piece_scores(Block<T> phi, TokenRows<T>& of, int64_t head, int64_t first, int64_t count,
                    int64_t rows, Block<T> scores) {
    kernels_.multiply({phi.data, phi.stride, 1}, readable(of.transposed(head, first)), of.width,
                      scores, rows, count, false);
  }

  // Multiplies row `token` of a tile with the weights of its offsets from tokens [begin, end); the rest
  // of [first, first + count) becomes 0, whatever stood there.
  void weigh(const T* weights, int64_t token, int64_t begin, int64_t end, int64_t first,
             int64_t count, T* row) {
    begin = std::clamp(begin, first, first + count);
    end = std::clamp(end, begin, first + count);
    std::fill_n(row, begin - first, T{0});
    for_runs(call_, token, begin, end, [&](int64_t at, int64_t n, int64_t entry) {
      kernels_.scale(row + (at - first), weights + entry, n);
    });
    std::fill(row + (end - first), row + count, T{0});
  }

  // work.sums[r] = sum over visible keys of A [v, 1] for queries [begin, begin + rows).
  void sums(Flight& flight, int64_t head, int64_t h, int64_t begin, int64_t rows, Work& work,
            Block<T> phi) {
    for (int64_t r = 0; r < rows; ++r) std::fill_n(work.sums.row(r), work.sums.stride, T{0});
    const int64_t end = last_key(begin + rows - 1), key_head = head / group_;
    for (int64_t first = 0; first < end; first += kPiece) {
      const int64_t count = std::min(kPiece, end - first);
      const Block<T> scores = scores_of(work, first);
      weighed_scores(flight, head, h, begin, first, count, rows, phi, scores);
      add_keys(scores, flight.values.at(key_head, first), first, count, work.sums, begin, rows,
               sums_rows_ ? e_ : e_ + 1,
               flight.finite_values[static_cast<size_t>(key_head * tiles_ + begin / kTile)]);
      for (int64_t r = 0; sums_rows_ && r < rows; ++r) {
        work.sums.row(r)[e_] += kernels_.dot(scores.row(r), ones_.data(), count);
      }
    }
  }

  // Scores of a tile's queries with a piece: all pieces side by side, or one in the place of the other.
  Block<T> scores_of(const Work& work, int64_t first) const {
    return {work.scores.data + (keeps_scores_ ? first : 0), work.scores.stride};
  }

  void weighed_scores(Flight& flight, int64_t head, int64_t h, int64_t begin, int64_t first,
                      int64_t count, int64_t rows, Block<T> phi, Block<T> scores) {
    piece_scores(phi, flight.keys, head, first, count, rows, scores);
    for (int64_t r = 0; r < rows; ++r) {
      weigh(weights_.of(h), begin + r, 0, last_key(begin + r), first, count, scores.row(r));
    }
  }

  struct Range {
    int64_t begin, end;
  };

  // to[r] += sum over `count` tokens of weights(r, token) x, where row r sees those of seen(r) and its other
  // weights are 0. 0 times a NaN would be NaN: unless all rows see all tokens or all of x is `finite`, every
  // row reads its own tokens only.
  template <class Seen>
  void add_products(kernels::Factor<T> weights, Block<T> x, int64_t count, Block<T> to,
                    int64_t rows, int64_t width, bool finite, Seen&& seen) {
    if (finite) {
      kernels_.multiply(weights, readable(x), count, to, rows, width, true);
      return;
    }
    for (int64_t r = 0; r < rows; ++r) {
      const Range range = seen(r);
      const T* from = weights.data + r * weights.row + range.begin * weights.depth;
      kernels_.multiply({from, weights.row, weights.depth}, {x.row(range.begin), x.stride},
                        range.end - range.begin, {to.row(r), to.stride}, 1, width, true);
    }
  }

  // What queries [begin, begin + rows) get from keys [first, first + count). Only keys of the queries' own
  // tile are seen by some of them and not by others: `finite` is about that tile.
  void add_keys(Block<T> weights, Block<T> keys, int64_t first, int64_t count, Block<T> to,
                int64_t begin, int64_t rows, int64_t width, char finite) {
    add_products({weights.data, weights.stride, 1}, keys, count, to, rows, width,
                 see_all(begin, first + count) || finite != 0, [&](int64_t r) {
                   return Range{0, std::clamp<int64_t>(last_key(begin + r) - first, 0, count)};
                 });
  }

  // What those keys get from the queries.
  void add_queries(Block<T> weights, Block<T> queries, int64_t begin, int64_t rows, Block<T> to,
                   int64_t first, int64_t count, int64_t width, bool finite) {
    add_products({weights.data, 1, weights.stride}, queries, rows, to, count, width,
                 see_all(begin, first + count) || finite, [&](int64_t m) {
                   return Range{std::clamp<int64_t>(first + m - begin, 0, rows), rows};
                 });
  }

  // sums become results; returns 1 / denominator, 0 where nothing is visible.
  T divide(int64_t h, int64_t token, T* row) {
    const T sum = std::abs(row[e_]);
    if (sum < kSmallest && sees_something(h, token)) underflow_ = true;
    const T inverse = sum < std::numeric_limits<T>::min() ? T{0} : 1 / row[e_];
    for (int64_t f = 0; f < e_; ++f) row[f] *= inverse;
    return inverse;
  }

  bool sees_something(int64_t h, int64_t token) const {
    bool found = false;
    for_runs(call_, token, 0, last_key(token), [&](int64_t, int64_t count, int64_t entry) {
      const T* c = weights_.of(h) + entry;
      found = found || std::any_of(c, c + count, [](T weight) { return weight != 0; });
    });
    return found;
  }

  // Gradients of the sums [N, D] from those of N / D, in place of the results in `sums`.
  void sum_gradients(const Tensor& grad_out, const Place& at, int64_t begin, int64_t rows,
                     Work& work, Block<T> to) {
    kernels_.load_rows(rows_of(grad_out, {at.b, at.h, begin, rows}), to);
    for (int64_t r = 0; r < rows; ++r) {
      const T inverse = divide(at.h, begin + r, work.sums.row(r));
      T* g = to.row(r);
      const T along = kernels_.dot(g, work.sums.row(r), e_);
      for (int64_t f = 0; f < e_; ++f) g[f] *= inverse;
      std::fill(g + e_, g + to.stride, T{0});
      g[e_] = -along * inverse;
    }
  }

  // dq, and the parts of all else: those of a head's shares one behind the other.
  std::vector<Part> query_sweep(Flight& flight, const Tensor& grad_out, const Tensor& dq) {
    std::vector<Part> parts;
    for (int64_t i = 0; i < flight.count * group_ * shares_; ++i) parts.emplace_back(*this);
    parallel(static_cast<int64_t>(parts.size()), [&](int64_t item, Work& work) {
      const int64_t head = item / shares_, share = shares_ - 1 - item % shares_;  // long ones first
      const int64_t end = share_begin(tiles_, share + 1, shares_);
      for (int64_t tile = share_begin(tiles_, share, shares_); tile < end; ++tile) {
        query_tile(flight, head, tile * kTile, grad_out, dq, parts[static_cast<size_t>(item)],
                   work);
      }
    });
    return parts;
  }

  void query_tile(Flight& flight, int64_t head, int64_t begin, const Tensor& grad_out,
                  const Tensor& dq, Part& part, Work& work) {
    const Place at = call_.place(flight.first, head);
    const int64_t rows = std::min(kTile, l_ - begin), key_head = head / group_;
    const Block<T> phi = work.phi, g = work.g;
    features_.queries(at.b, at.h, begin, rows, work.features, phi);
    sums(flight, head, at.h, begin, rows, work, phi);
    sum_gradients(grad_out, at, begin, rows, work, g);
    const bool finite_phi = all_finite(phi, rows, call_.features),
               finite_g = all_finite(g, rows, e_);
    const char finite_keys = flight.finite_keys[static_cast<size_t>(head * tiles_ + begin / kTile)];
    for (int64_t r = 0; r < rows; ++r) std::fill_n(work.dphi.row(r), work.dphi.stride, T{0});
    const int64_t end = last_key(begin + rows - 1);
    for (int64_t first = 0; first < end; first += kPiece) {
      const int64_t count = std::min(kPiece, end - first);
      const Block<T> scores = scores_of(work, first);
      if (!keeps_scores_) {
        weighed_scores(flight, head, at.h, begin, first, count, rows, phi, scores);
      }
      piece_scores(g, flight.values, key_head, first, count, rows, work.weights);  // of A
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t token = begin + r;
        const int64_t visible = std::clamp<int64_t>(last_key(token), first, first + count);
        for_runs(call_, token, first, visible, [&](int64_t key, int64_t n, int64_t entry) {
          kernels_.add_products(part.offsets.data() + entry, scores.row(r) + (key - first),
                                work.weights.row(r) + (key - first), n);
        });
        weigh(weights_.of(at.h), token, 0, last_key(token), first, count, work.weights.row(r));
      }
      add_keys(work.weights, flight.keys.at(head, first), first, count, work.dphi, begin, rows,
               call_.features, finite_keys);
      add_queries(work.weights, phi, begin, rows, part.features.at(0, first), first, count,
                  call_.features, finite_phi);
      add_queries(scores, g, begin, rows, part.values.at(0, first), first, count, e_, finite_g);
    }
    features_.gradient(false, at.b, at.h, begin, rows, readable(phi), readable(work.dphi),
                       work.features);
    kernels_.store_rows(readable(work.features.dx), {dq.at({at.b, at.h, begin}), dq.dtype(),
                                                     dq.stride(2), rows, call_.sizes.dim});
  }

  void add_offset_gradients(const Flight& flight, const std::vector<Part>& parts,
                            std::vector<double>& drpb) const {
    const int64_t n = call_.offsets();
    for (int64_t item = 0; item < static_cast<int64_t>(parts.size()); ++item) {
      double* to = drpb.data() + call_.place(flight.first, item / shares_).h * n;
      const std::vector<T>& from = parts[static_cast<size_t>(item)].offsets;
      for (int64_t i = 0; i < n; ++i) to[i] += static_cast<double>(from[static_cast<size_t>(i)]);
    }
  }

  // dk and dv from the parts.
  void finish_keys(Flight& flight, std::vector<Part>& parts,
                   const KernelizedRpeGradientViews& gradients) {
    parallel(flight.count * tiles_, [&](int64_t item, Work& work) {
      const int64_t key_head = item / tiles_, begin = item % tiles_ * kTile;
      const int64_t rows = std::min(kTile, l_ - begin), dim = call_.sizes.dim;
      std::vector<T> dk(static_cast<size_t>(kTile * work.features.dx.stride));
      const Block<T> sum{dk.data(), work.features.dx.stride};
      for (int64_t r = 0; r < rows; ++r) std::fill_n(work.sums.row(r), work.sums.stride, T{0});
      for (int64_t member = 0; member < group_; ++member) {
        const int64_t head = key_head * group_ + member;
        const Place at = call_.place(flight.first, head);
        for (int64_t r = 0; r < rows; ++r) {
          std::fill_n(work.dphi.row(r), work.dphi.stride, T{0});
          for (int64_t share = 0; share < shares_; ++share) {
            Part& part = parts[static_cast<size_t>(head * shares_ + share)];
            kernels_.add(work.dphi.row(r), part.features.at(0, begin + r).data, call_.features);
            kernels_.add(work.sums.row(r), part.values.at(0, begin + r).data, e_);
          }
        }
        features_.gradient(true, at.b, at.h, begin, rows, readable(flight.keys.at(head, begin)),
                           readable(work.dphi), work.features);
        for (int64_t r = 0; r < rows; ++r) kernels_.add(sum.row(r), work.features.dx.row(r), dim);
      }
      const auto [b, h] = call_.place(flight.first, key_head * group_);
      const RowBlock keys{b, h / group_, begin, rows};
      kernels_.store_rows(readable(sum), out_rows(gradients.k, keys));
      kernels_.store_rows(readable(work.sums), out_rows(gradients.v, keys));
    });
  }

  const Call& call_;
  const RunOptions& run_;
  const kernels::MatrixKernels<T>& kernels_;
  Features<T> features_;
  OffsetWeights<T> weights_;
  int64_t l_, e_, group_, tiles_, key_heads_;
  std::vector<std::unique_ptr<Work>> works_;
  const bool sums_rows_;  // a column of ones would take a vector of its own
  const std::vector<T> ones_;
  int64_t shares_ = 1;
  bool keeps_scores_ = false;  // of the pieces that a tile of queries meets
  std::atomic<bool> underflow_ = false;
};

}  // namespace

// float32 has no room for features of a query and its keys that are far apart: what comes close to its
// end is computed again in float64.
void forward_direct(const Call& call, bool in_double, const Tensor& out, const RunOptions& run) {
  if (!in_double) {
    Direct<float> direct(call, run);
    direct.forward(out);
    if (!direct.underflow()) return;
  }
  Direct<double>(call, run).forward(out);
}

void backward_direct(const Call& call, bool in_double, const Tensor& grad_out,
                     const KernelizedRpeGradientViews& gradients, const RunOptions& run) {
  if (!in_double) {
    Direct<float> direct(call, run);
    direct.backward(grad_out, gradients);
    if (!direct.underflow()) return;
  }
  Direct<double>(call, run).backward(grad_out, gradients);
}

}  // namespace heed::rpe
