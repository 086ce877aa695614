// What forward and the gradient of queries share: states of keys and values, and denominators.
#pragma once
#include <cmath>
#include <cstring>
#include <vector>

#include "engine/chunked/chunk_call.h"

namespace heed::chunked {

template <class T>
class Denominators : public ChunkCall<T> {
 protected:
  using Call = ChunkCall<T>;
  using Call::Call;
  using typename Call::Block;

  struct Memory {
    Block query_rows, key_rows;  // features of denominators
    Block weights;               // polynomial
    T* denominators = nullptr;   // per query
    ReadOuts ends;               // per query
    T* row = nullptr;
  };
  /// Makes the call a centred one (problem.h), if its products are of bfloat16 and it has denominators.
  void centre_values() {
    const Policy<T>& policy = this->problem_.policy;
    centred_ = this->half_ && policy.key_sum && policy.slopes.empty();
  }
  bool centred() const { return centred_; }
  /// The row m of a state is centre_share() times this row: the sum of values if there is one, else what leaves
  /// the least of S in S - z m^T, written to `memory`.
  const T* centre(const StateView<T>& keys, T* memory) const;
  double centre_share() const {
    return this->problem_.policy.value_sum ? 1 / static_cast<double>(this->tokens_) : 1;
  }
  /// to = S - z m^T.
  void centre_sums(const StateView<T>& keys, const T* row, Block to) const {
    const auto share = static_cast<T>(centre_share());
    for (int64_t f = 0; f < this->features_; ++f) {
      std::copy_n(keys.sums.row(f), this->padded_values_, to.row(f));
      this->rows_.add_scaled(-keys.keys[f] * share, row, this->padded_values_, to.row(f));
    }
  }

  /// Whether the state that a chunk reads is zero.
  bool nothing_before(const Chunk& chunk) const {
    return this->problem_.causal && chunk.begin == 0 && !this->problem_.initial.defined();
  }

  Memory denominator_memory(Cutter& cut) const {
    const Policy<T>& policy = this->problem_.policy;
    const int64_t rows = this->tile_rows_, width = this->padded_features_;
    Memory m;
    m.denominators = cut.take<T>(rows);
    m.ends = {cut.take<double>(rows), cut.take<double>(rows), cut.take<double>(rows),
              cut.take<double>(rows)};
    m.row = cut.take<T>(std::max(width, this->padded_values_));
    if (policy.polynomial) {
      m.weights = {cut.take<T>(rows * this->score_stride_), this->score_stride_};
    } else if (policy.key_sum) {
      m.query_rows = {cut.take<T>(rows * width), width};
      m.key_rows = {cut.take<T>(rows * width), width};
    }
    return m;
  }

  /// Rows of the result [B,H,Lq,...] of queries that come before all keys.
  void zero_unseeing_rows(const Tensor& result) const {
    const auto bytes = static_cast<size_t>(result.size(3)) * size_of(result.dtype());
    const int64_t rows = this->first_query();
    for (int64_t lane = 0; rows > 0 && lane < this->lanes(); ++lane) {
      for (int64_t i = 0; i < rows; ++i) {
        std::memset(result.at({lane / this->heads_, lane % this->heads_, i}), 0, bytes);
      }
    }
  }

  void add_keys(int64_t b, int64_t h, const Turn& at, const StateView<const T>& from,
                const StateView<T>& to, const typename Call::UpdateMemory& m) const {
    const Chunk chunk = this->chunk_of_keys(b, at.chunk), next = this->chunk_of_keys(b, at.next);
    typename Call::Added added;
    added.x = this->keys(b, h, chunk);
    added.psi = this->for_sums(added.x, false);
    added.y = this->values(b, h, chunk);
    added.next_x = this->keys(b, h, next).rows;
    added.next_y = this->values(b, h, next);
    if (const auto* table = this->decays(h)) added.factor = table->falling(chunk.tokens - 1);
    this->update_state(added, this->chunk_decay(h, at.chunk), from, to, m);
  }

  /// The total of keys as its uses read it. `from_chunks`: as updates by chunks have left it; `row`: memory
  /// for a centre.
  void complete_keys(int64_t lane, T* state, bool from_chunks, T* row,
                     const typename Call::TotalUse& use) const {
    const StateView<T> v = this->view(state);
    if (!centred()) return this->complete_total(state, use, v.sums);
    const T* offsets = this->key_offsets(lane);
    if (from_chunks && offsets != nullptr) {
      for (int64_t f = 0; f < this->features_; ++f) {
        this->rows_.add_scaled(offsets[f], v.values, this->padded_values_, v.sums.row(f));
        v.keys[f] += static_cast<T>(this->tokens_) * offsets[f];
      }
    }
    Scratch scratch(static_cast<size_t>(this->features_ * this->padded_values_) * sizeof(T));
    const Block centred{scratch.take<T>(this->features_ * this->padded_values_),
                        this->padded_values_};
    centre_sums(v, centre(v, row), centred);
    this->complete_total(state, use, centred);
  }

  /// denominators[r] = psi(q_r) . (state + the keys of the chunk that row r sees); returns psi of the keys.
  /// q, k: phi, as operand() makes it, which is psi where that is no other.
  kernels::Block<const T> running_denominators(int64_t b, int64_t h, const Chunk& chunk,
                                               const StateView<T>& state, const Rows& q,
                                               const Rows& k, const Memory& m) const {
    const int64_t width = this->padded_features_;
    const auto x = this->sum_features(this->keys(b, h, chunk), false, k, m.key_rows);
    const auto y = this->sum_features(this->queries(b, h, chunk), true, q, m.query_rows);
    std::copy_n(state.keys, width, m.row);
    this->rows_.run_dots(x, chunk.key_tokens(), y, chunk.query_tokens(), width, m.row,
                         m.denominators);
    return x;
  }

  /// The same where rows see all keys; x: psi(q).
  void total_denominators(const Rows& x, const StateView<T>& state, const Memory& m) const {
    std::fill_n(m.denominators, x.count, T{0});
    this->rows_.row_dots(x, {state.keys, 0}, m.denominators);
  }
  /// How rows end, from their denominators.
  void read_ends(int64_t b, const Chunk& chunk, const Memory& m) const {
    this->problem_.policy.read_out(this->ending_rows(b, chunk), m.denominators, m.ends);
    if (!centred()) return;
    const double share = centre_share();
    for (int64_t r = 0; r < chunk.queries; ++r) {
      const auto den = static_cast<double>(m.denominators[r]);
      m.ends.sum_scale[r] -= m.ends.num_scale[r] * den * share;
      m.ends.sum_slope[r] -= (m.ends.num_slope[r] * den + m.ends.num_scale[r]) * share;
    }
  }

  // The two parts of a polynomial's denominators.
  void add_state_denominators(Block x, int64_t count, int64_t first, const StateView<T>& state,
                              const Memory& m) const {
    if (state.keys == nullptr) return;
    this->rows_.row_dots(this->as_rows({x.data, x.stride}, count, x.stride),
                         {state.keys + first, 0}, m.denominators);
  }
  void add_weight_sums(Block weights, int64_t count, const KeyRange* ranges,
                       const Memory& m) const {
    this->rows_.range_sums({weights.data, weights.stride}, {}, count, ranges, m.denominators);
  }

 private:
  bool centred_ = false;
};

template <class T>
const T* Denominators<T>::centre(const StateView<T>& keys, T* memory) const {
  if (this->problem_.policy.value_sum) return keys.values;
  const int64_t width = this->padded_values_;
  const auto sums = this->as_rows({keys.sums.data, keys.sums.stride}, this->features_, width);
  this->rows_.sum_rows(sums, keys.keys, memory);
  double squares = 0;
  for (int64_t f = 0; f < this->features_; ++f) {
    squares += static_cast<double>(keys.keys[f]) * static_cast<double>(keys.keys[f]);
  }
  bool finite = true;
  for (int64_t c = 0; c < width; ++c) {
    memory[c] = static_cast<T>(static_cast<double>(memory[c]) / squares);
    finite = finite && std::isfinite(memory[c]);
  }
  if (!finite) std::fill_n(memory, width, T{0});
  return memory;
}

}  // namespace heed::chunked
