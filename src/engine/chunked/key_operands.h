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

  KeyOperands(const Problem<T>& problem, const Tensor& out, const Gradients& gradients,
              const RowStatistics<T>& statistics, const RunOptions& run)
      : Call(problem, run),
        out_(out),
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
    uint16_t* centred = nullptr;  // values of a chunk
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
    if (centred() && this->problem_.causal) {
      m.centred = cut.take<uint16_t>(rows * this->padded_values_);
    }
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
    return this->rows(out_, b, h, chunk.query, chunk.queries);
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
    const Rows y = this->less_row(v, centre(b * this->heads_ + h), m.centred);
    operands.value =
        this->left(y, m.centred == nullptr ? readable : this->tile_rows_, m.value_rows, m.value);
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
  // Whether the gradients of queries were made in the centred form, and the row m of a lane there.
  bool centred() const { return !statistics_.centres.empty(); }
  const T* centre(int64_t lane) const {
    return centred() ? statistics_.centres.data() + lane * this->padded_values_ : nullptr;
  }
  // w += sign D m: the gradient of z beside values as they are becomes that beside values less m (-1: of
  // what keys meet when their values are as they are).
  void shift_keys(int64_t lane, const StateView<T>& v, T sign) const {
    std::vector<T> shift(static_cast<size_t>(this->padded_features_));
    this->rows_.row_dots(
        this->as_rows({v.sums.data, v.sums.stride}, this->features_, this->padded_values_),
        {centre(lane), 0}, shift.data());
    this->rows_.add_scaled(sign, shift.data(), this->padded_features_, v.keys);
  }
  // A total as values and features meet it: with D as products read it, the row m off, and where that is the
  // mean value also the mean features, which lack their offsets.
  void centre_total(int64_t lane, const StateView<T>& v) const {
    const int64_t stride = this->padded_values_;
    Scratch scratch(static_cast<size_t>(this->features_ * stride) * sizeof(uint16_t));
    auto* rounded = scratch.take<uint16_t>(this->features_ * stride);
    const auto d = this->as_rows({v.sums.data, v.sums.stride}, this->features_, stride);
    this->rows_.pack_rows(this->round(d, rounded, stride), nullptr, v.sums);
    shift_keys(lane, v, T{-1});
    if (v.values == nullptr) return;
    const T* means = statistics_.key_means.data() + lane * this->padded_features_;
    const T* offsets = this->key_offsets(lane);
    for (int64_t f = 0; f < this->features_; ++f) {
      const T less = (offsets == nullptr ? T{0} : offsets[f]) - means[f];
      this->rows_.add_scaled(less, v.sums.row(f), stride, v.values);
    }
  }

  const Tensor& out_;
  const Gradients& gradients_;
  const RowStatistics<T>& statistics_;
  const int64_t padded_panel_;
};

}  // namespace heed::chunked
