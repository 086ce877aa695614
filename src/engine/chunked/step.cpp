#include "engine/chunked/step.h"

#include <algorithm>
#include <functional>
#include <vector>

#include "engine/chunked/chunk_call.h"

namespace heed::chunked {

namespace {

template <class T>
class Step : public ChunkCall<T> {
  using Call = ChunkCall<T>;
  using typename Call::Block;

 public:
  Step(const Problem<T>& problem, const Tensor& out, const State& last, const RunOptions& run)
      : Call(problem, run, false), out_(out), last_(last) {}

  void run() {
    const int64_t lanes = this->lanes();
    if (this->problem_.policy.key_sum) {
      denominators_.resize(static_cast<size_t>(lanes));
      for_items(lanes, [&](int64_t lane, const Memory& m) { sum_keys(lane, m); });
    }
    // Columns of a state are independent: a few heads share the threads by columns.
    const bool few = lanes < 2 * threads_for(this->run_, 16 * lanes);
    const int64_t columns = few ? std::min(kColumns, this->value_dim_) : this->value_dim_;
    const int64_t cuts = ceil_div(this->value_dim_, columns);
    for_items(lanes * cuts, [&](int64_t item, const Memory& m) {
      const int64_t begin = item % cuts * columns;
      run_columns(item / cuts, begin, std::min(begin + columns, this->value_dim_), m);
    });
  }

 private:
  static constexpr int64_t kColumns = 64;

  struct Memory {
    Block q, k, v, o;
    T *sum, *result;
  };
  Memory memory(Cutter& cut) const {
    const int64_t width = this->padded_features_, values = this->padded_values_;
    const auto row = [&](int64_t count) { return Block{cut.take<T>(count), count}; };
    return {row(width),  row(width),         row(values),
            row(values), cut.take<T>(width), cut.take<T>(values)};
  }

  void for_items(int64_t items, const std::function<void(int64_t, const Memory&)>& body) const {
    Cutter counted;
    memory(counted);
    for_neighbours(items, threads_for(this->run_, items), counted.used(),
                   [&](int64_t item, std::byte* base) {
                     Cutter cut(base);
                     body(item, memory(cut));
                   });
  }

  Chunk token(int64_t b) const {
    Chunk chunk{.tokens = 1, .keys = 1, .queries = 1};
    if (!this->problem_.lengths.empty()) {
      chunk.keys = this->problem_.lengths[static_cast<size_t>(b)];
    }
    return chunk;
  }

  void sum_keys(int64_t lane, const Memory& m) {
    const int64_t b = lane / this->heads_, h = lane % this->heads_;
    const Chunk chunk = token(b);
    this->features(this->for_sums(this->queries(b, h, chunk), true), 0, this->features_, m.q);
    if (chunk.keys == 1) {
      this->features(this->for_sums(this->keys(b, h, chunk), false), 0, this->features_, m.k);
    }
    std::fill_n(m.sum, this->padded_features_, T{0});
    const Tensor &from = this->problem_.initial.keys, &to = last_.keys;
    if (from.defined()) {
      std::copy_n(reinterpret_cast<const T*>(from.at({b, h})), this->features_, m.sum);
    }
    T dot = 0;
    this->rows_.run_dots({m.k.data, m.k.stride}, {0, chunk.keys}, {m.q.data, m.q.stride}, {0, 1},
                         m.q.stride, m.sum, &dot);
    if (to.defined()) {
      std::copy_n(m.sum, this->features_, reinterpret_cast<T*>(to.at({b, h})));
    }
    denominators_[static_cast<size_t>(lane)] = dot;
  }

  // The features of a row, or zeros where there is none; where they lie, or in `own`.
  const T* row_of(const Source<T>& source, int64_t width, Block own) const {
    if (source.rows.count == 0) {
      std::fill_n(own.data, own.stride, T{0});
    } else if (source.map == nullptr && source.rows.dtype == this->kType) {
      return static_cast<const T*>(source.rows.data);
    } else {
      this->features(source, 0, width, own);
    }
    return own.data;
  }

  void run_columns(int64_t lane, int64_t begin, int64_t end, const Memory& m) const {
    const int64_t b = lane / this->heads_, h = lane % this->heads_;
    const Chunk chunk = token(b);
    const T* q = row_of(this->queries(b, h, chunk), this->features_, m.q);
    const T* k = row_of(this->keys(b, h, chunk), this->features_, m.k);
    const T* v = row_of({this->values(b, h, chunk), {}, nullptr}, this->value_dim_, m.v);
    const Tensor &from = this->problem_.initial.sums, &to = last_.sums;
    kernels::Block<const T> before;
    if (from.defined()) {
      before = {reinterpret_cast<const T*>(from.at({b, h})) + begin, from.stride(2)};
    } else {
      // The same zeros are read for every row.
      before = {m.o.data, 0};
      std::fill_n(m.o.data, m.o.stride, T{0});
    }
    Block after;
    if (to.defined()) after = {reinterpret_cast<T*>(to.at({b, h})) + begin, to.stride(2)};
    this->rows_.step(q, k, v + begin, this->features_, end - begin, this->decay(h, 1), before,
                     after, m.result + begin);
    finish(lane, begin, end, v, m);
  }

  void finish(int64_t lane, int64_t begin, int64_t end, const T* v, const Memory& m) const {
    const int64_t b = lane / this->heads_, h = lane % this->heads_;
    const Policy<T>& policy = this->problem_.policy;
    ReadOut row;
    if (policy.read_out) {
      policy.read_out({b, 1, 0, 1}, &denominators_[static_cast<size_t>(lane)],
                      {&row.num_scale, &row.sum_scale, &row.num_slope, &row.sum_slope});
      row.num_scale *= this->scale(h);
      row.sum_scale *= this->scale(h);
    }
    const Tensor &from = this->problem_.initial.values, &to = last_.values;
    for (int64_t f = begin; f < end && (policy.read_out || policy.value_sum); ++f) {
      m.result[f] *= static_cast<T>(row.num_scale);
      if (!policy.value_sum) continue;
      T sum = v[f];
      if (from.defined()) sum += *reinterpret_cast<const T*>(from.at({b, h, f}));
      if (to.defined()) *reinterpret_cast<T*>(to.at({b, h, f})) = sum;
      m.result[f] -= static_cast<T>(row.sum_scale) * sum;
    }
    this->wide_.finish({m.result + begin, m.o.stride}, 1, end - begin, nullptr,
                       out_.at({b, h, 0, begin}), out_.dtype(), out_.stride(2));
  }

  const Tensor& out_;
  const State& last_;
  std::vector<T> denominators_;  // per lane
};

}  // namespace

template <class T>
bool can_step(const Problem<T>& problem, const State& last) {
  const State& first = problem.initial;
  const auto whole_rows = [](const Tensor& t) {
    return !t.defined() || t.size(t.rank() - 1) <= 1 || t.stride(t.rank() - 1) == 1;
  };
  return problem.causal && problem.q.size(2) == 1 && problem.k.size(2) == 1 &&
         whole_rows(first.sums) && whole_rows(first.keys) && whole_rows(last.sums) &&
         whole_rows(last.keys);
}

template <class T>
void step(const Problem<T>& problem, const Tensor& out, const State& last, const RunOptions& run) {
  Step<T>(problem, out, last, run).run();
}

template bool can_step(const Problem<float>&, const State&);
template bool can_step(const Problem<double>&, const State&);
template void step(const Problem<float>&, const Tensor&, const State&, const RunOptions&);
template void step(const Problem<double>&, const Tensor&, const State&, const RunOptions&);

}  // namespace heed::chunked
