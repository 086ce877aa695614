// Gradients of slopes. The derivative of a state by -slope is W = sum_j (t - j) decay^(t-j) k_j^T v_j: it
// lies behind the state S in memory and runs beside it.
#pragma once
#include <cmath>
#include <vector>

#include "engine/chunked/denominators.h"
#include "engine/chunked/gradients.h"

namespace heed::chunked {

template <class T>
class SlopeStates : public Denominators<T> {
 protected:
  using Call = ChunkCall<T>;
  using typename Call::Block;

  SlopeStates(const Problem<T>& problem, const State& last_gradient, const Gradients& gradients,
              const RunOptions& run)
      : Denominators<T>(problem, run),
        slopes_(gradients.slopes != nullptr && !problem.policy.slopes.empty()),
        last_gradient_(last_gradient),
        gradients_(gradients.slopes) {}

  /// Of W; 0 where no gradient of slopes is asked for.
  int64_t slope_size() const { return slopes_ ? this->features_ * this->padded_values_ : 0; }
  bool reads_last_slope() const { return slopes_ && last_gradient_.sums.defined(); }
  template <class U>  // T or const T
  StateView<U> slope_view(U* state) const {
    if (state == nullptr) return {};
    return {{state + this->state_size(), this->padded_values_}, nullptr, nullptr};
  }

  void clear_slope(T* state) const { std::fill_n(slope_view(state).sums.data, slope_size(), T{0}); }

  void update_slope(int64_t lane, const Turn& at, const T* from, T* to,
                    const typename Call::UpdateMemory& m) const {
    if (!slopes_) return;
    const int64_t b = lane / this->heads_, h = lane % this->heads_;
    const Chunk chunk = this->chunk_of_keys(b, at.chunk);
    typename Call::Added added;
    added.x = this->keys(b, h, chunk);
    added.y = this->values(b, h, chunk);
    added.factor = this->decays(h)->falling_slope(chunk.tokens - 1);
    this->update_state(added, this->chunk_decay(h, at.chunk), slope_view(from), slope_view(to), m);
    if (from != nullptr) add_state(h, at.chunk, {0, this->features_}, from, to);
  }

  void advance_slope(int64_t lane, int64_t chunk, const FeatureRange& rows, const T* from,
                     const T* added, T* to) const {
    if (!slopes_) return;
    const int64_t h = lane % this->heads_;
    this->advance_view(rows, this->chunk_decay(h, chunk), slope_view(from), slope_view(added),
                       slope_view(to));
    add_state(h, chunk, rows, from, to);
  }

  /// Minus the parts of slopes' gradients, by lane: one of each of `chunks`, and the last state's.
  void start_slopes(int64_t chunks) {
    if (!slopes_) return;
    per_lane_ = chunks + 1;
    parts_.assign(static_cast<size_t>(this->lanes() * per_lane_), 0);
  }
  double& slope_part(int64_t lane, int64_t chunk) const {
    return parts_[static_cast<size_t>(lane * per_lane_ + chunk)];
  }
  void store_last_slope(int64_t lane, const T* state) const {
    if (!reads_last_slope()) return;
    const int64_t b = lane / this->heads_, h = lane % this->heads_;
    const kernels::Block<const T> slope = slope_view(state).sums;
    double sum = 0;
    for (int64_t f = 0; f < this->features_; ++f) {
      for (int64_t c = 0; c < this->value_dim_; ++c) {
        sum +=
            static_cast<double>(*reinterpret_cast<const T*>(last_gradient_.sums.at({b, h, f, c}))) *
            static_cast<double>(slope.row(f)[c]);
      }
    }
    slope_part(lane, per_lane_ - 1) = sum;
  }
  void finish_slopes() const {
    if (gradients_ == nullptr) return;
    std::fill(gradients_->begin(), gradients_->end(), 0.0);
    for (int64_t lane = 0; slopes_ && lane < this->lanes(); ++lane) {
      double sum = 0;
      for (int64_t c = 0; c < per_lane_; ++c) sum += slope_part(lane, c);
      (*gradients_)[static_cast<size_t>(lane % this->heads_)] -= sum;
    }
  }

  const bool slopes_;

 private:
  // W = decay(W + tokens S) + sum_j (tokens - 1 - j) decay^(tokens-1-j) k_j^T v_j: the part of S.
  void add_state(int64_t h, int64_t chunk, const FeatureRange& rows, const T* from, T* to) const {
    const auto n = static_cast<double>(this->chunk_tokens(chunk));
    const double factor = n * std::exp(-this->problem_.policy.slopes[static_cast<size_t>(h)] * n);
    this->rows_.add_scaled(static_cast<T>(factor), this->view(from).sums.row(rows.first),
                           rows.count() * this->padded_values_,
                           slope_view(to).sums.row(rows.first));
  }

  const State& last_gradient_;
  std::vector<double>* const gradients_;
  int64_t per_lane_ = 0;
  mutable std::vector<double> parts_;
};

}  // namespace heed::chunked
