// Loops. An item is a range of query rows of one key head (all query heads of its group) against a
// range of keys; key tiles are the outer loop, so that a packed tile serves every row of the item:
//
//   for key tile:  pack K, V
//     for query tile of the item that sees it:  S = Q K^T;  P = weights(S);  O = carry O + P V
//   out = O / sum
//
// Key tiles start at multiples of the tile size whatever the item, and every row's sums run in key
// order, so results do not depend on how rows are dealt out to threads. Few rows with many keys are cut
// along the keys instead, into parts of fixed size, merged in order.
#include "engine/tiled/forward.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

#include "base/parallel.h"
#include "heed/error.h"

namespace heed::tiled {

namespace {

using kernels::Block;
using kernels::KeyRange;
using kernels::Rows;
using kernels::RowState;
using kernels::TileKernels;
using kernels::WeightShape;

constexpr double kLog2E = 1.4426950408889634;
// Keys of one part when few rows are cut along the keys: long enough to stream, short enough that a
// cache of a few thousand tokens keeps all cores busy.
constexpr int64_t kPartKeys = 1024;

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

Rows rows_of(const Tensor& t, int64_t b, int64_t h, int64_t begin, int64_t end) {
  return {t.at({b, h, begin}), t.dtype(), t.stride(2), end - begin, t.size(3)};
}

// Rows of one query head inside an item, and where their state lies.
struct QueryTile {
  int64_t head = 0, begin = 0, end = 0;
  int64_t slot = 0;  // first row of its state
  int64_t rows() const { return end - begin; }
};

struct Item {
  int64_t b = 0, kv_head = 0;
  int64_t row_begin = 0, row_end = 0;  // query rows, of every head of the group
  Interval keys;
  int64_t part = -1;  // index among the partial results; -1: finishes its rows itself
};

template <class T>
class Forward {
 public:
  Forward(const Problem& problem, const RunOptions& run)
      : problem_(problem),
        run_(run),
        path_(choose_path(problem, run)),
        kernels_(path_.half_operands ? half_kernels() : kernels::tile_kernels<T>(path_.isa)),
        few_(kernels::tile_kernels<T>(path_.isa)),
        head_dim_(problem.q.size(3)),
        value_dim_(problem.v.size(3)),
        group_(problem.q.size(1) / problem.k.size(1)),
        padded_dim_(round_up(head_dim_, few_.dim_multiple)),
        padded_values_(round_up(value_dim_, std::max(kernels_.dim_multiple, few_.dim_multiple))),
        tile_rows_(round_up(path_.query_tile, kernels_.row_multiple)),
        tile_keys_(path_.key_tile) {}

  void run() {
    plan_items();
    const int threads = threads_for(run_, static_cast<int64_t>(items_.size()));
    parallel_for(static_cast<int64_t>(items_.size()), threads,
                 [&](int64_t i, int) { run_item(items_[static_cast<size_t>(i)]); });
    if (parts_ > 0) merge_parts();
  }

 private:
  const TileKernels<T>& half_kernels() const {
    if constexpr (sizeof(T) == 4) return *kernels::half_tile_kernels(path_.isa);
    return kernels::tile_kernels<T>(path_.isa);
  }

  void plan_items() {
    const int64_t batch = problem_.q.size(0), kv_heads = problem_.k.size(1);
    const int64_t queries = problem_.q.size(2);
    if (path_.few_rows) {
      plan_parts(batch, kv_heads);
      return;
    }
    // Later rows see more keys under a causal mask: long items first.
    for (int64_t end = queries; end > 0;) {
      const int64_t begin = (end - 1) / path_.group_rows * path_.group_rows;
      for (int64_t b = 0; b < batch; ++b) {
        for (int64_t h = 0; h < kv_heads; ++h) {
          items_.push_back({b, h, begin, end, problem_.plan.rows(b, begin, end), -1});
        }
      }
      end = begin;
    }
  }

  void plan_parts(int64_t batch, int64_t kv_heads) {
    const int64_t queries = problem_.q.size(2);
    for (int64_t b = 0; b < batch; ++b) {
      const Interval seen = problem_.plan.rows(b, 0, queries);
      const int64_t first = seen.begin / tile_keys_,
                    last = (seen.end + tile_keys_ - 1) / tile_keys_;
      const int64_t tiles = std::max<int64_t>(0, last - first);
      int64_t part_tiles = std::max<int64_t>(1, kPartKeys / tile_keys_);
      if (problem_.splits)
        part_tiles = std::max<int64_t>(1, (tiles + *problem_.splits - 1) / *problem_.splits);
      for (int64_t h = 0; h < kv_heads; ++h) {
        if (tiles <= part_tiles) {
          items_.push_back({b, h, 0, queries, seen, -1});
          continue;
        }
        for (int64_t t = first; t < last; t += part_tiles) {
          const Interval keys{std::max(seen.begin, t * tile_keys_),
                              std::min(seen.end, (t + part_tiles) * tile_keys_)};
          items_.push_back({b, h, 0, queries, keys, parts_++});
        }
      }
    }
    const int64_t rows = group_ * queries;
    part_sums_ = Array(DType::f64, {parts_, rows, 2});
    part_out_ = Array(sizeof(T) == 8 ? DType::f64 : DType::f32, {parts_, rows, padded_values_});
  }

  std::vector<QueryTile> query_tiles(const Item& item) const {
    std::vector<QueryTile> tiles;
    int64_t slot = 0;
    for (int64_t g = 0; g < group_; ++g) {
      const int64_t head = item.kv_head * group_ + g;
      const int64_t step = path_.few_rows ? item.row_end - item.row_begin : path_.query_tile;
      for (int64_t begin = item.row_begin; begin < item.row_end; begin += step) {
        const int64_t end = std::min(begin + step, item.row_end);
        tiles.push_back({head, begin, end, slot});
        slot += path_.few_rows ? end - begin : tile_rows_;
      }
    }
    return tiles;
  }

  // Everything one item needs, cut from one block of scratch.
  struct Memory {
    std::byte* queries;
    int64_t query_tile_bytes;
    void *keys, *values;
    T *pivot, *sum, *carry;
    Block<T> scores, out;
    void* weights;
    int64_t weight_stride;
    KeyRange* ranges;
  };

  int64_t slots(const std::vector<QueryTile>& tiles) const {
    if (!path_.few_rows) return static_cast<int64_t>(tiles.size()) * tile_rows_;
    return tiles.back().slot + tiles.back().rows();
  }

  size_t scratch_bytes(const std::vector<QueryTile>& tiles) const {
    const int64_t rows = slots(tiles), state = round_up(rows, kernels_.row_multiple);
    const int64_t block = path_.few_rows ? round_up(rows, 4) : tile_rows_;
    int64_t bytes = static_cast<int64_t>(sizeof(T)) *
                    (state * padded_values_ + 3 * state + block * (tile_keys_ + kPad));
    bytes += block * static_cast<int64_t>(sizeof(KeyRange)) + query_bytes(tiles);
    if (!path_.few_rows) {
      bytes +=
          kernels_.key_bytes(tile_keys_, head_dim_) + kernels_.value_bytes(tile_keys_, value_dim_);
    }
    if (path_.half_operands) bytes += 2 * block * (tile_keys_ + kPad);
    return static_cast<size_t>(bytes) + 16 * 64;
  }

  int64_t query_bytes(const std::vector<QueryTile>& tiles) const {
    if (path_.few_rows) {
      return round_up(slots(tiles), kernels_.row_multiple) * padded_dim_ *
             static_cast<int64_t>(sizeof(T));
    }
    return static_cast<int64_t>(tiles.size()) *
           round_up(kernels_.query_bytes(tile_rows_, head_dim_), 64);
  }

  Memory cut(Scratch& scratch, const std::vector<QueryTile>& tiles) const {
    const int64_t rows = round_up(slots(tiles), kernels_.row_multiple);
    const int64_t block = path_.few_rows ? round_up(slots(tiles), 4) : tile_rows_;
    Memory m{};
    m.queries = scratch.take<std::byte>(query_bytes(tiles));
    m.query_tile_bytes =
        path_.few_rows ? 0 : round_up(kernels_.query_bytes(tile_rows_, head_dim_), 64);
    m.pivot = scratch.take<T>(rows);
    m.sum = scratch.take<T>(rows);
    m.carry = scratch.take<T>(rows);
    m.out = {scratch.take<T>(rows * padded_values_), padded_values_};
    m.scores = {scratch.take<T>(block * (tile_keys_ + kPad)), tile_keys_ + kPad};
    m.ranges = scratch.take<KeyRange>(block);
    m.weights = m.scores.data;
    m.weight_stride = m.scores.stride;
    if (path_.half_operands) {
      m.weights = scratch.take<uint16_t>(block * (tile_keys_ + kPad));
      m.weight_stride = tile_keys_ + kPad;
    }
    if (!path_.few_rows) {
      m.keys = scratch.take<std::byte>(kernels_.key_bytes(tile_keys_, head_dim_));
      m.values = scratch.take<std::byte>(kernels_.value_bytes(tile_keys_, value_dim_));
    }
    std::memset(m.queries, 0, static_cast<size_t>(query_bytes(tiles)));  // padding rows stay finite
    std::fill_n(m.pivot, rows, -std::numeric_limits<T>::infinity());
    std::fill_n(m.sum, rows, T{0});
    std::fill_n(m.carry, rows, T{1});
    std::fill_n(m.out.data, rows * padded_values_, T{0});
    return m;
  }

  void run_item(const Item& item) const {
    const std::vector<QueryTile> tiles = query_tiles(item);
    Scratch scratch(scratch_bytes(tiles));
    Memory m = cut(scratch, tiles);
    const bool negate = problem_.scale < 0;
    for (size_t t = 0; t < tiles.size(); ++t) {
      const Rows q = rows_of(problem_.q, item.b, tiles[t].head, tiles[t].begin, tiles[t].end);
      if (path_.few_rows) {
        few_.pack_queries(q, negate, reinterpret_cast<T*>(m.queries) + tiles[t].slot * padded_dim_);
      } else {
        kernels_.pack_queries(q, negate, m.queries + static_cast<int64_t>(t) * m.query_tile_bytes);
      }
    }
    if (!item.keys.empty()) {
      const int64_t first = item.keys.begin / tile_keys_ * tile_keys_;
      for (int64_t key = first; key < item.keys.end; key += tile_keys_) {
        const Interval keys{key, std::min(key + tile_keys_, item.keys.end)};
        if (path_.few_rows) {
          run_few_rows(item, tiles, keys, m);
        } else {
          run_key_tile(item, tiles, keys, m);
        }
      }
    }
    for (const QueryTile& tile : tiles) {
      if (item.part < 0) {
        finish(item.b, tile, m);
      } else {
        keep_part(item.part, tile, m);
      }
    }
  }

  WeightShape<T> shape_of(int64_t b, const QueryTile& tile, int64_t key) const {
    const auto head = static_cast<size_t>(tile.head);
    const Policy& policy = problem_.policy;
    WeightShape<T> shape;
    shape.scale = static_cast<T>(std::abs(problem_.scale) * kLog2E);
    if (!policy.head_bias.empty()) shape.bias = static_cast<T>(policy.head_bias[head] * kLog2E);
    if (!policy.alibi_slope.empty()) {
      shape.slope = static_cast<T>(policy.alibi_slope[head] * kLog2E);
    }
    shape.distance = tile.begin + problem_.plan.offset(b) - key;
    return shape;
  }

  // Null when every row sees the whole tile.
  const KeyRange* ranges_of(int64_t b, const QueryTile& tile, Interval keys,
                            KeyRange* ranges) const {
    if (problem_.plan.covers(b, tile.begin, tile.end, keys)) return nullptr;
    for (int64_t r = 0; r < tile.rows(); ++r) {
      const Interval seen = problem_.plan.row(b, tile.begin + r);
      ranges[r] = {static_cast<int32_t>(std::clamp(seen.begin, keys.begin, keys.end) - keys.begin),
                   static_cast<int32_t>(std::clamp(seen.end, keys.begin, keys.end) - keys.begin)};
    }
    return ranges;
  }

  RowState<T> state_of(const QueryTile& tile, const Memory& m) const {
    return {m.pivot + tile.slot, m.sum + tile.slot, m.carry + tile.slot};
  }

  void run_key_tile(const Item& item, const std::vector<QueryTile>& tiles, Interval keys,
                    const Memory& m) const {
    const int64_t count = keys.end - keys.begin;
    const Rows v = rows_of(problem_.v, item.b, item.kv_head, keys.begin, keys.end);
    bool packed = false, finite = true;
    for (size_t t = 0; t < tiles.size(); ++t) {
      const QueryTile& tile = tiles[t];
      const Interval seen = problem_.plan.rows(item.b, tile.begin, tile.end);
      if (seen.empty() || seen.begin >= keys.end || seen.end <= keys.begin) continue;
      if (!packed) {
        kernels_.pack_keys(rows_of(problem_.k, item.b, item.kv_head, keys.begin, keys.end), m.keys);
        finite = kernels_.pack_values(v, m.values);
        packed = true;
      }
      const KeyRange* ranges = ranges_of(item.b, tile, keys, m.ranges);
      kernels_.scores(m.queries + static_cast<int64_t>(t) * m.query_tile_bytes, tile.rows(), m.keys,
                      count, head_dim_, ranges, m.scores);
      const RowState<T> state = state_of(tile, m);
      const Block<T> out{m.out.row(tile.slot), m.out.stride};
      const auto weigh = kernels_.weights[static_cast<int>(problem_.policy.weight)];
      const auto shape = shape_of(item.b, tile, keys.begin);
      if (finite || ranges == nullptr) {
        weigh(m.scores, tile.rows(), count, ranges, shape, state, m.weights, m.weight_stride);
        kernels_.accumulate(m.weights, m.weight_stride, tile.rows(), m.values, count, value_dim_,
                            ranges, state.carry, out);
      } else {
        // 0 * NaN would let a masked value through: each row adds only what it sees.
        few_.weights[static_cast<int>(problem_.policy.weight)](
            m.scores, tile.rows(), count, ranges, shape, state, m.scores.data, m.scores.stride);
        add_row_by_row(m.scores, tile.rows(), v, ranges, state.carry, out);
      }
    }
  }

  void run_few_rows(const Item& item, const std::vector<QueryTile>& tiles, Interval keys,
                    const Memory& m) const {
    const int64_t rows = slots(tiles);
    const Rows v = rows_of(problem_.v, item.b, item.kv_head, keys.begin, keys.end);
    few_.dot_rows({reinterpret_cast<const T*>(m.queries), padded_dim_}, rows,
                  rows_of(problem_.k, item.b, item.kv_head, keys.begin, keys.end), m.scores);
    const KeyRange* ranges = nullptr;
    for (const QueryTile& tile : tiles) {
      const KeyRange* mine = ranges_of(item.b, tile, keys, m.ranges + tile.slot);
      if (mine != nullptr) ranges = m.ranges;  // the heads of a group see the same keys
      few_.weights[static_cast<int>(problem_.policy.weight)](
          {m.scores.row(tile.slot), m.scores.stride}, tile.rows(), v.count, mine,
          shape_of(item.b, tile, keys.begin), state_of(tile, m), m.scores.row(tile.slot),
          m.scores.stride);
    }
    if (ranges == nullptr) {
      few_.add_rows({m.scores.data, m.scores.stride}, rows, v, m.carry, m.out);
    } else {
      add_row_by_row(m.scores, rows, v, ranges, m.carry, m.out);
    }
  }

  void add_row_by_row(Block<T> weights, int64_t rows, const Rows& v, const KeyRange* ranges,
                      const T* carry, Block<T> out) const {
    const auto element = static_cast<int64_t>(size_of(v.dtype));
    for (int64_t r = 0; r < rows; ++r) {
      Rows seen = v;
      seen.data = static_cast<const std::byte*>(v.data) + ranges[r].begin * v.stride * element;
      seen.count = std::max(0, ranges[r].end - ranges[r].begin);
      if (seen.count == 0) continue;
      few_.add_rows({weights.row(r) + ranges[r].begin, weights.stride}, 1, seen, carry + r,
                    {out.row(r), out.stride});
    }
  }

  void store_lse(int64_t b, int64_t head, int64_t row, double pivot, double sum) const {
    if (!problem_.lse.defined()) return;
    const double lse = (pivot + std::log2(sum)) / kLog2E;
    std::byte* to = problem_.lse.at({b, head, row});
    if (sizeof(T) == 8) {
      *reinterpret_cast<double*>(to) = lse;
    } else {
      *reinterpret_cast<float*>(to) = static_cast<float>(lse);
    }
  }

  void finish(int64_t b, const QueryTile& tile, const Memory& m) const {
    const Tensor& out = problem_.out;
    few_.finish({m.out.row(tile.slot), m.out.stride}, tile.rows(), value_dim_,
                problem_.policy.divide_by_sum() ? m.sum + tile.slot : nullptr,
                out.at({b, tile.head, tile.begin}), out.dtype(), out.stride(2));
    for (int64_t r = 0; r < tile.rows(); ++r) {
      store_lse(b, tile.head, tile.begin + r, m.pivot[tile.slot + r], m.sum[tile.slot + r]);
    }
  }

  void keep_part(int64_t part, const QueryTile& tile, const Memory& m) const {
    const int64_t rows = group_ * problem_.q.size(2);
    for (int64_t r = tile.slot; r < tile.slot + tile.rows(); ++r) {
      double* sums = part_sums_.template as<double>() + (part * rows + r) * 2;
      sums[0] = m.pivot[r];
      sums[1] = m.sum[r];
      std::memcpy(part_out_.template as<T>() + (part * rows + r) * padded_values_, m.out.row(r),
                  static_cast<size_t>(padded_values_) * sizeof(T));
    }
  }

  // Items of one (batch, key head) lie together, in key order.
  void merge_parts() const {
    for (size_t first = 0; first < items_.size();) {
      size_t last = first + 1;
      while (last < items_.size() && items_[last].b == items_[first].b &&
             items_[last].kv_head == items_[first].kv_head) {
        ++last;
      }
      if (items_[first].part >= 0) merge_group(first, last);
      first = last;
    }
  }

  void merge_group(size_t first, size_t last) const {
    const std::vector<QueryTile> tiles = query_tiles(items_[first]);
    Scratch scratch(static_cast<size_t>(padded_values_) * sizeof(T));
    Memory m{};
    m.out = {scratch.take<T>(padded_values_), padded_values_};
    for (const QueryTile& tile : tiles) {
      for (int64_t r = 0; r < tile.rows(); ++r) {
        merge_row(first, last, items_[first].b, tile, r, m.out.data);
      }
    }
  }

  void merge_row(size_t first, size_t last, int64_t b, const QueryTile& tile, int64_t r,
                 T* out) const {
    const int64_t rows = group_ * problem_.q.size(2), slot = tile.slot + r;
    const bool softmax = problem_.policy.divide_by_sum();
    const auto sums = [&](size_t i) {
      return part_sums_.template as<double>() + (items_[i].part * rows + slot) * 2;
    };
    double pivot = -std::numeric_limits<double>::infinity(), sum = 0;
    for (size_t i = first; i < last; ++i) pivot = std::max(pivot, sums(i)[0]);
    std::fill_n(out, padded_values_, T{0});
    for (size_t i = first; i < last; ++i) {
      const bool empty = softmax && sums(i)[1] == 0;
      if (empty) continue;
      const double factor = !softmax || sums(i)[0] == pivot ? 1 : std::exp2(sums(i)[0] - pivot);
      sum += factor * sums(i)[1];
      const T* part = part_out_.template as<T>() + (items_[i].part * rows + slot) * padded_values_;
      for (int64_t f = 0; f < value_dim_; ++f) out[f] += static_cast<T>(factor) * part[f];
    }
    const T total = static_cast<T>(sum);
    few_.finish({out, padded_values_}, 1, value_dim_, softmax ? &total : nullptr,
                problem_.out.at({b, tile.head, tile.begin + r}), problem_.out.dtype(),
                problem_.out.stride(2));
    store_lse(b, tile.head, tile.begin + r, pivot, sum);
  }

  // Columns behind a tile: whole panels, and rows that do not fall on the same cache sets.
  static constexpr int64_t kPad = 64 + 16;

  const Problem& problem_;
  const RunOptions& run_;
  const Path path_;
  const TileKernels<T>& kernels_;
  const TileKernels<T>& few_;
  const int64_t head_dim_, value_dim_, group_, padded_dim_, padded_values_, tile_rows_, tile_keys_;
  std::vector<Item> items_;
  int64_t parts_ = 0;
  Array part_sums_, part_out_;  // [parts, rows, (pivot, sum)], [parts, rows, value dim]
};

}  // namespace

void forward(const Problem& problem, const RunOptions& run) {
  const Tensor& q = problem.q;
  if (q.size(0) == 0 || q.size(1) == 0 || q.size(2) == 0) return;
  if (q.dtype() == DType::f64) {
    Forward<double>(problem, run).run();
  } else {
    Forward<float>(problem, run).run();
  }
}

}  // namespace heed::tiled
