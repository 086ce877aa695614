// What gradients of queries are made from: scratch, operands of a chunk, the rows m of centred calls.
#pragma once
#include <vector>

#include "engine/chunked/slope_states.h"

namespace heed::chunked {

template <class T>
class QueryOperands : public SlopeStates<T> {
 protected:
  using Call = ChunkCall<T>;
  using typename Call::Block;

  QueryOperands(const Problem<T>& problem, const Tensor& out_gradient, const State& last_gradient,
                const Gradients& gradients, RowStatistics<T>& statistics, const RunOptions& run)
      : SlopeStates<T>(problem, last_gradient, gradients, run),
        out_gradient_(out_gradient),
        gradients_(gradients),
        statistics_(statistics),
        padded_panel_(round_up(this->tile_, this->products_.key_multiple)) {
    this->centre_values();
  }

  struct Memory {
    typename Call::UpdateMemory update;
    typename Denominators<T>::Memory sums;
    typename Call::StateOperandMemory state;
    typename Call::WeightMemory weights;
    Block scores;  // of queries and keys, where weights holds those of G and values
    Block query_rows, key_rows, value_rows, gradient_rows;
    Block features, more_features;  // gradients by feature
    Block rows, more_rows;          // gradients by element of a row
    void *query, *gradient, *key_panels, *value_panels, *keys;
    KeyRange* ranges;
    T *dots, *sum_dots;
    uint16_t *query_half, *key_half;
    Block centred_state;
    ReadAhead* ahead;
  };

  Memory memory(Cutter& cut) const {
    const int64_t rows = this->tile_rows_, wide = this->padded_values_;
    const auto block = [&](int64_t width) { return Block{cut.take<T>(rows * width), width}; };
    const auto& products = this->products_;
    const int64_t operand = std::max(this->width_, this->tile_);
    Memory m;
    m.update = this->update_memory(cut);
    m.sums = this->denominator_memory(cut);
    m.state = this->state_operand_memory(cut, true);
    m.weights.scores = block(this->score_stride_);
    m.weights.rounded = this->half_ ? cut.take<uint16_t>(rows * this->score_stride_) : nullptr;
    m.scores = block(this->score_stride_);
    m.query_rows = block(std::max(this->padded_width_, padded_panel_));
    m.key_rows = block(std::max(this->padded_width_, padded_panel_));
    m.query_rows.stride = m.key_rows.stride = padded_panel_;
    m.value_rows = block(wide);
    m.gradient_rows = block(wide);
    m.features = block(padded_panel_);
    m.more_features = block(padded_panel_);
    m.rows = block(this->padded_width_);
    m.more_rows = block(this->padded_width_);
    m.query = cut.take<std::byte>(products.query_bytes(rows, operand));
    m.gradient = cut.take<std::byte>(products.query_bytes(rows, this->value_dim_));
    m.key_panels = cut.take<std::byte>(products.key_bytes(this->chunk_, operand));
    m.value_panels = cut.take<std::byte>(products.key_bytes(this->chunk_, this->value_dim_));
    m.keys = cut.take<std::byte>(products.value_bytes(this->chunk_, operand));
    m.ranges = cut.take<KeyRange>(rows);
    m.dots = cut.take<T>(rows);
    m.sum_dots = cut.take<T>(rows);
    m.query_half = this->half_memory(cut);
    m.key_half = this->half_memory(cut);
    if (centres_chunks()) m.centred_state = {cut.take<T>(this->features_ * wide), wide};
    return m;
  }
  Memory memory_at(std::byte* base) const {
    Cutter cut(base);
    return memory(cut);
  }

  Rows gradient_of(int64_t b, int64_t h, const Chunk& chunk) const {
    return this->rows(out_gradient_, b, h, chunk.query, chunk.queries);
  }

  // Totals are centred once, running states at every chunk.
  bool centres_chunks() const { return this->centred() && this->problem_.causal; }
  const void* centred_keys(int64_t lane, int64_t index, const StateView<T>& state,
                           const Memory& m) const {
    if (!centres_chunks()) return this->state_keys(state, m.state);
    this->centre_sums(state, this->centre(state, kept_centre(lane, index)), m.centred_state);
    return this->state_keys(m.centred_state, this->features_, m.state);
  }
  // What is taken off the products of G and the values of its chunk: G . m, or before there is a state the
  // mean of those that the row sees.
  const T* value_shares(int64_t lane, int64_t index, const Chunk& chunk, const Memory& m) const {
    if (!centres_chunks()) return nullptr;
    T* shares = statistics_.value_shares.data() + lane * this->queries_ + chunk.query;
    if (!this->nothing_before(chunk)) {
      this->rows_.row_dots(gradient_of(lane / this->heads_, lane % this->heads_, chunk),
                           {kept_centre(lane, index), 0}, shares);
    } else if (!gradients_.initial.defined()) {  // which is summed up with one m for all rows
      const Block& scores = m.weights.scores;
      this->rows_.range_sums({scores.data, scores.stride}, {}, chunk.queries, m.ranges, shares);
      for (int64_t r = 0; r < chunk.queries; ++r) {
        shares[r] /= static_cast<T>(std::max(1, m.ranges[r].end - m.ranges[r].begin));
      }
    }
    return shares;
  }

  // Memory for what gradients of keys read of a centred call.
  void start_centres() const {
    const int64_t lanes = this->lanes(), chunks = centres_chunks() ? this->key_chunks() : 1;
    statistics_.centres.assign(static_cast<size_t>(lanes * chunks * this->padded_values_), T{0});
    if (centres_chunks()) {
      statistics_.value_shares.assign(static_cast<size_t>(lanes * this->queries_ + 64), T{0});
    }
    if (this->problem_.policy.value_sum) {
      statistics_.key_means.resize(static_cast<size_t>(lanes * this->padded_features_));
    }
  }
  T* kept_centre(int64_t lane, int64_t chunk) const {
    if (!this->centred()) return nullptr;
    const int64_t row = centres_chunks() ? lane * this->key_chunks() + chunk : lane;
    return statistics_.centres.data() + row * this->padded_values_;
  }
  void keep_means(int64_t lane, const StateView<T>& keys) const {
    const auto share = static_cast<T>(this->centre_share());
    const auto keep = [&](const T* sums, int64_t count, std::vector<T>& means) {
      T* to = means.data() + lane * count;
      for (int64_t i = 0; i < count; ++i) to[i] = sums[i] * share;
    };
    keep(keys.values, this->padded_values_, statistics_.centres);
    keep(keys.keys, this->padded_features_, statistics_.key_means);
  }

  const Tensor& out_gradient_;
  const Gradients& gradients_;
  RowStatistics<T>& statistics_;
  const int64_t padded_panel_;
};

}  // namespace heed::chunked
