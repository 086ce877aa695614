// The gradients of states run against the tokens: with a, e, g of the rows (gradients.h)
//   D_{t-1} = decay (D_t + a_t phi(q_t)^T G_t),  w_{t-1} = w_t + e_t psi(q_t),  mu_{t-1} = mu_t + g_t G_t
// D_t being what token t's own key and value meet, with the queries from t on:
//   d v_j = phi(k_j) D_j + mu_j,   d phi(k_j) = D_j v_j,   d psi(k_j) = w_j
// The heads of a group meet the same keys: their gradients are summed in T before they are rounded.
#include <cstring>

#include "engine/chunked/key_operands.h"

namespace heed::chunked {

namespace {

template <class T>
class KeyGradients : public KeyOperands<T>, public Sweep<T> {
  using Call = ChunkCall<T>;
  using typename Call::Block;
  using typename KeyOperands<T>::Memory;
  using typename KeyOperands<T>::Operands;

 public:
  KeyGradients(const Problem<T>& problem, const Tensor& out_gradient, const State& last_gradient,
               const Gradients& gradients, const RowStatistics<T>& statistics,
               const RunOptions& run)
      : KeyOperands<T>(problem, out_gradient, gradients, statistics, run),
        last_gradient_(last_gradient) {
    Cutter cut;
    this->memory(cut);
    memory_bytes_ = cut.used();
  }

  void run() {
    if (this->heads_ == 0) return zero_all();
    const bool causal = this->problem_.causal;
    SweepShape shape;
    shape.lanes = this->lanes();
    shape.lanes_per_group = this->group_;
    shape.chunks = causal ? this->key_chunks() : this->query_chunks();
    shape.uses = causal ? shape.chunks : this->key_chunks();
    shape.size = this->total_size(kTotal);
    shape.rows = this->features_;
    shape.rows_unit = this->rows_unit();
    shape.memory = memory_bytes_;
    shape.running = causal;
    shape.reverse = causal;
    shape.last_wanted = !causal || this->gradients_.initial.defined();
    shape.threads = threads_for(this->run_, shape.lanes * std::max(shape.chunks, shape.uses));
    shape.results = {&this->gradients_.k, &this->gradients_.v};
    Schedule<T>(shape, *this, this->products_).run();
  }

 private:
  void load(int64_t lane, T* state) const override {
    this->load_state(last_gradient_, lane, state);
    const StateView<T> v = this->view(state);
    if (centres_total()) shift_total(T{1}, lane, v);
  }
  static constexpr typename Call::TotalUse kTotal{.values = true, .keys = true};

  void complete(int64_t lane, T* state) const override {
    const StateView<T> v = this->view(state);
    if (!this->makes_total()) return;
    if (centres_total() && this->gradients_.initial.defined()) {
      shift_total(T{-1}, lane, v);
      this->store_state(state, this->gradients_.initial, lane);
      shift_total(T{1}, lane, v);
    }
    if (this->centred()) this->centre_total(lane, v);
    this->complete_total(state, kTotal, v.sums);
  }
  void store(int64_t lane, const T* state) const override {
    if (!centres_total()) this->store_state(state, this->gradients_.initial, lane);
  }
  // Whether a total is made for values less m: its w differs by D m from that of the tensors of a caller.
  bool centres_total() const {
    return this->centred() && this->makes_total() && !this->problem_.policy.value_sum;
  }
  void shift_total(T sign, int64_t lane, const StateView<T>& v) const {
    std::vector<T> memory(static_cast<size_t>(this->padded_features_));
    this->shift_keys(sign, this->sums_rows(v.sums), this->centre(lane, 0), memory.data(), v.keys);
  }

  void advance(int64_t lane, int64_t chunk, const FeatureRange& rows, const T* from, const T* added,
               T* to) const override {
    this->advance_state(lane, chunk, rows, from, added, to);
  }

  void update(int64_t lane, const Turn& at, const T* from, T* to,
              std::byte* memory) const override {
    const int64_t b = lane / this->heads_, h = lane % this->heads_;
    const Chunk chunk = this->chunk_of_queries(b, at.chunk),
                next = this->chunk_of_queries(b, at.next);
    const Memory m = this->memory_at(memory);
    const T* num_scale = this->row_numbers(this->statistics_.num_scale, b, h, chunk);
    typename Call::Added added;
    added.x = this->queries(b, h, chunk);
    added.psi = this->for_sums(added.x, true);
    added.y = this->gradient_of(b, h, chunk);
    added.key_factor = this->row_numbers(this->statistics_.denominator, b, h, chunk);
    added.value_factor = this->row_numbers(this->statistics_.sum_scale, b, h, chunk);
    added.factor = num_scale;
    added.next_x = this->queries(b, h, next).rows;
    added.next_y = this->gradient_of(b, h, next);
    if (const auto* table = this->decays(h)) {
      const T* decays = table->rising(chunk.shift + 1);
      for (int64_t r = 0; r < chunk.queries; ++r) {
        m.factors[r] = num_scale == nullptr ? decays[r] : decays[r] * num_scale[r];
      }
      added.factor = m.factors;
    }
    this->update_state(added, this->chunk_decay(h, at.chunk), this->view(from), this->view(to),
                       m.update);
    if (!this->centres_chunks()) return;
    this->shift_keys(T{-1}, this->sums_rows(m.update.sums), this->centre(lane, at.chunk),
                     m.update.row, this->view(to).keys);
  }

  void use(int64_t group, const Turn& at, T* states, std::byte* memory) const override {
    const int64_t key_heads = this->heads_ / this->group_;
    const int64_t b = group / key_heads, key_head = group % key_heads;
    const Chunk chunk = this->chunk_of_keys(b, at.chunk);
    zero_missing(b, key_head, chunk);
    if (chunk.keys == 0) return;
    Memory m = this->memory_at(memory);
    this->key_ranges(chunk, m.ranges);
    const int64_t first = key_head * this->group_;
    const Source<T> k = this->keys(b, first, chunk);
    const bool polynomial = this->problem_.policy.polynomial.has_value();
    const bool one_head = this->group_ == 1, one_sum = one_head && k.map == nullptr;
    const Block key_sum{m.key_sum.data, this->padded_width_};
    if (one_sum) {
      m.features =
          this->in_place(this->gradients_.k, b, key_head, chunk.begin, chunk.keys, m.features);
    } else if (polynomial || k.map == nullptr) {
      std::fill_n(key_sum.data, this->tile_rows_ * key_sum.stride, T{0});
    }
    if (!one_head) {
      std::fill_n(m.value_sum.data, this->tile_rows_ * m.value_sum.stride, T{0});
    } else if (!polynomial) {
      m.values = this->in_place(this->gradients_.v, b, key_head, chunk.begin, chunk.keys, m.values);
    }
    const Operands operands = this->pack_keys(k, b, first, chunk, m);
    for (int64_t i = 0; i < this->group_; ++i) {
      const StateView<T> state = this->total(states + i * this->total_size(kTotal), kTotal);
      ReadAhead ahead = rows_ahead(b, first + i, chunk, this->chunk_of_keys(b, at.next));
      ahead.spread(this->work(chunk.keys, chunk.queries));
      m.ahead = &ahead;
      if (polynomial) {
        use_polynomial(b, first + i, chunk, operands, state, key_sum, m);
      } else if (this->reads_totals()) {
        read_totals(chunk.keys, operands, state, m);
      } else {
        const Rows q =
            this->operand(this->queries(b, first + i, chunk), m.query_rows, m.query_half);
        value_part(b, first + i, chunk, q, operands, state, m);
        key_part(b, first + i, chunk, q, operands, state, m);
      }
      if (!one_head) add_rows(m.values, chunk.keys, this->padded_values_, m.value_sum);
      if (polynomial || one_sum) continue;
      if (k.map == nullptr) {
        add_rows(m.features, chunk.keys, this->padded_width_, key_sum);
      } else {
        pull(k, state, m, i > 0,
             pulls_in_place()
                 ? this->rows_out(this->gradients_.k, b, key_head, chunk.begin, chunk.keys)
                 : this->out_rows(key_sum, chunk.keys, this->width_));
      }
    }
    if (!pulls_in_place()) {
      this->finish(one_sum ? m.features : key_sum, this->gradients_.k, b, key_head, chunk.begin,
                   chunk.keys);
    }
    if (gives_values()) return;
    this->finish(one_head ? m.values : m.value_sum, this->gradients_.v, b, key_head, chunk.begin,
                 chunk.keys);
  }

  // What is read after a head's part of a use: the next head's rows, or the chunk that comes then.
  ReadAhead rows_ahead(int64_t b, int64_t h, const Chunk& chunk, const Chunk& next) const {
    ReadAhead ahead;
    if ((h + 1) % this->group_ != 0) {
      ahead.add(this->queries(b, h + 1, chunk).rows);
      ahead.add(this->gradient_of(b, h + 1, chunk));
      return ahead;
    }
    const int64_t first = h + 1 - this->group_;
    ahead.add(this->keys(b, first, next).rows);
    ahead.add(this->values(b, first, next));
    ahead.add(this->queries(b, first, next).rows);
    ahead.add(this->gradient_of(b, first, next));
    return ahead;
  }

  void add_rows(Block from, int64_t rows, int64_t width, Block to) const {
    for (int64_t r = 0; r < rows; ++r) this->rows_.add_scaled(T{1}, from.row(r), width, to.row(r));
  }
  // Whether a map gives gradients of keys as they stay.
  bool pulls_in_place() const {
    const Policy<T>& policy = this->problem_.policy;
    return policy.maps.k != nullptr && !policy.polynomial && this->group_ == 1 &&
           !this->separate_sums();
  }
  // What the sum of keys gives to all rows of a half total alike is left to the map.
  bool map_adds_keys() const {
    return this->half_ && this->makes_total() && this->problem_.policy.key_sum &&
           this->problem_.policy.maps.k != nullptr && !this->separate_sums();
  }
  void pull(const Source<T>& k, const StateView<T>& state, const Memory& m, bool add,
            const kernels::RowsOut& to) const {
    kernels::RowEnds<T> ends;
    if (map_adds_keys()) ends.added = state.keys;
    k.map->pull(k.at, k.rows, 0, this->features_, {m.features.data, m.features.stride}, ends, add,
                to);
    if (!this->separate_sums()) return;
    const Source<T> psi = this->for_sums(k, false);
    psi.map->pull(psi.at, psi.rows, 0, this->features_,
                  {m.more_features.data, m.more_features.stride}, {}, true, to);
  }
  // Keys that no query head reads.
  void zero_all() const {
    for (int64_t b = 0; b < this->batch_; ++b) {
      for (int64_t h = 0; h < this->problem_.k.size(1); ++h) {
        zero_missing(b, h, {.tokens = this->tokens_});
      }
    }
  }
  // Keys at and after the end of a sequence.
  void zero_missing(int64_t b, int64_t key_head, const Chunk& chunk) const {
    for (const Tensor* to : {&this->gradients_.k, &this->gradients_.v}) {
      const auto bytes = static_cast<size_t>(to->size(3)) * size_of(to->dtype());
      for (int64_t j = chunk.keys; j < chunk.tokens; ++j) {
        std::memset(to->at({b, key_head, chunk.begin + j}), 0, bytes);
      }
    }
  }

  // Adds W Y of the chunk's own queries, or only decays where it has none.
  void add_own(int64_t b, int64_t h, const Chunk& chunk, const typename Call::Right& right,
               const T* less, const Memory& m, Block o) const {
    auto factors = this->weight_factors(b, h, chunk);
    factors.less_of_column = less;
    this->weigh_and_add(m.weights, chunk.keys, chunk.queries, m.ranges, factors, false, right,
                        this->carry(h, chunk), o, m.ahead);
  }

  // Keys that all queries see.
  void read_totals(int64_t count, const Operands& operands, const StateView<T>& state,
                   const Memory& m) const {
    const kernels::Block<const T> x{static_cast<const T*>(operands.key.data), operands.key.stride};
    const kernels::Block<const T> y{static_cast<const T*>(operands.value.data),
                                    operands.value.stride};
    const kernels::Block<const T> transposed{state.transposed.data, state.transposed.stride};
    const kernels::RowEnds<T> with_keys{nullptr, state.keys, this->ones()};
    const auto own_keys = this->separate_sums() ? kernels::RowEnds<T>{} : with_keys;
    ReadAhead ahead = operands.ahead;
    ahead.spread(2 * count * this->features_ * this->value_dim_);
    this->rows_.read(x, {state.sums.data, state.sums.stride}, count, this->features_,
                     this->padded_values_, {nullptr, state.values, this->ones()}, m.values, &ahead);
    this->rows_.read(y, transposed, count, this->value_dim_, transposed.stride, own_keys,
                     m.features, &ahead);
    if (!this->separate_sums()) return;
    this->rows_.read(y, transposed, count, 0, transposed.stride, with_keys, m.more_features,
                     nullptr);
  }

  // Whether one product makes the gradients of values where they go.
  bool gives_values() const { return this->multiplies_totals() && this->group_ == 1; }

  // Whether the gradient of the state behind a chunk is zero.
  bool nothing_behind(const Chunk& chunk) const {
    return this->problem_.causal && chunk.begin + chunk.tokens >= this->tokens_ &&
           !last_gradient_.defined();
  }

  void value_part(int64_t b, int64_t h, const Chunk& chunk, const Rows& q, const Operands& operands,
                  const StateView<T>& state, const Memory& m) const {
    if (gives_values()) {
      this->products_.product(
          operands.key.data, operands.key.stride, state.as_values, this->features_,
          {nullptr, state.values, this->ones()},
          this->rows_out(this->gradients_.v, b, this->key_head(h), chunk.begin, chunk.keys),
          m.ahead);
      return;
    }
    const Rows gradient = this->gradient_of(b, h, chunk);
    this->zero_rows(m.values, chunk.keys, this->padded_values_);
    if (!nothing_behind(chunk)) {
      this->accumulate(operands.key, chunk.keys, this->state_values(state, m.as_values),
                       this->features_, this->value_dim_, nullptr, this->ones(), m.values, m.ahead);
    }
    if (chunk.queries > 0) {
      this->panels(q, m.query_panels);
      this->scores(operands.key, chunk.keys, m.query_panels, chunk.queries, this->features_,
                   m.ranges, m.weights.scores, m.ahead);
      add_own(b, h, chunk, this->right(gradient, m.gradients), nullptr, m, m.values);
    } else if (this->decays(h) != nullptr) {
      this->rows_.scale_rows(m.values, chunk.keys, this->padded_values_, this->carry(h, chunk));
    }
    add_value_sums(b, h, chunk, state, m);
  }

  void add_value_sums(int64_t b, int64_t h, const Chunk& chunk, const StateView<T>& state,
                      const Memory& m) const {
    if (!this->problem_.policy.value_sum) return;
    this->rows_.pack_rows(this->gradient_of(b, h, chunk), nullptr, m.gradient_rows);
    std::copy_n(state.values, this->padded_values_, m.row);
    this->rows_.run_add({m.gradient_rows.data, m.gradient_rows.stride},
                        this->row_numbers(this->statistics_.sum_scale, b, h, chunk),
                        chunk.query_tokens(), m.values, nullptr, chunk.key_tokens(),
                        this->padded_values_, true, m.row);
  }

  void key_part(int64_t b, int64_t h, const Chunk& chunk, const Rows& q, const Operands& operands,
                const StateView<T>& state, const Memory& m) const {
    if (nothing_behind(chunk)) {
      this->zero_rows(m.features, chunk.keys, this->written_features());
    } else {
      this->scores(operands.value, chunk.keys, this->state_keys(state, m.as_keys), this->features_,
                   this->value_dim_, nullptr, m.features, m.ahead);
    }
    if (chunk.queries > 0) {
      this->panels(this->gradient_of(b, h, chunk), m.gradient_panels);
      this->scores(operands.value, chunk.keys, m.gradient_panels, chunk.queries, this->value_dim_,
                   m.ranges, m.weights.scores, m.ahead);
      add_own(b, h, chunk, this->right(q, m.queries),
              this->row_numbers(this->statistics_.value_shares, b, h, chunk), m, m.features);
    } else if (this->decays(h) != nullptr) {
      this->rows_.scale_rows(m.features, chunk.keys, this->padded_features_, this->carry(h, chunk));
    }
    if (!this->problem_.policy.key_sum || map_adds_keys()) return;
    Block to = m.features;
    if (this->separate_sums()) {
      to = m.more_features;
      std::fill_n(to.data, this->tile_rows_ * to.stride, T{0});
    }
    const auto psi = this->sum_features(this->queries(b, h, chunk), true, q, m.query_rows);
    std::copy_n(state.keys, this->padded_features_, m.row);
    if (this->centres_chunks() && !nothing_behind(chunk)) {
      this->settle_keys(b * this->heads_ + h, chunk, state.sums, m, m.row);
    }
    this->rows_.run_add(psi, this->row_numbers(this->statistics_.denominator, b, h, chunk),
                        chunk.query_tokens(), to, nullptr, chunk.key_tokens(),
                        this->padded_features_, true, m.row);
  }

  void use_polynomial(int64_t b, int64_t h, const Chunk& chunk, const Operands& operands,
                      const StateView<T>& state, Block key_sum, const Memory& m) const {
    std::fill_n(m.values.data, this->tile_rows_ * m.values.stride, T{0});
    for (int64_t first = 0; first < this->features_ && !nothing_behind(chunk);
         first += this->tile_) {
      state_tile(chunk.keys, first, operands, state, key_sum, m);
    }
    if (chunk.queries == 0) return;
    const auto& polynomial = *this->problem_.policy.polynomial;
    const Source<T> q = this->queries(b, h, chunk);
    const Rows gradient = this->gradient_of(b, h, chunk);
    this->panels(q.rows, m.query_panels);
    this->products_.scores(operands.key.data, chunk.keys, m.query_panels, chunk.queries,
                           this->width_, m.ranges, m.scores, m.ahead);
    this->rows_.polynomial(m.scores, m.polynomial, chunk.keys, chunk.queries, m.ranges,
                           static_cast<T>(polynomial.scale), polynomial.order);
    this->weigh_and_add({m.polynomial, nullptr}, chunk.keys, chunk.queries, m.ranges,
                        this->weight_factors(b, h, chunk), false,
                        this->right(gradient, m.gradients), this->ones(), m.values, m.ahead);
    this->panels(gradient, m.gradient_panels);
    this->products_.scores(operands.value.data, chunk.keys, m.gradient_panels, chunk.queries,
                           this->value_dim_, m.ranges, m.weights.scores, m.ahead);
    this->rows_.chain(m.scores, {m.weights.scores.data, m.weights.scores.stride}, chunk.keys,
                      chunk.queries, m.ranges,
                      this->row_numbers(this->statistics_.num_scale, b, h, chunk),
                      this->row_numbers(this->statistics_.denominator, b, h, chunk), true);
    this->weigh_and_add({m.scores, nullptr}, chunk.keys, chunk.queries, m.ranges, {}, true,
                        this->right(q.rows, m.queries), this->ones(), key_sum, m.ahead);
  }

  void state_tile(int64_t count, int64_t first, const Operands& operands, const StateView<T>& state,
                  Block key_sum, const Memory& m) const {
    const int64_t features = std::min(this->tile_, this->features_ - first);
    const int64_t padded = round_up(features, this->products_.key_multiple);
    const Block x{m.key_rows.data, padded}, y{m.features.data, padded};
    const Block sums{state.sums.row(first), state.sums.stride};
    const Source<T>& k = operands.k;
    this->features(k, first, features, x);
    this->products_.accumulate(x.data, padded, count,
                               this->state_values(sums, features, m.as_values), features,
                               this->value_dim_, nullptr, this->ones(), m.values, nullptr);
    this->products_.scores(operands.value.data, count, this->state_keys(sums, features, m.as_keys),
                           features, this->value_dim_, nullptr, y, nullptr);
    std::copy_n(state.keys + first, padded, m.row);
    this->rows_.run_add({}, nullptr, {}, y, nullptr, {0, count}, padded, false, m.row);
    k.map->pull(k.at, k.rows, first, features, {y.data, padded}, {}, true,
                this->out_rows(key_sum, count, this->width_));
  }

  const State& last_gradient_;
  size_t memory_bytes_ = 0;
};

}  // namespace

template <class T>
void key_gradients(const Problem<T>& problem, const Tensor& out_gradient,
                   const State& last_gradient, const Gradients& gradients,
                   const RowStatistics<T>& statistics, const RunOptions& run) {
  KeyGradients<T>(problem, out_gradient, last_gradient, gradients, statistics, run).run();
}

template void key_gradients(const Problem<float>&, const Tensor&, const State&, const Gradients&,
                            const RowStatistics<float>&, const RunOptions&);
template void key_gradients(const Problem<double>&, const Tensor&, const State&, const Gradients&,
                            const RowStatistics<double>&, const RunOptions&);

}  // namespace heed::chunked
