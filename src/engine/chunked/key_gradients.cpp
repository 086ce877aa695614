// The gradients of states run against the tokens: with a, e, g of the rows (gradients.h)
//   D_{t-1} = decay (D_t + a_t phi(q_t)^T G_t),  w_{t-1} = w_t + e_t psi(q_t),  mu_{t-1} = mu_t + g_t G_t
// D_t being what token t's own key and value meet, with the queries from t on:
//   d v_j = phi(k_j) D_j + mu_j,   d phi(k_j) = D_j v_j,   d psi(k_j) = w_j
// The heads of a group meet the same keys: their gradients are summed in T before they are rounded.
#include <cstring>

#include "engine/chunked/chunk_call.h"
#include "engine/chunked/gradients.h"

namespace heed::chunked {

namespace {

template <class T>
class KeyGradients : public ChunkCall<T>, public Sweep<T> {
  using Call = ChunkCall<T>;
  using typename Call::Block;

 public:
  KeyGradients(const Problem<T>& problem, const Tensor& out, const State& last,
               const Gradients& gradients, const RowStatistics<T>& statistics,
               const RunOptions& run)
      : Call(problem, run),
        out_(out),
        last_(last),
        gradients_(gradients),
        statistics_(statistics),
        padded_panel_(round_up(this->tile_, this->products_.key_multiple)) {
    Cutter cut;
    memory(cut);
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
    shape.last_wanted = !causal || gradients_.initial.defined();
    shape.threads = threads_for(this->run_, shape.lanes * std::max(shape.chunks, shape.uses));
    shape.results = {&gradients_.k, &gradients_.v};
    Schedule<T>(shape, *this, this->products_).run();
  }

 private:
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
    return this->rows(out_, b, h, chunk.query, chunk.queries);
  }

  void load(int64_t lane, T* state) const override { this->load_state(last_, lane, state); }
  static constexpr typename Call::TotalUse kTotal{.values = true, .keys = true};

  void complete(int64_t lane, T* state) const override {
    const StateView<T> v = this->view(state);
    if (this->centred()) take_off_means(lane, v);
    if (this->makes_total()) this->complete_total(state, kTotal, v.sums);
  }
  // With the mean value and the mean features off, as a key's value and features meet D there: D as products
  // read it, and features less their offsets.
  void take_off_means(int64_t lane, const StateView<T>& v) const {
    const int64_t stride = this->padded_values_;
    const T* minus_keys = statistics_.minus_key_means.data() + lane * this->padded_features_;
    const T* minus_values = statistics_.minus_value_means.data() + lane * stride;
    const T* offsets = this->key_offsets(lane);
    Scratch scratch(static_cast<size_t>(this->features_ * stride) * sizeof(uint16_t));
    auto* rounded = scratch.take<uint16_t>(this->features_ * stride);
    const auto d = this->as_rows({v.sums.data, v.sums.stride}, this->features_, stride);
    this->rows_.pack_rows(this->round(d, rounded, stride), nullptr, v.sums);
    this->rows_.row_dots(d, {minus_values, 0}, v.keys);
    for (int64_t f = 0; f < this->features_; ++f) {
      const T minus_mean = minus_keys[f] + (offsets == nullptr ? T{0} : offsets[f]);
      this->rows_.add_scaled(minus_mean, v.sums.row(f), stride, v.values);
    }
  }
  void store(int64_t lane, const T* state) const override {
    this->store_state(state, gradients_.initial, lane);
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
    const Memory m = memory_at(memory);
    const T* num_scale = row_numbers(statistics_.num_scale, b, h, chunk);
    typename Call::Added added;
    added.x = this->queries(b, h, chunk);
    added.psi = this->for_sums(added.x, true);
    added.y = gradient_of(b, h, chunk);
    added.key_factor = row_numbers(statistics_.denominator, b, h, chunk);
    added.value_factor = row_numbers(statistics_.sum_scale, b, h, chunk);
    added.factor = num_scale;
    added.next_x = this->queries(b, h, next).rows;
    added.next_y = gradient_of(b, h, next);
    if (const auto* table = this->decays(h)) {
      const T* decays = table->rising(chunk.shift + 1);
      for (int64_t r = 0; r < chunk.queries; ++r) {
        m.factors[r] = num_scale == nullptr ? decays[r] : decays[r] * num_scale[r];
      }
      added.factor = m.factors;
    }
    this->update_state(added, this->chunk_decay(h, at.chunk), this->view(from), this->view(to),
                       m.update);
  }

  void use(int64_t group, const Turn& at, T* states, std::byte* memory) const override {
    const int64_t key_heads = this->heads_ / this->group_;
    const int64_t b = group / key_heads, key_head = group % key_heads;
    const Chunk chunk = this->chunk_of_keys(b, at.chunk);
    zero_missing(b, key_head, chunk);
    if (chunk.keys == 0) return;
    Memory m = memory_at(memory);
    this->key_ranges(chunk, m.ranges);
    const int64_t first = key_head * this->group_;
    const Source<T> k = this->keys(b, first, chunk);
    const bool polynomial = this->problem_.policy.polynomial.has_value();
    const bool one_head = this->group_ == 1, one_sum = one_head && k.map == nullptr;
    const Block key_sum{m.key_sum.data, this->padded_width_};
    if (one_sum) {
      m.features = this->in_place(gradients_.k, b, key_head, chunk.begin, chunk.keys, m.features);
    } else if (polynomial || k.map == nullptr) {
      std::fill_n(key_sum.data, this->tile_rows_ * key_sum.stride, T{0});
    }
    if (!one_head) {
      std::fill_n(m.value_sum.data, this->tile_rows_ * m.value_sum.stride, T{0});
    } else if (!polynomial) {
      m.values = this->in_place(gradients_.v, b, key_head, chunk.begin, chunk.keys, m.values);
    }
    const Operands operands = pack_keys(k, b, first, chunk, m);
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
        pull(k, m, i > 0, key_sum);
      }
    }
    this->finish(one_sum ? m.features : key_sum, gradients_.k, b, key_head, chunk.begin,
                 chunk.keys);
    if (gives_values()) return;
    this->finish(one_head ? m.values : m.value_sum, gradients_.v, b, key_head, chunk.begin,
                 chunk.keys);
  }

  // What is read after a head's part of a use: the next head's rows, or the chunk that comes then.
  ReadAhead rows_ahead(int64_t b, int64_t h, const Chunk& chunk, const Chunk& next) const {
    ReadAhead ahead;
    if ((h + 1) % this->group_ != 0) {
      ahead.add(this->queries(b, h + 1, chunk).rows);
      ahead.add(gradient_of(b, h + 1, chunk));
      return ahead;
    }
    const int64_t first = h + 1 - this->group_;
    ahead.add(this->keys(b, first, next).rows);
    ahead.add(this->values(b, first, next));
    ahead.add(this->queries(b, first, next).rows);
    ahead.add(gradient_of(b, first, next));
    return ahead;
  }

  void add_rows(Block from, int64_t rows, int64_t width, Block to) const {
    for (int64_t r = 0; r < rows; ++r) this->rows_.add_scaled(T{1}, from.row(r), width, to.row(r));
  }
  void pull(const Source<T>& k, const Memory& m, bool add, Block to) const {
    k.map->pull(k.at, k.rows, 0, this->features_, {m.features.data, m.features.stride}, add, to);
    if (!this->separate_sums()) return;
    const Source<T> psi = this->for_sums(k, false);
    psi.map->pull(psi.at, psi.rows, 0, this->features_,
                  {m.more_features.data, m.more_features.stride}, true, to);
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
    for (const Tensor* to : {&gradients_.k, &gradients_.v}) {
      const auto bytes = static_cast<size_t>(to->size(3)) * size_of(to->dtype());
      for (int64_t j = chunk.keys; j < chunk.tokens; ++j) {
        std::memset(to->at({b, key_head, chunk.begin + j}), 0, bytes);
      }
    }
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
  // Adds W Y of the chunk's own queries, or only decays where it has none.
  void add_own(int64_t b, int64_t h, const Chunk& chunk, const typename Call::Right& right,
               const Memory& m, Block o) const {
    this->weigh_and_add(m.weights, chunk.keys, chunk.queries, m.ranges, weight_factors(b, h, chunk),
                        false, right, carry(h, chunk), o, m.ahead);
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
    return this->problem_.causal && chunk.begin + chunk.tokens >= this->tokens_ && !last_.defined();
  }

  void value_part(int64_t b, int64_t h, const Chunk& chunk, const Rows& q, const Operands& operands,
                  const StateView<T>& state, const Memory& m) const {
    if (gives_values()) {
      this->products_.product(
          operands.key.data, operands.key.stride, state.as_values, this->features_,
          {nullptr, state.values, this->ones()},
          this->rows_out(gradients_.v, b, this->key_head(h), chunk.begin, chunk.keys), m.ahead);
      return;
    }
    const Rows gradient = gradient_of(b, h, chunk);
    this->zero_rows(m.values, chunk.keys, this->padded_values_);
    if (!nothing_behind(chunk)) {
      this->accumulate(operands.key, chunk.keys, this->state_values(state, m.as_values),
                       this->features_, this->value_dim_, nullptr, this->ones(), m.values, m.ahead);
    }
    if (chunk.queries > 0) {
      this->panels(q, m.query_panels);
      this->scores(operands.key, chunk.keys, m.query_panels, chunk.queries, this->features_,
                   m.ranges, m.weights.scores, m.ahead);
      add_own(b, h, chunk, this->right(gradient, m.gradients), m, m.values);
    } else if (this->decays(h) != nullptr) {
      this->rows_.scale_rows(m.values, chunk.keys, this->padded_values_, carry(h, chunk));
    }
    add_value_sums(b, h, chunk, state, m);
  }

  void add_value_sums(int64_t b, int64_t h, const Chunk& chunk, const StateView<T>& state,
                      const Memory& m) const {
    if (!this->problem_.policy.value_sum) return;
    this->rows_.pack_rows(gradient_of(b, h, chunk), nullptr, m.gradient_rows);
    std::copy_n(state.values, this->padded_values_, m.row);
    this->rows_.run_add({m.gradient_rows.data, m.gradient_rows.stride},
                        row_numbers(statistics_.sum_scale, b, h, chunk), chunk.query_tokens(),
                        m.values, nullptr, chunk.key_tokens(), this->padded_values_, true, m.row);
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
      this->panels(gradient_of(b, h, chunk), m.gradient_panels);
      this->scores(operands.value, chunk.keys, m.gradient_panels, chunk.queries, this->value_dim_,
                   m.ranges, m.weights.scores, m.ahead);
      add_own(b, h, chunk, this->right(q, m.queries), m, m.features);
    } else if (this->decays(h) != nullptr) {
      this->rows_.scale_rows(m.features, chunk.keys, this->padded_features_, carry(h, chunk));
    }
    if (!this->problem_.policy.key_sum) return;
    Block to = m.features;
    if (this->separate_sums()) {
      to = m.more_features;
      std::fill_n(to.data, this->tile_rows_ * to.stride, T{0});
    }
    const auto psi = this->sum_features(this->queries(b, h, chunk), true, q, m.query_rows);
    std::copy_n(state.keys, this->padded_features_, m.row);
    this->rows_.run_add(psi, row_numbers(statistics_.denominator, b, h, chunk),
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
    const Rows gradient = gradient_of(b, h, chunk);
    this->panels(q.rows, m.query_panels);
    this->products_.scores(operands.key.data, chunk.keys, m.query_panels, chunk.queries,
                           this->width_, m.ranges, m.scores, m.ahead);
    this->rows_.polynomial(m.scores, m.polynomial, chunk.keys, chunk.queries, m.ranges,
                           static_cast<T>(polynomial.scale), polynomial.order);
    this->weigh_and_add({m.polynomial, nullptr}, chunk.keys, chunk.queries, m.ranges,
                        weight_factors(b, h, chunk), false, this->right(gradient, m.gradients),
                        this->ones(), m.values, m.ahead);
    this->panels(gradient, m.gradient_panels);
    this->products_.scores(operands.value.data, chunk.keys, m.gradient_panels, chunk.queries,
                           this->value_dim_, m.ranges, m.weights.scores, m.ahead);
    this->rows_.chain(m.scores, {m.weights.scores.data, m.weights.scores.stride}, chunk.keys,
                      chunk.queries, m.ranges, row_numbers(statistics_.num_scale, b, h, chunk),
                      row_numbers(statistics_.denominator, b, h, chunk), true);
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
    k.map->pull(k.at, k.rows, first, features, {y.data, padded}, true, key_sum);
  }

  const Tensor& out_;
  const State& last_;
  const Gradients& gradients_;
  const RowStatistics<T>& statistics_;
  const int64_t padded_panel_;
  size_t memory_bytes_ = 0;
};

}  // namespace

template <class T>
void key_gradients(const Problem<T>& problem, const Tensor& out, const State& last,
                   const Gradients& gradients, const RowStatistics<T>& statistics,
                   const RunOptions& run) {
  KeyGradients<T>(problem, out, last, gradients, statistics, run).run();
}

template void key_gradients(const Problem<float>&, const Tensor&, const State&, const Gradients&,
                            const RowStatistics<float>&, const RunOptions&);
template void key_gradients(const Problem<double>&, const Tensor&, const State&, const Gradients&,
                            const RowStatistics<double>&, const RunOptions&);

}  // namespace heed::chunked
