// With G the gradient of out, per row: num gradient a G, denominator gradient e, where
//   G . num = phi(q) . (gradient of phi(q) for a = 1), as num is linear in phi(q),
//   e = num_slope (G . num) - sum_slope (G . vs)
// and  d phi(q_i) = a_i (sum_j decay (G_i . v_j) phi(k_j) + decay G_i S^T),  d psi(q_i) = e_i z_i.
// Slopes: slope_states.h.
#include <numeric>

#include "engine/chunked/query_operands.h"

namespace heed::chunked {

namespace {

template <class T>
class QueryGradients : public QueryOperands<T>, public Sweep<T> {
  using Call = ChunkCall<T>;
  using typename Call::Block;
  using typename QueryOperands<T>::Memory;

 public:
  QueryGradients(const Problem<T>& problem, const Tensor& out_gradient, const State& last_gradient,
                 const Gradients& gradients, RowStatistics<T>& statistics, const RunOptions& run)
      : QueryOperands<T>(problem, out_gradient, last_gradient, gradients, statistics, run),
        knows_total_(!problem.causal && has_total(problem) && !this->slopes_) {
    Cutter cut;
    this->memory(cut);
    memory_bytes_ = cut.used();
  }

  void run() {
    this->zero_unseeing_rows(this->gradients_.q);
    const bool causal = this->problem_.causal;
    SweepShape shape;
    shape.lanes = this->lanes();
    shape.chunks = knows_total_ ? 0 : this->key_chunks();
    shape.uses = causal ? shape.chunks : this->query_chunks();
    shape.rows = this->features_;
    shape.rows_unit = this->rows_unit();
    shape.size = this->total_size(kTotal) + this->slope_size();
    shape.memory = memory_bytes_;
    shape.running = causal;
    shape.last_wanted = !causal || this->reads_last_slope();
    shape.threads = threads_for(this->run_, shape.lanes * std::max(shape.chunks, shape.uses));
    if (this->problem_.policy.read_out) {
      const auto rows = static_cast<size_t>(shape.lanes * this->queries_ + 64);
      for (auto* values : {&this->statistics_.num_scale, &this->statistics_.denominator,
                           &this->statistics_.sum_scale}) {
        values->assign(rows, T{0});
      }
      if (this->gradients_.scales != nullptr) scale_parts_.assign(rows, T{0});
    }
    if (this->centred()) this->start_centres();
    this->start_slopes(shape.chunks);
    shape.results = {&this->gradients_.q};
    Schedule<T>(shape, *this, this->products_).run();
    this->finish_slopes();
    if (this->gradients_.scales != nullptr) add_scales();
  }

 private:
  static bool has_total(const Problem<T>& problem) {
    const Policy<T>& policy = problem.policy;
    const State& total = problem.total;
    return total.sums.defined() && (!policy.key_sum || total.keys.defined()) &&
           (!policy.value_sum || total.values.defined());
  }

  static constexpr typename Call::TotalUse kTotal{.keys = true};

  void complete(int64_t lane, T* state) const override {
    if (!this->makes_total()) return;
    this->complete_keys(lane, state, !knows_total_, this->kept_centre(lane, 0), kTotal);
    if (this->centred() && this->problem_.policy.value_sum)
      this->keep_means(lane, this->view(state));
  }
  void load(int64_t lane, T* state) const override {
    this->load_state(knows_total_ ? this->problem_.total : this->problem_.initial, lane, state);
    this->clear_slope(state);
  }

  void update(int64_t lane, const Turn& at, const T* from, T* to,
              std::byte* memory) const override {
    const int64_t b = lane / this->heads_, h = lane % this->heads_;
    const Memory m = this->memory_at(memory);
    this->update_slope(lane, at, from, to, m.update);
    this->add_keys(b, h, at, this->view(from), this->view(to), m.update);
  }
  void advance(int64_t lane, int64_t chunk, const FeatureRange& rows, const T* from, const T* added,
               T* to) const override {
    this->advance_slope(lane, chunk, rows, from, added, to);
    this->advance_state(lane, chunk, rows, from, added, to);
  }

  void store(int64_t lane, const T* state) const override { this->store_last_slope(lane, state); }

  void add_scales() const {
    std::vector<double>& scales = *this->gradients_.scales;
    std::fill(scales.begin(), scales.end(), 0.0);
    for (int64_t lane = 0; lane < this->lanes(); ++lane) {
      const T* rows = scale_parts_.data() + lane * this->queries_;
      scales[static_cast<size_t>(lane % this->heads_)] +=
          std::accumulate(rows, rows + this->queries_, 0.0);
    }
  }

  void use(int64_t lane, const Turn& at, T* state, std::byte* memory) const override {
    const int64_t b = lane / this->heads_, h = lane % this->heads_;
    const Chunk chunk = this->chunk_of_queries(b, at.chunk);
    if (chunk.queries == 0) return;
    Memory m = this->memory_at(memory);
    ReadAhead ahead = rows_ahead(b, h, this->chunk_of_queries(b, at.next));
    ahead.spread(this->work(chunk.queries, chunk.keys));
    m.ahead = &ahead;
    this->query_ranges(chunk, m.ranges);
    if (this->problem_.policy.polynomial) {
      use_polynomial(b, h, chunk, this->view(state), m);
      return this->finish(m.rows, this->gradients_.q, b, h, chunk.query, chunk.queries);
    }
    if (this->problem_.policy.maps.q == nullptr && !this->reads_totals()) {
      m.features = this->in_place(this->gradients_.q, b, h, chunk.query, chunk.queries, m.features);
    }
    const kernels::RowEnds<T> ends = this->reads_totals()
                                         ? use_totals(lane, chunk, this->total(state, kTotal), m)
                                         : use_linear(lane, at.chunk, chunk, state, m);
    finish_features(b, h, chunk, ends, m);
  }

  // What the use after this one reads.
  ReadAhead rows_ahead(int64_t b, int64_t h, const Chunk& next) const {
    ReadAhead ahead;
    ahead.add(this->gradient_of(b, h, next));
    ahead.add(this->values(b, h, next));
    ahead.add(this->keys(b, h, next).rows);
    if (this->problem_.policy.read_out || this->slopes_) ahead.add(this->queries(b, h, next).rows);
    return ahead;
  }

  // G v^T inside the chunk.
  void value_scores(int64_t b, int64_t h, const Chunk& chunk, const typename Call::Left& gradient,
                    Block to, const Memory& m) const {
    this->panels(this->values(b, h, chunk), m.value_panels);
    this->scores(gradient, chunk.queries, m.value_panels, chunk.keys, this->value_dim_, m.ranges,
                 to, m.ahead);
  }

  // Gradients by feature, in m.features; returns how their rows end yet.
  kernels::RowEnds<T> use_linear(int64_t lane, int64_t index, const Chunk& chunk, T* state,
                                 const Memory& m) const {
    const int64_t b = lane / this->heads_, h = lane % this->heads_;
    const StateView<T> view = this->total(state, kTotal);
    const Policy<T>& policy = this->problem_.policy;
    const Source<T> source = this->queries(b, h, chunk);
    const Rows q = this->operand(source, m.query_rows, m.query_half);
    const Rows k = this->operand(this->keys(b, h, chunk), m.key_rows, m.key_half);
    const auto gradient = this->left(this->gradient_of(b, h, chunk), this->queries_ - chunk.query,
                                     m.gradient_rows, m.gradient);
    if (this->nothing_before(chunk)) {
      this->zero_rows(m.features, chunk.queries, this->written_features());
    } else {
      this->scores(gradient, chunk.queries, this->centred_keys(lane, index, view, m),
                   this->features_, this->value_dim_, nullptr, m.features, m.ahead);
    }
    if (chunk.keys > 0) value_scores(b, h, chunk, gradient, m.weights.scores, m);
    const T* shares = this->value_shares(lane, index, chunk, m);
    if (this->slopes_) {
      this->slope_part(lane, index) = slopes_of(h, chunk, gradient, q, k, state, m);
    }
    if (chunk.keys > 0) {
      kernels::WeightFactors<T> factors;
      if (const auto* table = this->decays(h)) factors.decay = table->falling(chunk.shift);
      factors.less_of_row = shares;
      this->weigh_and_add(m.weights, chunk.queries, chunk.keys, m.ranges, factors, false,
                          this->right(k, m.keys), this->state_factors(h, chunk.shift + 1),
                          m.features, m.ahead);
    } else if (this->decays(h) != nullptr) {
      this->rows_.scale_rows(m.features, chunk.queries, this->padded_features_,
                             this->state_factors(h, chunk.shift + 1));
    }
    if (!policy.read_out) return {};
    return read_out(lane, chunk, q, k, view, m);
  }

  // Gradients by feature become those of the rows.
  void finish_features(int64_t b, int64_t h, const Chunk& chunk, const kernels::RowEnds<T>& ends,
                       const Memory& m) const {
    const Source<T> q = this->queries(b, h, chunk);
    const kernels::Block<const T> by_feature{m.features.data, m.features.stride};
    if (q.map == nullptr) {
      this->finish(m.features, this->gradients_.q, b, h, chunk.query, chunk.queries);
    } else if (!this->separate_sums()) {
      const auto to = this->rows_out(this->gradients_.q, b, h, chunk.query, chunk.queries);
      q.map->pull(q.at, q.rows, 0, this->features_, by_feature, ends, false, to);
    } else {
      const auto to = this->out_rows(m.rows, chunk.queries, this->width_);
      q.map->pull(q.at, q.rows, 0, this->features_, by_feature, ends, false, to);
      const Source<T> psi = this->for_sums(q, true);
      psi.map->pull(psi.at, psi.rows, 0, this->features_,
                    {m.more_features.data, m.more_features.stride}, {}, true, to);
      this->finish(m.rows, this->gradients_.q, b, h, chunk.query, chunk.queries);
    }
  }

  // The same as use_linear where all keys are seen.
  kernels::RowEnds<T> use_totals(int64_t lane, const Chunk& chunk, const StateView<T>& state,
                                 const Memory& m) const {
    const int64_t b = lane / this->heads_, h = lane % this->heads_, rows = chunk.queries;
    const Source<T> q = this->queries(b, h, chunk);
    const Rows gradient = this->gradient_of(b, h, chunk);
    const auto g = this->whole_rows(gradient, m.gradient_rows);
    ReadAhead ahead{this->following(q.rows), this->following(gradient),
                    this->following(this->rows(this->gradients_.q, b, h, chunk.query, rows))};
    ahead.spread(rows * this->value_dim_ * this->features_);
    this->rows_.read(g, {state.transposed.data, state.transposed.stride}, rows, this->value_dim_,
                     state.transposed.stride, {}, m.features, &ahead);
    if (!this->problem_.policy.read_out) return {};
    auto x = this->whole_features(this->for_sums(q, true), 0, this->features_, m.query_rows);
    this->total_denominators(this->as_rows(x, rows, this->features_), state, m.sums);
    if (this->separate_sums()) {
      x = this->features_after_sums(q, x, 0, this->features_, m.query_rows);
    }
    std::fill_n(m.dots, rows, T{0});
    std::fill_n(m.sum_dots, rows, T{0});
    this->rows_.row_dots(this->as_rows(x, rows, this->written_features()),
                         {m.features.data, m.features.stride}, m.dots);
    if (this->problem_.policy.value_sum) {
      this->rows_.row_dots(this->as_rows(g, rows, this->padded_values_), {state.values, 0},
                           m.sum_dots);
    }
    row_scales(lane, chunk, m, m.dots, m.sum_dots);
    return ends_of(chunk, {}, state, m);
  }

  // Minus the part of the slope's gradient that a chunk's rows give.
  double slopes_of(int64_t h, const Chunk& chunk, const typename Call::Left& gradient,
                   const Rows& q, const Rows& k, T* state, const Memory& m) const {
    const DecayTable<T>& table = *this->decays(h);
    const auto state_part = [&](Block gradients, bool distance) {
      std::fill_n(m.dots, chunk.queries, T{0});
      this->rows_.row_dots(q, {gradients.data, gradients.stride}, m.dots);
      double sum = 0;
      for (int64_t r = 0; r < chunk.queries; ++r) {
        const int64_t steps = chunk.shift + r + 1;
        const double factor =
            static_cast<double>(table.rising(steps)[0]) * static_cast<double>(distance ? steps : 1);
        if (factor != 0) sum += factor * static_cast<double>(m.dots[r]);
      }
      return sum;
    };
    double sum = state_part(m.features, true);
    this->scores(gradient, chunk.queries,
                 this->state_keys(this->slope_view(state).sums, this->features_, m.state),
                 this->features_, this->value_dim_, nullptr, m.more_features, m.ahead);
    sum += state_part(m.more_features, false);
    const auto left = this->left(q, this->queries_ - chunk.query, m.query_rows, m.query);
    this->panels(k, m.key_panels);
    this->scores(left, chunk.queries, m.key_panels, chunk.keys, this->features_, m.ranges, m.scores,
                 m.ahead);
    const Block& values = m.weights.scores;
    return sum + this->rows_.distance_sum({m.scores.data, m.scores.stride},
                                          {values.data, values.stride}, chunk.queries, m.ranges,
                                          chunk.shift, table.falling(chunk.shift));
  }

  // Scales of a row from its denominator, G . num in dots and G . vs in sum_dots. Kept for the keys.
  void row_scales(int64_t lane, const Chunk& chunk, const Memory& m, T* num_scale,
                  T* denominator) const {
    const auto first = static_cast<size_t>(lane * this->queries_ + chunk.query);
    const double scale = this->scale(lane % this->heads_);
    this->read_ends(lane / this->heads_, chunk, m.sums);
    const ReadOuts& ends = m.sums.ends;
    for (int64_t r = 0; r < chunk.queries; ++r) {
      const ReadOut row{ends.num_scale[r], ends.sum_scale[r], ends.num_slope[r], ends.sum_slope[r]};
      const auto dot = static_cast<double>(m.dots[r]), sum_dot = static_cast<double>(m.sum_dots[r]);
      const double gradient = row.num_slope * dot - row.sum_slope * sum_dot;
      const size_t i = first + static_cast<size_t>(r);
      if (this->gradients_.scales != nullptr) {
        scale_parts_[i] = static_cast<T>(row.num_scale * dot - row.sum_scale * sum_dot);
      }
      num_scale[r] = this->statistics_.num_scale[i] = static_cast<T>(scale * row.num_scale);
      denominator[r] = this->statistics_.denominator[i] = static_cast<T>(scale * gradient);
      this->statistics_.sum_scale[i] = static_cast<T>(-scale * row.sum_scale);
    }
  }

  kernels::RowEnds<T> read_out(int64_t lane, const Chunk& chunk, const Rows& q, const Rows& k,
                               const StateView<T>& state, const Memory& m) const {
    const int64_t b = lane / this->heads_, h = lane % this->heads_;
    kernels::Block<const T> keys;
    if (this->problem_.causal) {
      keys = this->running_denominators(b, h, chunk, state, q, k, m.sums);
    } else {
      this->total_denominators(q, state, m.sums);
    }
    std::fill_n(m.dots, chunk.queries, T{0});
    std::fill_n(m.sum_dots, chunk.queries, T{0});
    this->rows_.row_dots(q, {m.features.data, m.features.stride}, m.dots);
    if (this->centres_chunks()) {
      std::copy_n(this->statistics_.value_shares.data() + lane * this->queries_ + chunk.query,
                  chunk.queries, m.sum_dots);
    } else if (this->centred()) {
      const T* row = this->problem_.policy.value_sum ? state.values : this->kept_centre(lane, 0);
      this->rows_.row_dots(this->gradient_of(b, h, chunk), {row, 0}, m.sum_dots);
    } else if (this->problem_.policy.value_sum) {
      this->rows_.pack_rows(this->values(b, h, chunk), nullptr, m.value_rows);
      this->rows_.pack_rows(this->gradient_of(b, h, chunk), nullptr, m.gradient_rows);
      std::copy_n(state.values, this->padded_values_, m.sums.row);
      this->rows_.run_dots({m.value_rows.data, m.value_rows.stride}, chunk.key_tokens(),
                           {m.gradient_rows.data, m.gradient_rows.stride}, chunk.query_tokens(),
                           this->padded_values_, m.sums.row, m.sum_dots);
    }
    row_scales(lane, chunk, m, m.dots, m.sum_dots);
    return ends_of(chunk, keys, state, m);
  }

  // Gradients by feature times m.dots, and what denominators give; keys: psi of those in the chunk. Where one
  // sum is for all rows and they go through a map, that is left to it.
  kernels::RowEnds<T> ends_of(const Chunk& chunk, kernels::Block<const T> keys,
                              const StateView<T>& state, const Memory& m) const {
    const int64_t width = this->padded_features_;
    const bool mapped = this->problem_.policy.maps.q != nullptr;
    if (mapped && !this->problem_.causal && !this->separate_sums()) {
      return {m.dots, state.keys, m.sum_dots};
    }
    this->rows_.scale_rows(m.features, chunk.queries, this->written_features(), m.dots);
    Block sums = m.features;
    if (this->separate_sums()) {
      sums = m.more_features;
      std::fill_n(sums.data, chunk.queries * sums.stride, T{0});
    }
    std::copy_n(state.keys, width, m.sums.row);
    this->rows_.run_add(keys, nullptr, chunk.key_tokens(), sums, m.sum_dots, chunk.query_tokens(),
                        width, false, m.sums.row);
    return {};
  }

  // rows = a (what num gives) + e (what the denominator gives), each pulled from features first.
  void use_polynomial(int64_t b, int64_t h, const Chunk& chunk, const StateView<T>& state,
                      const Memory& m) const {
    const auto& polynomial = *this->problem_.policy.polynomial;
    const Source<T> q = this->queries(b, h, chunk), k = this->keys(b, h, chunk);
    const auto gradient = this->left(this->gradient_of(b, h, chunk), this->queries_ - chunk.query,
                                     m.gradient_rows, m.gradient);
    for (T* row : {m.sums.denominators, m.dots, m.sum_dots}) std::fill_n(row, chunk.queries, T{0});
    for (const Block& block : {m.rows, m.more_rows}) {
      std::fill_n(block.data, this->tile_rows_ * block.stride, T{0});
    }
    for (int64_t first = 0; first < this->features_ && !this->nothing_before(chunk);
         first += this->tile_) {
      state_tile(q, chunk.queries, first, gradient.data, state, m);
    }
    const Block raw{m.query_rows.data, this->padded_width_};
    if (chunk.keys > 0) {
      this->rows_.pack_rows(q.rows, nullptr, raw);
      this->panels(k.rows, m.key_panels);
      this->products_.scores(raw.data, chunk.queries, m.key_panels, chunk.keys, this->width_,
                             m.ranges, m.scores, m.ahead);
      this->rows_.polynomial(m.scores, m.sums.weights, chunk.queries, chunk.keys, m.ranges,
                             static_cast<T>(polynomial.scale), polynomial.order);
      this->add_weight_sums(m.sums.weights, chunk.queries, m.ranges, m.sums);
      value_scores(b, h, chunk, gradient, m.weights.scores, m);
      this->rows_.range_sums({m.sums.weights.data, m.sums.weights.stride},
                             {m.weights.scores.data, m.weights.scores.stride}, chunk.queries,
                             m.ranges, m.dots);
    }
    row_scales(b * this->heads_ + h, chunk, m, m.dots, m.sum_dots);
    this->rows_.scale_rows(m.rows, chunk.queries, this->padded_width_, m.dots);
    for (int64_t r = 0; r < chunk.queries; ++r) {
      this->rows_.add_scaled(m.sum_dots[r], m.more_rows.row(r), this->padded_width_, m.rows.row(r));
    }
    if (chunk.keys == 0) return;
    this->rows_.chain(m.scores, {m.weights.scores.data, m.weights.scores.stride}, chunk.queries,
                      chunk.keys, m.ranges, m.dots, m.sum_dots, false);
    this->weigh_and_add({m.scores, nullptr}, chunk.queries, chunk.keys, m.ranges, {}, true,
                        this->right(k.rows, m.keys), this->ones(), m.rows, m.ahead);
  }

  void state_tile(const Source<T>& q, int64_t count, int64_t first, const void* gradient,
                  const StateView<T>& state, const Memory& m) const {
    const int64_t features = std::min(this->tile_, this->features_ - first);
    const int64_t padded = round_up(features, this->products_.key_multiple);
    const Block x{m.query_rows.data, padded}, y{m.features.data, padded};
    this->features(q, first, features, x);
    this->add_state_denominators(x, count, first, state, m.sums);
    this->products_.scores(
        gradient, count,
        this->state_keys({state.sums.row(first), state.sums.stride}, features, m.state), features,
        this->value_dim_, nullptr, y, nullptr);
    this->rows_.row_dots(this->as_rows({x.data, padded}, count, padded), {y.data, padded}, m.dots);
    q.map->pull(q.at, q.rows, first, features, {y.data, padded}, {}, true,
                this->out_rows(m.rows, count, this->width_));
    q.map->pull(q.at, q.rows, first, features, {state.keys + first, 0}, {}, true,
                this->out_rows(m.more_rows, count, this->width_));
  }

  const bool knows_total_;
  size_t memory_bytes_ = 0;
  mutable std::vector<T> scale_parts_;  // per query
};

}  // namespace

template <class T>
void query_gradients(const Problem<T>& problem, const Tensor& out_gradient,
                     const State& last_gradient, const Gradients& gradients,
                     RowStatistics<T>& statistics, const RunOptions& run) {
  QueryGradients<T>(problem, out_gradient, last_gradient, gradients, statistics, run).run();
}

template void query_gradients(const Problem<float>&, const Tensor&, const State&, const Gradients&,
                              RowStatistics<float>&, const RunOptions&);
template void query_gradients(const Problem<double>&, const Tensor&, const State&, const Gradients&,
                              RowStatistics<double>&, const RunOptions&);

}  // namespace heed::chunked
