#include "engine/chunked/chunk_call.h"
#include "engine/chunked/denominators.h"
#include "engine/chunked/step.h"

namespace heed::chunked {

namespace {

template <class T>
class Forward : public Denominators<T>, public Sweep<T> {
  using Call = ChunkCall<T>;
  using typename Call::Block;

 public:
  Forward(const Problem<T>& problem, const Tensor& out, const State& last, const RunOptions& run)
      : Denominators<T>(problem, run), out_(out), last_(last) {
    if (problem.policy.value_sum) this->centre_values();
    Cutter cut;
    this->memory(cut);
    memory_bytes_ = cut.used();
  }

  void run() {
    this->zero_unseeing_rows(out_);
    SweepShape shape;
    shape.lanes = this->lanes();
    shape.chunks = this->key_chunks();
    shape.uses = this->problem_.causal ? shape.chunks : this->query_chunks();
    shape.size = this->total_size(kTotal);
    shape.rows = this->features_;
    shape.rows_unit = this->rows_unit();
    shape.memory = memory_bytes_;
    shape.running = this->problem_.causal;
    shape.last_wanted = last_.defined() || !shape.running;
    shape.threads = threads_for(this->run_, shape.lanes * std::max(shape.chunks, shape.uses));
    shape.results = {&out_};
    Schedule<T>(shape, *this, this->products_).run();
  }

 private:
  struct Memory {
    typename Call::UpdateMemory update;
    typename Denominators<T>::Memory sums;
    typename Call::StateOperandMemory state;
    typename Call::WeightMemory weights;
    Block query_rows, key_rows, value_rows, out;
    void *query, *key_panels, *values;
    KeyRange* ranges;
    T *num_scale, *sum_scale;
    uint16_t *query_half, *key_half;
    ReadAhead* ahead;
  };

  Memory memory(Cutter& cut) const {
    const int64_t rows = this->tile_rows_;
    // Scores multiply features, or with a polynomial the rows themselves.
    const int64_t row_width = std::max(this->padded_width_, padded_tile());
    Memory m;
    m.update = this->update_memory(cut);
    m.sums = this->denominator_memory(cut);
    m.state = this->state_operand_memory(cut, false);
    m.weights.scores = {cut.take<T>(rows * this->score_stride_), this->score_stride_};
    m.weights.rounded = this->half_ ? cut.take<uint16_t>(rows * this->score_stride_) : nullptr;
    m.query_rows = {cut.take<T>(rows * row_width), padded_tile()};
    m.key_rows = {cut.take<T>(rows * row_width), padded_tile()};
    m.value_rows = {cut.take<T>(rows * this->padded_values_), this->padded_values_};
    m.out = {cut.take<T>(rows * this->padded_values_), this->padded_values_};
    const int64_t score_width = std::max(this->width_, this->tile_);
    m.query = cut.take<std::byte>(this->products_.query_bytes(rows, score_width));
    m.key_panels = cut.take<std::byte>(this->products_.key_bytes(this->chunk_, score_width));
    m.values = cut.take<std::byte>(this->products_.value_bytes(this->chunk_, this->value_dim_));
    m.ranges = cut.take<KeyRange>(rows);
    m.num_scale = cut.take<T>(rows);
    m.sum_scale = cut.take<T>(rows);
    m.query_half = this->half_memory(cut);
    m.key_half = this->half_memory(cut);
    return m;
  }
  // Of rows of features; denominators read all of the padding.
  int64_t padded_tile() const {
    return this->tile_ == this->features_ ? this->padded_features_ : this->tile_;
  }
  Memory memory_at(std::byte* base) const {
    Cutter cut(base);
    return memory(cut);
  }

  static constexpr typename Call::TotalUse kTotal{.values = true};

  void load(int64_t lane, T* state) const override {
    this->load_state(this->problem_.initial, lane, state);
  }
  void complete(int64_t lane, T* state) const override {
    if (this->makes_total()) this->complete_keys(lane, state, true, nullptr, kTotal);
  }
  void store(int64_t lane, const T* state) const override { this->store_state(state, last_, lane); }
  void update(int64_t lane, const Turn& at, const T* from, T* to,
              std::byte* memory) const override {
    const int64_t b = lane / this->heads_, h = lane % this->heads_;
    this->add_keys(b, h, at, this->view(from), this->view(to), memory_at(memory).update);
  }
  void advance(int64_t lane, int64_t chunk, const FeatureRange& rows, const T* from, const T* added,
               T* to) const override {
    this->advance_state(lane, chunk, rows, from, added, to);
  }

  void use(int64_t lane, const Turn& at, T* state, std::byte* memory) const override {
    const int64_t b = lane / this->heads_, h = lane % this->heads_;
    const Chunk chunk = this->chunk_of_queries(b, at.chunk);
    if (chunk.queries == 0) return;
    Memory m = memory_at(memory);
    const StateView<T> view = this->total(state, kTotal);
    if (this->reads_totals()) return read_totals(b, h, chunk, view, m);
    const Chunk next = this->chunk_of_queries(b, at.next);
    ReadAhead ahead{this->queries(b, h, next).rows, this->keys(b, h, next).rows,
                    this->values(b, h, next)};
    ahead.spread(this->work(chunk.queries, chunk.keys));
    m.ahead = &ahead;
    if (this->multiplies_totals()) return multiply_totals(b, h, chunk, view, m);
    std::fill_n(m.out.data, this->tile_rows_ * m.out.stride, T{0});
    this->query_ranges(chunk, m.ranges);
    if (this->problem_.policy.polynomial) {
      read_polynomial(b, h, chunk, view, m);
    } else {
      read_linear(b, h, chunk, view, m);
    }
    finish(b, h, chunk, view, m);
  }

  // Rows that see all keys: one product, which ends them on the way.
  void read_totals(int64_t b, int64_t h, const Chunk& chunk, const StateView<T>& state,
                   const Memory& m) const {
    const Policy<T>& policy = this->problem_.policy;
    const Source<T> q = this->queries(b, h, chunk);
    kernels::Block<const T> x;
    kernels::RowEnds<T> ends;
    if (policy.read_out) {
      x = this->whole_features(this->for_sums(q, true), 0, this->features_, m.query_rows);
      this->total_denominators(this->as_rows(x, chunk.queries, this->features_), state, m.sums);
      ends = row_ends(b, h, chunk, state, m);
    }
    if (!policy.read_out || this->separate_sums()) {
      x = this->features_after_sums(q, x, 0, this->features_, m.query_rows);
    }
    std::byte* out = out_.at({b, h, chunk.query});
    const Rows result = this->rows(out_, b, h, chunk.query, chunk.queries);
    const bool whole =
        out_.dtype() == wide_type(out_.dtype()) && this->value_dim_ == this->padded_values_;
    const Block to = whole ? Block{reinterpret_cast<T*>(out), out_.stride(2)} : m.out;
    ReadAhead ahead{this->following(q.rows), this->following(result)};
    ahead.spread(chunk.queries * this->features_ * this->value_dim_);
    this->rows_.read(x, {state.sums.data, state.sums.stride}, chunk.queries, this->features_,
                     this->padded_values_, ends, to, &ahead);
    if (whole) return;
    this->wide_.finish(to, chunk.queries, this->value_dim_, nullptr, out, out_.dtype(),
                       out_.stride(2));
  }

  // The same of bfloat16 rows.
  void multiply_totals(int64_t b, int64_t h, const Chunk& chunk, const StateView<T>& state,
                       const Memory& m) const {
    const Rows q = this->operand(this->queries(b, h, chunk), m.query_rows, m.query_half);
    const auto left = this->left(q, this->queries_ - chunk.query, m.query_rows, m.query);
    kernels::RowEnds<T> ends;
    if (this->problem_.policy.read_out) {
      this->total_denominators(q, state, m.sums);
      ends = row_ends(b, h, chunk, state, m);
    }
    this->products_.product(left.data, left.stride, state.as_values, this->features_, ends,
                            this->rows_out(out_, b, h, chunk.query, chunk.queries), m.ahead);
  }

  kernels::RowEnds<T> row_ends(int64_t b, int64_t h, const Chunk& chunk, const StateView<T>& state,
                               const Memory& m) const {
    this->read_ends(b, chunk, m.sums);
    const ReadOuts& ends = m.sums.ends;
    const double scale = this->scale(h);
    scaled(ends.num_scale, chunk.queries, scale, m.num_scale);
    if (!this->problem_.policy.value_sum) return {m.num_scale, nullptr, nullptr};
    scaled(ends.sum_scale, chunk.queries, -scale, m.sum_scale);
    return {m.num_scale, state.values, m.sum_scale};
  }
  static void scaled(const double* from, int64_t count, double factor, T* to) {
    for (int64_t r = 0; r < count; ++r) to[r] = static_cast<T>(factor * from[r]);
  }

  void read_linear(int64_t b, int64_t h, const Chunk& chunk, const StateView<T>& state,
                   const Memory& m) const {
    const Rows q = this->operand(this->queries(b, h, chunk), m.query_rows, m.query_half);
    const Rows k = this->operand(this->keys(b, h, chunk), m.key_rows, m.key_half);
    const auto left = this->left(q, this->queries_ - chunk.query, m.query_rows, m.query);
    if (!this->nothing_before(chunk)) {
      this->accumulate(left, chunk.queries, this->state_values(state, m.state), this->features_,
                       this->value_dim_, nullptr, this->ones(), m.out, m.ahead);
    }
    if (this->problem_.policy.key_sum) {
      if (this->problem_.causal) {
        this->running_denominators(b, h, chunk, state, q, k, m.sums);
      } else {
        this->total_denominators(q, state, m.sums);
      }
    }
    if (chunk.keys == 0) {
      if (this->decays(h) != nullptr) {
        this->rows_.scale_rows(m.out, chunk.queries, this->padded_values_,
                               this->state_factors(h, chunk.shift + 1));
      }
      return;
    }
    this->panels(k, m.key_panels);
    this->scores(left, chunk.queries, m.key_panels, chunk.keys, this->features_, m.ranges,
                 m.weights.scores, m.ahead);
    kernels::WeightFactors<T> factors;
    if (const auto* table = this->decays(h)) factors.decay = table->falling(chunk.shift);
    this->weigh_and_add(m.weights, chunk.queries, chunk.keys, m.ranges, factors, false,
                        this->right(this->values(b, h, chunk), m.values),
                        this->state_factors(h, chunk.shift + 1), m.out, m.ahead);
  }

  void read_polynomial(int64_t b, int64_t h, const Chunk& chunk, const StateView<T>& state,
                       const Memory& m) const {
    const auto& polynomial = *this->problem_.policy.polynomial;
    const Source<T> q = this->queries(b, h, chunk), k = this->keys(b, h, chunk);
    std::fill_n(m.sums.denominators, this->tile_rows_, T{0});
    for (int64_t first = 0; first < this->features_ && !this->nothing_before(chunk);
         first += this->tile_) {
      const int64_t count = std::min(this->tile_, this->features_ - first);
      const Block x{m.query_rows.data, round_up(count, this->products_.dim_multiple)};
      this->features(q, first, count, x);
      this->products_.accumulate(x.data, x.stride, chunk.queries, state.sums.row(first), count,
                                 this->value_dim_, nullptr, this->ones(), m.out, nullptr);
      this->add_state_denominators(x, chunk.queries, first, state, m.sums);
    }
    if (chunk.keys == 0) return;
    const Block raw{m.query_rows.data, this->padded_width_};
    this->rows_.pack_rows(q.rows, nullptr, raw);
    this->panels(k.rows, m.key_panels);
    this->products_.scores(raw.data, chunk.queries, m.key_panels, chunk.keys, this->width_,
                           m.ranges, m.weights.scores, m.ahead);
    this->rows_.polynomial(m.weights.scores, m.sums.weights, chunk.queries, chunk.keys, m.ranges,
                           static_cast<T>(polynomial.scale), polynomial.order);
    this->add_weight_sums(m.sums.weights, chunk.queries, m.ranges, m.sums);
    this->weigh_and_add({m.sums.weights, nullptr}, chunk.queries, chunk.keys, m.ranges, {}, true,
                        this->right(this->values(b, h, chunk), m.values), this->ones(), m.out,
                        m.ahead);
  }

  void finish(int64_t b, int64_t h, const Chunk& chunk, const StateView<T>& state,
              const Memory& m) const {
    const Policy<T>& policy = this->problem_.policy;
    const T* factor = nullptr;
    if (policy.read_out) factor = row_ends(b, h, chunk, state, m).factor;
    if (policy.value_sum) {  // and so read_out
      this->rows_.scale_rows(m.out, chunk.queries, this->padded_values_, factor);
      factor = nullptr;
      this->rows_.pack_rows(this->values(b, h, chunk), nullptr, m.value_rows);
      std::copy_n(state.values, this->padded_values_, m.sums.row);
      this->rows_.run_add({m.value_rows.data, m.value_rows.stride}, nullptr, chunk.key_tokens(),
                          m.out, m.sum_scale, chunk.query_tokens(), this->padded_values_, false,
                          m.sums.row);
    }
    this->wide_.finish(m.out, chunk.queries, this->value_dim_, factor, out_.at({b, h, chunk.query}),
                       out_.dtype(), out_.stride(2));
  }

  const Tensor& out_;
  const State& last_;
  size_t memory_bytes_ = 0;
};

}  // namespace

template <class T>
void forward(const Problem<T>& problem, const Tensor& out, const State& last,
             const RunOptions& given) {
  const RunOptions run = worth_waking(problem, given);
  if (can_step(problem, last)) {
    step(problem, out, last, run);
  } else {
    Forward<T>(problem, out, last, run).run();
  }
}

template void forward(const Problem<float>&, const Tensor&, const State&, const RunOptions&);
template void forward(const Problem<double>&, const Tensor&, const State&, const RunOptions&);

}  // namespace heed::chunked
