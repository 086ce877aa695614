#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <string>

#include "base/parallel.h"
#include "engine/operands.h"
#include "engine/tiled/problem.h"
#include "heed/head_gated_attention.h"
#include "mechanisms/parameter.h"
#include "mechanisms/row_memory.h"
#include "mechanisms/row_values.h"

namespace heed {

namespace {

constexpr const char* kOp = "head_gated_attention";
// Copies of a part for each thread: they come back from the caches where a head is small enough.
constexpr int64_t kPartBytes = int64_t{4} << 20;

struct Call {
  Call(const char* name, const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
       const Tensor& gates_in, const Tensor& out, const HeadGatedOptions& options,
       const RunOptions& run_in)
      : op(name), q(q_in), k(k_in), v(v_in), run(run_in) {
    tiled::check_operands(op, q, k, v, out, {});
    const Dims rows{q.size(0), q.size(1), q.size(2)};
    check_parameter(op, "gates", gates_in, rows, q.dtype());
    plans = tiled::TilePlan::from_masks(op, options.masks, q.size(0), q.size(2), k.size(2));
    scale = tiled::resolve_scale(op, options.scale, q.size(3));
    gates = convert(gates_in, DType::f64);
  }

  int64_t group() const { return q.size(1) / k.size(1); }
  double gate(int64_t b, int64_t h, int64_t p) const {
    return gates.as<double>()[(b * q.size(1) + h) * q.size(2) + p];
  }
  DType wide() const { return wide_type(q.dtype()); }

  const char* op;
  Tensor q, k, v;
  Array gates;  // contiguous float64
  double scale = 1;
  std::vector<tiled::TilePlan> plans;
  RunOptions run;
};

/// The rows of one query head that have a gate.
struct ActiveHead {
  int64_t batch, head;
  std::vector<int64_t> rows;
  int64_t count() const { return static_cast<int64_t>(rows.size()); }
};

/// All heads of a group of key heads.
using Part = std::vector<ActiveHead>;

std::vector<Part> parts_of(const Call& call) {
  const int64_t threads = call.run.threads.value_or(default_threads());
  const int64_t row_bytes = call.q.size(3) * static_cast<int64_t>(size_of(call.q.dtype())) +
                            call.v.size(3) * static_cast<int64_t>(size_of(call.wide()));
  std::vector<Part> parts;
  int64_t bytes = 0;
  for (int64_t b = 0; b < call.q.size(0); ++b) {
    for (int64_t h = 0; h < call.q.size(1); ++h) {
      ActiveHead active{b, h, {}};
      for (int64_t p = 0; p < call.q.size(2); ++p) {
        if (call.gate(b, h, p) != 0) active.rows.push_back(p);
      }
      const bool new_group = h % call.group() == 0;
      if (parts.empty() || (new_group && bytes > kPartBytes * threads)) {
        parts.emplace_back();
        bytes = 0;
      }
      bytes += active.count() * row_bytes;
      parts.back().push_back(std::move(active));
    }
  }
  return parts;
}

/// Rows of a part, head by head: q and out [rows,width], lse [rows].
struct PartRows {
  Tensor q, out, lse;
};

int64_t rows_of(const Part& part) {
  int64_t rows = 0;
  for (const ActiveHead& head : part) rows += head.count();
  return rows;
}

int64_t most_rows(const std::vector<Part>& parts) {
  int64_t most = 0;
  for (const Part& part : parts) most = std::max(most, rows_of(part));
  return most;
}

/// Calls each(head, row of the head, its row in the part) for all rows of the part, heads in parallel.
template <class Each>
void for_each_row(const Call& call, const Part& part, const Each& each) {
  std::vector<int64_t> first;
  int64_t rows = 0;
  for (const ActiveHead& head : part) {
    first.push_back(rows);
    rows += head.count();
  }
  const auto count = static_cast<int64_t>(part.size());
  parallel_for(count, threads_for(call.run, count), [&](int64_t n, int) {
    const ActiveHead& head = part[static_cast<size_t>(n)];
    for (int64_t i = 0; i < head.count(); ++i) {
      each(head, head.rows[static_cast<size_t>(i)], first[static_cast<size_t>(n)] + i);
    }
  });
}

void copy_row(const Tensor& from, std::initializer_list<int64_t> at, const Tensor& to,
              std::initializer_list<int64_t> to_at) {
  std::memcpy(to.at(to_at), from.at(at),
              static_cast<size_t>(from.shape().back()) * size_of(from.dtype()));
}

/// One row of heads for each head of the part that has rows.
tiled::Problem problem_of(const Call& call, const Part& part, const PartRows& rows) {
  tiled::Problem problem;
  problem.op = call.op;
  problem.scale = call.scale;
  int64_t first = 0;
  for (const ActiveHead& head : part) {
    if (head.count() == 0) continue;
    const auto rows_as_head = [&](const Tensor& t) {
      const Tensor some = t.slice(0, first, first + head.count());
      return t.rank() == 1 ? Tensor(some.data(), some.dtype(), {1, head.count()})
                           : Tensor(some.data(), some.dtype(), {1, head.count(), t.size(1)});
    };
    const int64_t kv = head.head / call.group();
    tiled::Sequence s;
    s.q = rows_as_head(rows.q);
    s.k = call.k.select(0, head.batch).slice(0, kv, kv + 1);
    s.v = call.v.select(0, head.batch).slice(0, kv, kv + 1);
    s.out = rows_as_head(rows.out);
    s.lse = rows_as_head(rows.lse);
    s.plan = call.plans[static_cast<size_t>(head.batch)].of_rows(head.rows);
    s.batch = head.batch;
    problem.sequences.push_back(std::move(s));
    first += head.count();
  }
  return problem;
}

/// What the forward gave for heads of tokens: undefined tensors are not written.
struct TokenRows {
  Tensor out, attention, lse;
};

template <class T>
void forward_part(const Call& call, const Part& part, const TokenRows& to, RowMemory& memory) {
  const int64_t count = rows_of(part), value_dim = call.v.size(3);
  memory.reset();
  const PartRows rows{memory.take(call.q.dtype(), {count, call.q.size(3)}),
                      memory.take(call.wide(), {count, value_dim}),
                      memory.take(call.wide(), {count})};
  for_each_row(call, part, [&](const ActiveHead& head, int64_t p, int64_t row) {
    copy_row(call.q, {head.batch, head.head, p}, rows.q, {row});
  });
  const tiled::Problem problem = problem_of(call, part, rows);
  if (!problem.sequences.empty()) tiled::forward(problem, call.run);
  for_each_row(call, part, [&](const ActiveHead& head, int64_t p, int64_t row) {
    const T* attention = reinterpret_cast<const T*>(rows.out.at({row}));
    const std::initializer_list<int64_t> at = {head.batch, head.head, p};
    store_row(attention, static_cast<T>(call.gate(head.batch, head.head, p)), to.out, at);
    if (to.attention.defined()) store_row(attention, T{1}, to.attention, at);
    if (to.lse.defined()) *reinterpret_cast<T*>(to.lse.at(at)) = rows.lse.as<T>()[row];
  });
}

// Rows without a gate.
template <class T>
void clear_rest(const Call& call, const TokenRows& to) {
  const int64_t heads = call.q.size(0) * call.q.size(1);
  parallel_for(heads, threads_for(call.run, heads), [&](int64_t n, int) {
    const int64_t b = n / call.q.size(1), h = n % call.q.size(1);
    for (int64_t p = 0; p < call.q.size(2); ++p) {
      if (call.gate(b, h, p) != 0) continue;
      for (const Tensor& t : {to.out, to.attention}) {
        if (!t.defined()) continue;
        std::memset(t.at({b, h, p}), 0, static_cast<size_t>(t.size(3)) * size_of(t.dtype()));
      }
      if (to.lse.defined()) {
        *reinterpret_cast<T*>(to.lse.at({b, h, p})) = -std::numeric_limits<T>::infinity();
      }
    }
  });
}

template <class T>
void run_forward(const Call& call, const TokenRows& to) {
  const std::vector<Part> parts = parts_of(call);
  const int64_t most = most_rows(parts);
  RowMemory memory(RowMemory::bytes_of(call.q.dtype(), most * call.q.size(3)) +
                   RowMemory::bytes_of(call.wide(), most * call.v.size(3)) +
                   RowMemory::bytes_of(call.wide(), most));
  for (const Part& part : parts) forward_part<T>(call, part, to, memory);
  clear_rest<T>(call, to);
}

/// Sums of the query heads of a group: [heads of the part, Lk, width].
template <class T>
void add_heads(const Call& call, const Part& part, const Tensor& of_heads, const Tensor& to) {
  const int64_t group = call.group(), kv_heads = static_cast<int64_t>(part.size()) / group;
  const int64_t keys = to.size(2), width = to.size(3), count = kv_heads * keys;
  parallel_for(count, threads_for(call.run, count), [&](int64_t n, int) {
    const int64_t kv = n / keys, m = n % keys;
    std::vector<T> sum(static_cast<size_t>(width), T{0});
    for (int64_t h = kv * group; h < (kv + 1) * group; ++h) {
      if (part[static_cast<size_t>(h)].count() == 0) continue;
      const T* row = reinterpret_cast<const T*>(of_heads.at({h, m}));
      for (int64_t i = 0; i < width; ++i) sum[static_cast<size_t>(i)] += row[i];
    }
    const ActiveHead& first = part[static_cast<size_t>(kv * group)];
    store_row(sum.data(), T{1}, to, {first.batch, first.head / group, m});
  });
}

template <class T>
class BackwardCall {
 public:
  BackwardCall(const Call& call, const Tensor& grad_out, const TokenRows& saved,
               const HeadGatedGradients& to)
      : call_(call), grad_out_(grad_out), saved_(saved), to_(to) {}

  void run() const {
    const std::vector<Part> parts = parts_of(call_);
    const int64_t most = most_rows(parts), dim = call_.q.size(3), value_dim = call_.v.size(3);
    const DType dtype = call_.q.dtype();
    RowMemory memory(2 * RowMemory::bytes_of(dtype, most * dim) +
                     RowMemory::bytes_of(dtype, most * value_dim) +
                     RowMemory::bytes_of(gradient_type(), most * value_dim) +
                     RowMemory::bytes_of(call_.wide(), most));
    for (const Part& part : parts) run_part(part, memory);
  }

 private:
  // The engine multiplies bfloat16 rows with bfloat16 rows; float16 might overflow where float32 does not.
  DType gradient_type() const {
    return call_.q.dtype() == DType::bf16 ? DType::bf16 : call_.wide();
  }

  void run_part(const Part& part, RowMemory& memory) const {
    const int64_t count = rows_of(part), dim = call_.q.size(3), value_dim = call_.v.size(3);
    const DType dtype = call_.q.dtype();
    memory.reset();
    const PartRows rows{memory.take(dtype, {count, dim}), memory.take(dtype, {count, value_dim}),
                        memory.take(call_.wide(), {count})};
    const Tensor grad_attention = memory.take(gradient_type(), {count, value_dim});
    const Tensor grad_q = memory.take(dtype, {count, dim});
    for_each_row(call_, part, [&](const ActiveHead& head, int64_t p, int64_t row) {
      prepare_row(head, p, row, rows, grad_attention);
    });
    run_engine(part, rows, grad_attention, grad_q);
    for_each_row(call_, part, [&](const ActiveHead& head, int64_t p, int64_t row) {
      copy_row(grad_q, {row}, to_.q, {head.batch, head.head, p});
    });
  }

  void prepare_row(const ActiveHead& head, int64_t p, int64_t row, const PartRows& rows,
                   const Tensor& grad_attention) const {
    const std::initializer_list<int64_t> at = {head.batch, head.head, p};
    copy_row(call_.q, at, rows.q, {row});
    copy_row(saved_.attention, at, rows.out, {row});
    rows.lse.as<T>()[row] = *reinterpret_cast<const T*>(saved_.lse.at(at));
    const auto width = static_cast<size_t>(call_.v.size(3));
    std::array<T, kMaxHeadDim> attention, gradient;  // `width` are used
    load_row(saved_.attention, at, attention.data());
    load_row(grad_out_, at, gradient.data());
    T of_gate = 0;
    for (size_t i = 0; i < width; ++i) of_gate += gradient[i] * attention[i];
    const T gate = static_cast<T>(call_.gate(head.batch, head.head, p));
    store_row(gradient.data(), gate, grad_attention, {row});
    const Tensor gates = to_.gates;
    const Tensor as_rows(gates.data(), gates.dtype(),
                         {gates.size(0), gates.size(1), gates.size(2), 1});
    store_row(&of_gate, T{1}, as_rows, at);
  }

  void run_engine(const Part& part, const PartRows& rows, const Tensor& grad_attention,
                  const Tensor& grad_q) const {
    const int64_t heads = static_cast<int64_t>(part.size()), keys = call_.k.size(2);
    const bool sum = call_.group() > 1;
    Array k_sums, v_sums;
    if (sum) {
      k_sums = Array(call_.wide(), {heads, keys, call_.k.size(3)});
      v_sums = Array(call_.wide(), {heads, keys, call_.v.size(3)});
    }
    const tiled::Problem problem = problem_of(call_, part, rows);
    std::vector<tiled::SequenceGradient> gradients;
    int64_t first = 0;
    for (int64_t h = 0; h < heads; ++h) {
      const ActiveHead& head = part[static_cast<size_t>(h)];
      if (head.count() == 0) continue;
      const auto some = [&](const Tensor& t) {
        const Tensor slice = t.slice(0, first, first + head.count());
        return Tensor(slice.data(), slice.dtype(), {1, head.count(), t.size(1)});
      };
      const auto keys_of = [&](const Array& sums, const Array& whole) {
        if (sum) return sums.view().slice(0, h, h + 1);
        return whole.view().select(0, head.batch).slice(0, head.head, head.head + 1);
      };
      gradients.push_back({some(grad_attention),
                           {},
                           some(grad_q),
                           keys_of(k_sums, to_.k),
                           keys_of(v_sums, to_.v),
                           {}});
      first += head.count();
    }
    if (!gradients.empty()) tiled::backward(problem, gradients, nullptr, call_.run);
    if (!sum) return;
    add_heads<T>(call_, part, k_sums, to_.k);
    add_heads<T>(call_, part, v_sums, to_.v);
  }

  const Call& call_;
  const Tensor& grad_out_;
  const TokenRows& saved_;
  const HeadGatedGradients& to_;
};

bool is_empty(const Call& call) { return call.q.count() == 0; }

}  // namespace

void head_gated_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& gates,
                          const Tensor& out, const Tensor& attention, const Tensor& lse,
                          const HeadGatedOptions& options, const RunOptions& run) {
  const Call call(kOp, q, k, v, gates, out, options, run);
  if (attention.defined()) {
    check_rows_like(kOp, "attention", attention, out.shape(), out.dtype());
  }
  if (lse.defined()) tiled::check_operands(kOp, q, k, v, out, lse);
  if (is_empty(call)) return;
  if (q.dtype() == DType::f64) {
    run_forward<double>(call, {out, attention, lse});
  } else {
    run_forward<float>(call, {out, attention, lse});
  }
}

HeadGatedResult head_gated_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                     const Tensor& gates, const HeadGatedOptions& options,
                                     const RunOptions& run) {
  HeadGatedResult result;
  if (q.rank() == 4 && v.rank() == 4) {  // else the checks explain it
    const Dims shape{q.size(0), q.size(1), q.size(2), v.size(3)};
    result.out = Array(q.dtype(), shape);
    result.attention = Array(q.dtype(), shape);
    result.lse = Array(wide_type(q.dtype()), {q.size(0), q.size(1), q.size(2)});
  }
  head_gated_attention(q, k, v, gates, result.out, result.attention, result.lse, options, run);
  return result;
}

HeadGatedGradients head_gated_attention_backward(const Tensor& grad_out, const Tensor& q,
                                                 const Tensor& k, const Tensor& v,
                                                 const Tensor& gates, const Tensor& attention,
                                                 const Tensor& lse, const HeadGatedOptions& options,
                                                 const RunOptions& run) {
  constexpr const char* kBackward = "head_gated_attention_backward";
  if (!attention.defined()) {
    fail(kBackward, "attention is missing", "what the forward returned is needed");
  }
  const Call call(kBackward, q, k, v, gates, attention, options, run);
  if (!lse.defined()) fail(kBackward, "lse is missing", "what the forward returned is needed");
  tiled::check_operands(kBackward, q, k, v, attention, lse);
  check_rows_like(kBackward, "grad_out", grad_out, attention.shape(), attention.dtype());
  HeadGatedGradients gradients{
      Array::zeros(q.dtype(), q.shape()), Array::zeros(k.dtype(), k.shape()),
      Array::zeros(v.dtype(), v.shape()), Array::zeros(gates.dtype(), gates.shape())};
  if (is_empty(call) || k.size(2) == 0) return gradients;
  if (q.dtype() == DType::f64) {
    BackwardCall<double>(call, grad_out, {{}, attention, lse}, gradients).run();
  } else {
    BackwardCall<float>(call, grad_out, {{}, attention, lse}, gradients).run();
  }
  return gradients;
}

}  // namespace heed
