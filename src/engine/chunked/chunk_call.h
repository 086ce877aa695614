// What the sweeps of a call share: sizes, chunks, decays, the layout of a state, its update.
#pragma once
#include <vector>

#include "base/parallel.h"
#include "base/round_up.h"
#include "engine/chunked/decay_table.h"
#include "engine/chunked/path.h"
#include "engine/chunked/problem.h"
#include "engine/chunked/schedule.h"
#include "kernels/chunk.h"
#include "kernels/read_ahead.h"
#include "kernels/row_maps.h"

namespace heed::chunked {

using kernels::Decay;
using kernels::KeyRange;
using kernels::ReadAhead;
using kernels::Rows;
using kernels::TokenRange;

/// Some tokens of one sequence. Positions count keys; the keys that exist come first.
struct Chunk {
  int64_t begin = 0, tokens = 0;   // positions
  int64_t keys = 0;                // that exist, from begin
  int64_t query = 0, queries = 0;  // rows of q
  int64_t shift = 0;               // position of the first query, from begin
  TokenRange key_tokens() const { return {0, keys}; }
  TokenRange query_tokens() const { return {shift, shift + queries}; }
};

/// A state in memory: a matrix with padded rows and the two row vectors.
template <class T>
struct StateView {
  kernels::Block<T> sums;  // [F, padded Dv]
  T* keys = nullptr;       // [padded F]
  T* values = nullptr;     // [padded Dv]
  // Of a total: what products read in place of `sums`, where that is something else.
  kernels::Block<T> transposed = {};              // [Dv, padded F]
  void *as_values = nullptr, *as_keys = nullptr;  // half operands
};

/// Rows of q, k, v or a gradient with what they become.
template <class T>
struct Source {
  Rows rows;
  RowsAt at;
  const RowMap<T>* map = nullptr;
};

/// `run` with as many threads as the call has work for.
template <class T>
RunOptions worth_waking(const Problem<T>& problem, const RunOptions& run);

template <class T>
class ChunkCall {
 protected:
  using Block = kernels::Block<T>;

  /// Without `decay_tables` only decay() knows of slopes: tables cost more than a token's step.
  ChunkCall(const Problem<T>& problem, const RunOptions& run, bool decay_tables = true);

  /// What a chunk adds to a state: sums += sum_r factor_r x_r^T y_r, keys += key_factor_r psi_r,
  /// values += value_factor_r y_r. Null factors are 1.
  struct Added {
    Source<T> x, psi;
    Rows y;
    Rows next_x, next_y;  // of the next update: asked for on the way
    const T *factor = nullptr, *key_factor = nullptr, *value_factor = nullptr;
  };
  struct UpdateMemory {
    Block x, y, sums;
    void* y_packed = nullptr;
    uint16_t *x_transposed = nullptr, *x_half = nullptr;
    T* row = nullptr;
  };
  UpdateMemory update_memory(Cutter& cut) const;
  /// to = decay(from) + added; without data in `from`: to = added.
  void update_state(const Added& added, const Decay<T>& decay, const StateView<const T>& from,
                    const StateView<T>& to, const UpdateMemory& m) const;
  /// to = decay(from) + added, for some rows; a sum of values belongs to the first one.
  void advance_view(const FeatureRange& rows, const Decay<T>& decay, const StateView<const T>& from,
                    const StateView<const T>& added, const StateView<T>& to) const;
  void advance_state(int64_t lane, int64_t chunk, const FeatureRange& rows, const T* from,
                     const T* added, T* to) const {
    advance_view(rows, chunk_decay(lane % heads_, chunk), view(from), view(added), view(to));
  }
  int64_t state_size() const { return state_size_; }
  /// What cuts between rows of a state are multiples of.
  int64_t rows_unit() const {
    return problem_.policy.polynomial ? kFeatureTile : products_.dim_multiple;
  }
  /// A total is a state that all rows of a call see: rows all keys, or keys all queries.
  bool makes_total() const { return !problem_.causal && !problem_.policy.polynomial; }
  /// Rows read a total in one product.
  bool reads_totals() const { return makes_total() && !half_; }
  /// Or rows of bfloat16 do: the product rounds them to where they go.
  bool multiplies_totals() const { return makes_total() && half_ && products_.product != nullptr; }
  /// What is missing in the bfloat16 features of a lane's keys; null: nothing.
  const T* key_offsets(int64_t lane) const {
    const RowMap<T>* map = problem_.policy.maps.k;
    return map == nullptr ? nullptr : map->offsets({lane / heads_, key_head(lane % heads_), 0});
  }
  /// What products read of a total lies behind it: made once, by complete_total, for its use as the values
  /// or as the keys of products.
  struct TotalUse {
    bool values = false, keys = false;
  };
  int64_t total_size(TotalUse use) const;
  StateView<T> total(T* state, TotalUse use) const;
  /// `sums`: what stands there for those of the state.
  void complete_total(T* state, TotalUse use, kernels::Block<T> sums) const;
  template <class U>  // T or const T
  StateView<U> view(U* state) const;
  /// A state from, or to, the tensors of a caller.
  void load_state(const State& from, int64_t lane, T* state) const;
  void store_state(const T* state, const State& to, int64_t lane) const;

  int64_t lanes() const { return batch_ * heads_; }
  int64_t key_head(int64_t head) const { return head / group_; }
  /// Chunks of a loop over positions of keys (the only one of a causal call), and of one over queries.
  int64_t key_chunks() const { return count(tokens_); }
  int64_t query_chunks() const { return count(queries_); }
  Chunk causal_chunk(int64_t b, int64_t i) const;
  Chunk key_chunk(int64_t b, int64_t i) const;
  Chunk query_chunk(int64_t i) const;
  /// Chunk i of a loop over queries; -1: none.
  Chunk chunk_of_queries(int64_t b, int64_t i) const {
    if (i < 0) return {};
    return problem_.causal ? causal_chunk(b, i) : query_chunk(i);
  }
  /// Chunk i of a loop over keys; -1: none.
  Chunk chunk_of_keys(int64_t b, int64_t i) const {
    if (i < 0) return {};
    return problem_.causal ? causal_chunk(b, i) : key_chunk(b, i);
  }
  /// Keys that a sequence has.
  int64_t existing(int64_t b) const {
    return problem_.lengths.empty() ? tokens_ : problem_.lengths[static_cast<size_t>(b)];
  }
  /// First query that sees a key position: those before it see nothing.
  int64_t first_query() const {
    return problem_.causal ? std::clamp<int64_t>(queries_ - tokens_, 0, queries_) : 0;
  }
  /// Positions from the first on that query row i sees.
  int64_t seen_tokens(int64_t i) const {
    return problem_.causal ? i + tokens_ - queries_ + 1 : tokens_;
  }

  Decay<T> decay(int64_t head, int64_t tokens) const;
  Decay<T> chunk_decay(int64_t head, int64_t chunk) const {
    return decay(head, chunk_tokens(chunk));
  }
  int64_t chunk_tokens(int64_t chunk) const { return std::min(chunk_, tokens_ - chunk * chunk_); }
  const DecayTable<T>* decays(int64_t head) const {
    return decays_.empty() ? nullptr : &decays_[static_cast<size_t>(head)];
  }
  /// Factors of what a row of a chunk, `distance` tokens after its first one, reads of the state.
  const T* state_factors(int64_t head, int64_t distance) const {
    return decays_.empty() ? ones_.data() : decays(head)->rising(distance);
  }

  const T* ones() const { return ones_.data(); }

  /// The query rows of a chunk, and the factor on their result.
  EndingRows ending_rows(int64_t b, const Chunk& chunk) const {
    return {b, seen_tokens(chunk.query), problem_.causal ? 1 : 0, chunk.queries};
  }
  double scale(int64_t head) const {
    const auto& scales = problem_.policy.scales;
    return scales.empty() ? 1 : scales[static_cast<size_t>(head)];
  }

  Rows rows(const Tensor& t, int64_t b, int64_t h, int64_t begin, int64_t count) const {
    return {t.at({b, h, begin}), t.dtype(), t.stride(2), count, t.size(3)};
  }
  kernels::RowsOut rows_out(const Tensor& t, int64_t b, int64_t h, int64_t begin,
                            int64_t count) const {
    return {t.at({b, h, begin}), t.dtype(), t.stride(2), count, t.size(3)};
  }
  /// As many rows behind these.
  static Rows following(Rows rows) {
    const int64_t bytes = rows.count * rows.stride * static_cast<int64_t>(size_of(rows.dtype));
    rows.data = static_cast<const std::byte*>(rows.data) + bytes;
    return rows;
  }
  Source<T> queries(int64_t b, int64_t h, const Chunk& chunk) const;
  Source<T> keys(int64_t b, int64_t h, const Chunk& chunk) const;
  Rows values(int64_t b, int64_t h, const Chunk& chunk) const {
    return rows(problem_.v, b, key_head(h), chunk.begin, chunk.keys);
  }
  /// The same rows as they enter denominators.
  Source<T> for_sums(Source<T> source, bool query) const;
  bool separate_sums() const { return problem_.policy.sums.has_value(); }
  /// Those in T, in whole vectors; phi: what operand() made of the source, `block`: memory for others.
  kernels::Block<const T> sum_features(const Source<T>& source, bool query, const Rows& phi,
                                       Block block) const;

  /// Features [first, first + count) of rows in T.
  void features(const Source<T>& source, int64_t first, int64_t count, Block to) const;
  /// Columns [first, first + count) of rows.
  static Rows columns(Rows rows, int64_t first, int64_t count) {
    rows.data = static_cast<const std::byte*>(rows.data) +
                first * static_cast<int64_t>(size_of(rows.dtype));
    rows.width = count;
    return rows;
  }
  /// Rows in T, in whole vectors: where they lie if they are that already, else copied to `block`.
  kernels::Block<const T> whole_rows(const Rows& x, Block block) const;
  /// The same of features [first, first + count).
  kernels::Block<const T> whole_features(const Source<T>& source, int64_t first, int64_t count,
                                         Block block) const;
  /// The same of rows whose features for denominators, if any, are psi: those in `block` are overwritten.
  kernels::Block<const T> features_after_sums(const Source<T>& source, kernels::Block<const T> psi,
                                              int64_t first, int64_t count, Block block) const;
  static constexpr DType kType = dtype_of<T>;
  /// Whether rows are what packing them would make of them.
  bool lies_packed(const Rows& x, int64_t multiple) const {
    return x.dtype == (half_ ? DType::bf16 : kType) && x.width == x.stride &&
           x.width % multiple == 0;
  }
  static Rows as_rows(kernels::Block<const T> block, int64_t count, int64_t width) {
    return {block.data, kType, block.stride, count, width};
  }
  /// Rows as products and sums over them read them: as they lie, or their features, made in `block` or, for
  /// bfloat16 products, in `half`.
  Rows operand(const Source<T>& source, Block block, uint16_t* half) const;
  /// Rows of T as bfloat16, in `to`.
  Rows round(const Rows& x, uint16_t* to, int64_t stride) const {
    if constexpr (sizeof(T) == 4) {
      rows_.round_rows({static_cast<const T*>(x.data), x.stride}, x.count, x.width, to, stride);
    }
    return {to, DType::bf16, stride, x.count, x.width};
  }
  int64_t half_stride() const { return round_up(features_, products_.key_multiple); }
  /// For the bfloat16 features of a chunk's rows, whole blocks of them.
  uint16_t* half_memory(Cutter& cut) const {
    const bool mapped = problem_.policy.maps.q != nullptr || problem_.policy.maps.k != nullptr;
    return half_ && mapped ? cut.take<uint16_t>(tile_rows_ * half_stride()) : nullptr;
  }

  /// The left operand of a product: rows in T, or packed bfloat16. `readable`: rows of memory from the
  /// first of x on; with enough of them for whole register blocks x may be used as it lies.
  struct Left {
    const void* data = nullptr;
    int64_t stride = 0;
  };
  Left left(const Rows& x, int64_t readable, Block block, void* packed) const;

  /// The products of tile.h.
  void scores(const Left& left, int64_t count, const void* panels, int64_t keys, int64_t width,
              const KeyRange* ranges, Block s, ReadAhead* ahead) const;
  void accumulate(const Left& left, int64_t count, const void* values, int64_t keys, int64_t width,
                  const KeyRange* ranges, const T* carry, Block o, ReadAhead* ahead) const;
  /// Multiply-adds of the products of `rows` rows of a chunk with `columns` others of it and the state: in
  /// the course of as many the next chunk is asked for.
  int64_t work(int64_t rows, int64_t columns) const {
    return rows * (columns * (features_ + value_dim_) + features_ * value_dim_);
  }
  /// Columns of gradients by feature that score products write at least.
  int64_t written_features() const { return round_up(features_, products_.dim_multiple); }
  static void zero_rows(Block x, int64_t rows, int64_t width) {
    for (int64_t r = 0; r < rows; ++r) std::fill_n(x.row(r), width, T{0});
  }
  /// Rows of a result where they lie if products can write them there, else `scratch`.
  Block in_place(const Tensor& to, int64_t b, int64_t h, int64_t first, int64_t count,
                 Block scratch) const;
  static kernels::RowsOut out_rows(Block block, int64_t count, int64_t width) {
    return {block.data, kType, block.stride, count, width};
  }
  /// Copies rows into a result, unless they lie there.
  void finish(Block rows, const Tensor& to, int64_t b, int64_t h, int64_t first,
              int64_t count) const;

  /// Rows of a state (or of anything in T) as the right operand, and as keys of a score product.
  struct StateOperandMemory {
    uint16_t* rounded = nullptr;
    void* packed = nullptr;
  };
  StateOperandMemory state_operand_memory(Cutter& cut, bool as_keys) const;
  const void* state_values(Block sums, int64_t count, const StateOperandMemory& m) const;
  const void* state_keys(Block sums, int64_t count, const StateOperandMemory& m) const;
  const void* state_values(const StateView<T>& state, const StateOperandMemory& m) const {
    return state.as_values != nullptr ? state.as_values : state_values(state.sums, features_, m);
  }
  const void* state_keys(const StateView<T>& state, const StateOperandMemory& m) const {
    return state.as_keys != nullptr ? state.as_keys : state_keys(state.sums, features_, m);
  }

  /// o = carry o + W Y, where row r sees ranges[r]; W are the scores, weighed with `factors` unless
  /// `weighed`. Rows of Y that are not finite reach only rows that see them.
  struct Right {
    Rows rows;
    const void* packed = nullptr;
    bool finite = true;
  };
  struct WeightMemory {
    Block scores;
    uint16_t* rounded = nullptr;
  };
  void weigh_and_add(const WeightMemory& m, int64_t count, int64_t columns, const KeyRange* ranges,
                     const kernels::WeightFactors<T>& factors, bool weighed, const Right& right,
                     const T* carry, Block o, ReadAhead* ahead) const;
  /// Rows as keys of a score product.
  void panels(const Rows& x, void* packed) const { products_.pack_keys(x, packed); }
  Right right(const Rows& y, void* packed) const {
    if (!half_ && lies_packed(y, products_.dim_multiple))
      return {y, y.data, kernels::row_map_kernels<T>(path_.isa).all_finite(y)};
    return {y, packed, products_.pack_values(y, packed)};
  }

  /// Keys that each query of a chunk sees, and queries that see each key.
  void query_ranges(const Chunk& chunk, KeyRange* ranges) const;
  void key_ranges(const Chunk& chunk, KeyRange* ranges) const;

  const Problem<T>& problem_;
  const RunOptions run_;
  const Path path_;
  const kernels::TileKernels<T>& wide_;
  const kernels::TileKernels<T>& products_;
  const kernels::ChunkKernels<T>& rows_;
  const bool half_;
  const int64_t batch_, heads_, group_, queries_, tokens_;
  const int64_t width_, features_, value_dim_;  // D, F, Dv
  const int64_t padded_width_, padded_features_, padded_values_;
  const int64_t chunk_;      // tokens of a chunk at most
  const int64_t tile_;       // features handled together
  const int64_t tile_rows_;  // rows of blocks: a chunk, padded for products
  const int64_t score_stride_;

 private:
  int64_t count(int64_t tokens) const { return ceil_div(tokens, chunk_); }
  void add_half_outer(const Rows& x, const Added& added, const Decay<T>& decay,
                      kernels::Block<const T> from, Block to, const UpdateMemory& m) const;
  // to = from (null: 0) + the sum of the rows times their factors
  void add_to_sum(const Rows& x, const T* factor, const T* from, const UpdateMemory& m,
                  T* to) const;
  int64_t total_values_size(TotalUse use) const;
  // Rows times factors as the left operand of an update, given the features that enter denominators.
  kernels::Block<const T> update_rows(const Added& added, kernels::Block<const T> psi,
                                      int64_t first, int64_t count, Block block) const;

  int64_t state_size_ = 0;
  std::vector<DecayTable<T>> decays_;  // per head; empty: no decay
  std::vector<T> ones_;
};

}  // namespace heed::chunked
