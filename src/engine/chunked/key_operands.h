// What gradients of keys and values are made from: scratch, operands of a chunk, numbers of rows.
#pragma once
#include <vector>

#include "engine/chunked/chunk_call.h"
#include "engine/chunked/gradients.h"

namespace heed::chunked {

template <class T>
class KeyOperands : public ChunkCall<T> {
 protected:
  using Call = ChunkCall<T>;
  using typename Call::Block;

  KeyOperands(const Problem<T>& problem, const Tensor& out_gradient, const Gradients& gradients,
              const RowStatistics<T>& statistics, const RunOptions& run)
      : Call(problem, run),
        out_gradient_(out_gradient),
        gradients_(gradients),
        statistics_(statistics),
        padded_panel_(round_up(this->tile_, this->products_.key_multiple)) {}

  struct Memory {
    typename Call::UpdateMemory update;
    typename Call::StateOperandMemory as_values, as_keys;
    typename Call::WeightMemory weights;
    Block scores, polynomial;
    Block key_rows, value_rows, query_rows, gradient_rows, raw_rows;
    Block features, more_features;  // gradients of a head by feature of the keys
    Block values;                   // of a head's values
    Block key_sum, value_sum;       // over the heads of the group
    void *key, *value, *query_panels, *gradient_panels, *queries, *gradients;
    KeyRange* ranges;
    T *factors, *row;
    uint16_t *query_half, *key_half;
    ReadAhead* ahead;
  };

  Memory memory(Cutter& cut) const {
    const int64_t rows = this->tile_rows_;
    const auto block = [&](int64_t width) { return Block{cut.take<T>(rows * width), width}; };
    const auto& products = this->products_;
    const int64_t operand = std::max(this->width_, this->tile_);
    const int64_t wide_row = std::max(this->padded_width_, padded_panel_);
    Memory m;
    m.update = this->update_memory(cut);
    m.as_values = this->state_operand_memory(cut, false);
    m.as_keys = this->state_operand_memory(cut, true);
    m.weights.scores = block(this->score_stride_);
    m.weights.rounded = this->half_ ? cut.take<uint16_t>(rows * this->score_stride_) : nullptr;
    m.scores = block(this->score_stride_);
    m.polynomial = block(this->problem_.policy.polynomial ? this->score_stride_ : 0);
    m.key_rows = block(wide_row);
    m.query_rows = block(wide_row);
    m.key_rows.stride = m.query_rows.stride = padded_panel_;
    m.raw_rows = block(this->problem_.policy.polynomial ? this->padded_width_ : 0);
    m.value_rows = block(this->padded_values_);
    m.gradient_rows = block(this->padded_values_);
    m.features = block(padded_panel_);
    m.more_features = block(padded_panel_);
    m.values = block(this->padded_values_);
    m.key_sum = block(wide_row);
    m.value_sum = block(this->padded_values_);
    m.key = cut.take<std::byte>(products.query_bytes(rows, operand));
    m.value = cut.take<std::byte>(products.query_bytes(rows, this->value_dim_));
    m.query_panels = cut.take<std::byte>(products.key_bytes(this->chunk_, operand));
    m.gradient_panels = cut.take<std::byte>(products.key_bytes(this->chunk_, this->value_dim_));
    m.queries = cut.take<std::byte>(products.value_bytes(this->chunk_, operand));
    m.gradients = cut.take<std::byte>(products.value_bytes(this->chunk_, this->value_dim_));
    m.ranges = cut.take<KeyRange>(rows);
    m.factors = cut.take<T>(rows);
    m.row = cut.take<T>(std::max(this->padded_features_, this->padded_values_));
    m.query_half = this->half_memory(cut);
    m.key_half = this->half_memory(cut);
    return m;
  }
  Memory memory_at(std::byte* base) const {
    Cutter cut(base);
    return memory(cut);
  }

  // Numbers of a chunk's query rows; null where rows end as they are.
  const T* row_numbers(const std::vector<T>& numbers, int64_t b, int64_t h,
                       const Chunk& chunk) const {
    if (numbers.empty()) return nullptr;
    return numbers.data() + (b * this->heads_ + h) * this->queries_ + chunk.query;
  }
  Rows gradient_of(int64_t b, int64_t h, const Chunk& chunk) const {
    return this->rows(out_gradient_, b, h, chunk.query, chunk.queries);
  }

  // Keys and values as left operands: the same for all heads of a group.
  struct Operands {
    Source<T> k;
    typename Call::Left key, value;
    ReadAhead ahead;
  };
  Operands pack_keys(const Source<T>& k, int64_t b, int64_t h, const Chunk& chunk,
                     const Memory& m) const {
    Operands operands{k, {}, {}, {}};
    const Rows v = this->values(b, h, chunk);
    if (this->reads_totals()) {
      const auto x = this->whole_features(k, 0, this->features_, m.key_rows);
      const auto y = this->whole_rows(v, m.value_rows);
      const auto results = [&](const Tensor& to) {
        return this->following(this->rows(to, b, this->key_head(h), chunk.begin, chunk.keys));
      };
      return {k,
              {x.data, x.stride},
              {y.data, y.stride},
              {this->following(k.rows), this->following(v), results(gradients_.k),
               results(gradients_.v)}};
    }
    const int64_t readable = this->tokens_ - chunk.begin;
    if (this->problem_.policy.polynomial) {
      operands.key = this->left(k.rows, readable, m.raw_rows, m.key);
    } else {
      operands.key =
          this->left(this->operand(k, m.key_rows, m.key_half), readable, m.key_rows, m.key);
    }
    operands.value = this->left(v, readable, m.value_rows, m.value);
    return operands;
  }

  kernels::WeightFactors<T> weight_factors(int64_t b, int64_t h, const Chunk& chunk) const {
    kernels::WeightFactors<T> factors;
    if (const auto* table = this->decays(h)) factors.decay = table->rising(chunk.shift);
    factors.column = row_numbers(statistics_.num_scale, b, h, chunk);
    return factors;
  }
  // What key j of a chunk adds to the state behind the chunk.
  const T* carry(int64_t h, const Chunk& chunk) const {
    const auto* table = this->decays(h);
    return table == nullptr ? this->ones() : table->falling(chunk.tokens - 1);
  }
  // Whether the gradients of queries were made in the centred form; then the row m of a lane's total, or of
  // its state before a chunk.
  bool centred() const { return !statistics_.centres.empty(); }
  bool centres_chunks() const { return centred() && this->problem_.causal; }
  const T* centre(int64_t lane, int64_t chunk) const {
    const int64_t row = centres_chunks() ? lane * this->key_chunks() + chunk : lane;
    return statistics_.centres.data() + row * this->padded_values_;
  }
  // w += sign X m, for rows X of a gradient of S; memory for as many numbers as w has.
  void shift_keys(T sign, const Rows& x, const T* row, T* memory, T* w) const {
    std::fill_n(memory, this->padded_features_, T{0});
    this->rows_.row_dots(x, {row, 0}, memory);
    this->rows_.add_scaled(sign, memory, this->padded_features_, w);
  }
  Rows sums_rows(Block sums) const {
    return this->as_rows({sums.data, sums.stride}, this->features_, this->padded_values_);
  }
  // w as the keys of a chunk meet it, beside D rounded by state_keys: for a row m, w + D m stays as it was, so
  // that rounding shows only in what values differ from m. It is that of the state behind the chunk, or of
  // the first one that a query reads.
  void settle_keys(int64_t lane, const Chunk& chunk, Block sums, const Memory& m, T* w) const {
    const int64_t before = std::max<int64_t>(0, this->tokens_ - this->queries_);
    const int64_t behind = std::max(chunk.begin, before - 1) / this->chunk_ + 1;
    const T* row = centre(lane, std::min(behind, this->key_chunks() - 1));
    shift_keys(T{1}, sums_rows(sums), row, m.update.row, w);
    const Rows rounded{m.as_keys.rounded, DType::bf16, this->padded_values_, this->features_,
                       this->value_dim_};
    shift_keys(T{-1}, rounded, row, m.update.row, w);
  }
  // A total as values and features meet it: with D as products read it, the row m off, and where that is the
  // mean value also the mean features, which lack their offsets.
  void centre_total(int64_t lane, const StateView<T>& v) const {
    const int64_t stride = this->padded_values_;
    Scratch scratch(static_cast<size_t>(this->features_ * stride) * sizeof(uint16_t));
    auto* rounded = scratch.take<uint16_t>(this->features_ * stride);
    const Rows d = sums_rows(v.sums);
    this->rows_.pack_rows(this->round(d, rounded, stride), nullptr, v.sums);
    std::vector<T> memory(static_cast<size_t>(this->padded_features_));
    shift_keys(T{-1}, d, centre(lane, 0), memory.data(), v.keys);
    if (v.values == nullptr) return;
    const T* means = statistics_.key_means.data() + lane * this->padded_features_;
    const T* offsets = this->key_offsets(lane);
    for (int64_t f = 0; f < this->features_; ++f) {
      const T less = (offsets == nullptr ? T{0} : offsets[f]) - means[f];
      this->rows_.add_scaled(less, v.sums.row(f), stride, v.values);
    }
  }

  const Tensor& out_gradient_;
  const Gradients& gradients_;
  const RowStatistics<T>& statistics_;
  const int64_t padded_panel_;
};

}  // namespace heed::chunked
