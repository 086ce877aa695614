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
#include "mechanisms/results.h"
#include "mechanisms/row_memory.h"
#include "mechanisms/row_values.h"

namespace heed {

namespace {

constexpr const char* kOp = "head_gated_attention";
// Copies of a part. It depends on nothing else, so neither do results: how the engine goes about a head
// also depends on the longest one beside it.
constexpr int64_t kPartBytes = int64_t{16} << 20;

struct Call {
  Call(const char* op, const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
       const Tensor& gates_in, const Tensor& out, const HeadGatedOptions& options,
       const RunOptions& run_in)
      : q(q_in), k(k_in), v(v_in), run(run_in) {
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

  Tensor q, k, v;
  Array gates;  // contiguous float64
  double scale = 1;
  std::vector<tiled::TilePlan> plans;
  RunOptions run;
};

/// Query heads of one key head whose gates leave the same rows. Together they are one head of the engine,
/// with a row for each of them in each of `rows`, so that keys are read once for all.
struct AlikeHeads {
  int64_t batch = 0, kv_head = 0;
  std::vector<int64_t> heads, rows;
  bool first = false, last = false;  // of those with this key head
  bool alone() const { return first && last; }
  int64_t count() const { return static_cast<int64_t>(heads.size() * rows.size()); }
};

using Part = std::vector<AlikeHeads>;

/// Those of one key head that have rows at all.
std::vector<AlikeHeads> alike_heads(const Call& call, int64_t batch, int64_t kv_head) {
  std::vector<AlikeHeads> all;
  for (int64_t h = kv_head * call.group(); h < (kv_head + 1) * call.group(); ++h) {
    std::vector<int64_t> rows;
    for (int64_t p = 0; p < call.q.size(2); ++p) {
      if (call.gate(batch, h, p) != 0) rows.push_back(p);
    }
    if (rows.empty()) continue;
    const auto alike = std::find_if(all.begin(), all.end(),
                                    [&](const AlikeHeads& other) { return other.rows == rows; });
    if (alike == all.end()) {
      all.push_back({batch, kv_head, {h}, std::move(rows)});
    } else {
      alike->heads.push_back(h);
    }
  }
  if (!all.empty()) all.front().first = all.back().last = true;
  return all;
}

/// `key_bytes`: what each needs beside its rows unless it is alone with its key head.
std::vector<Part> parts_of(const Call& call, int64_t key_bytes) {
  const int64_t row_bytes = call.q.size(3) * static_cast<int64_t>(size_of(call.q.dtype())) +
                            call.v.size(3) * static_cast<int64_t>(size_of(call.wide()));
  std::vector<Part> parts;
  int64_t bytes = 0;
  for (int64_t n = 0; n < call.k.size(0) * call.k.size(1); ++n) {
    for (AlikeHeads& heads : alike_heads(call, n / call.k.size(1), n % call.k.size(1))) {
      const int64_t more = heads.count() * row_bytes + (heads.alone() ? 0 : key_bytes);
      if (parts.empty() || bytes + more > kPartBytes) {
        parts.emplace_back();
        bytes = 0;
      }
      bytes += more;
      parts.back().push_back(std::move(heads));
    }
  }
  return parts;
}

/// Rows of a part, those of alike heads one behind another: q and out [rows,width], lse [rows].
struct PartRows {
  Tensor q, out, lse;
};

int64_t rows_of(const Part& part) {
  int64_t rows = 0;
  for (const AlikeHeads& heads : part) rows += heads.count();
  return rows;
}

int64_t most_rows(const std::vector<Part>& parts) {
  int64_t most = 0;
  for (const Part& part : parts) most = std::max(most, rows_of(part));
  return most;
}

/// A row of q.
struct QueryAt {
  int64_t batch, head, row;
};

/// Calls each(row of q, its row in the part) for all rows of the part, heads in parallel.
template <class Each>
void for_each_row(const Call& call, const Part& part, const Each& each) {
  struct Head {
    const AlikeHeads* of;
    int64_t head, first;
  };
  std::vector<Head> heads;
  int64_t rows = 0;
  for (const AlikeHeads& alike : part) {
    for (int64_t head : alike.heads) heads.push_back({&alike, head, rows++});
    rows += alike.count() - static_cast<int64_t>(alike.heads.size());
  }
  const auto count = static_cast<int64_t>(heads.size());
  parallel_for(count, threads_for_rows(call.run, count, rows * call.q.size(3)),
               [&](int64_t n, int) {
                 const auto& [of, head, first] = heads[static_cast<size_t>(n)];
                 int64_t row = first;
                 for (int64_t p : of->rows) {
                   each(QueryAt{of->batch, head, p}, row);
                   row += static_cast<int64_t>(of->heads.size());
                 }
               });
}

void copy_row(const Tensor& from, std::initializer_list<int64_t> at, const Tensor& to,
              std::initializer_list<int64_t> to_at) {
  std::memcpy(to.at(to_at), from.at(at),
              static_cast<size_t>(from.shape().back()) * size_of(from.dtype()));
}

/// Rows [first, first + count) of a part as those of one head.
Tensor as_head(const Tensor& t, int64_t first, int64_t count) {
  const Tensor some = t.slice(0, first, first + count);
  return t.rank() == 1 ? Tensor(some.data(), some.dtype(), {1, count})
                       : Tensor(some.data(), some.dtype(), {1, count, t.size(1)});
}

/// [B,Hkv,Lk,width] of one key head.
Tensor of_key_head(const Tensor& t, const AlikeHeads& heads) {
  return t.select(0, heads.batch).slice(0, heads.kv_head, heads.kv_head + 1);
}

/// The row of each row of alike heads.
std::vector<int64_t> positions(const AlikeHeads& heads) {
  std::vector<int64_t> all;
  for (int64_t row : heads.rows) all.insert(all.end(), heads.heads.size(), row);
  return all;
}

/// A sequence of one head for each of the part.
tiled::Problem problem_of(const Call& call, const Part& part, const PartRows& rows) {
  tiled::Problem problem;
  problem.scale = call.scale;
  int64_t first = 0;
  for (const AlikeHeads& heads : part) {
    const int64_t count = heads.count();
    tiled::Sequence s;
    s.q = as_head(rows.q, first, count);
    s.k = of_key_head(call.k, heads);
    s.v = of_key_head(call.v, heads);
    s.out = as_head(rows.out, first, count);
    s.lse = as_head(rows.lse, first, count);
    s.plan = call.plans[static_cast<size_t>(heads.batch)].of_rows(positions(heads));
    s.batch = heads.batch;
    problem.sequences.push_back(std::move(s));
    first += count;
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
  for_each_row(call, part, [&](const QueryAt& q, int64_t row) {
    copy_row(call.q, {q.batch, q.head, q.row}, rows.q, {row});
  });
  tiled::forward(problem_of(call, part, rows), call.run);
  for_each_row(call, part, [&](const QueryAt& q, int64_t row) {
    const T* attention = reinterpret_cast<const T*>(rows.out.at({row}));
    const std::initializer_list<int64_t> at = {q.batch, q.head, q.row};
    store_row(attention, static_cast<T>(call.gate(q.batch, q.head, q.row)), to.out, at);
    if (to.attention.defined()) store_row(attention, T{1}, to.attention, at);
    if (to.lse.defined()) *reinterpret_cast<T*>(to.lse.at(at)) = rows.lse.as<T>()[row];
  });
}

// Rows without a gate.
template <class T>
void clear_rest(const Call& call, const TokenRows& to) {
  const int64_t heads = call.q.size(0) * call.q.size(1);
  parallel_for(heads, threads_for_rows(call.run, heads, call.q.count()), [&](int64_t n, int) {
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
  const std::vector<Part> parts = parts_of(call, 0);
  const int64_t most = most_rows(parts);
  RowMemory memory(RowMemory::bytes_of(call.q.dtype(), most * call.q.size(3)) +
                   RowMemory::bytes_of(call.wide(), most * call.v.size(3)) +
                   RowMemory::bytes_of(call.wide(), most));
  for (const Part& part : parts) forward_part<T>(call, part, to, memory);
  clear_rest<T>(call, to);
}

/// Sums of what the heads of a part gave for keys they share, [heads, Lk, width]. Those of a key head that
/// goes on in the next part stay in `carried` [Lk,width] until then.
template <class T>
void add_heads(const Call& call, const Part& part, const Tensor& of_heads, const Tensor& carried,
               const Tensor& to) {
  const int64_t keys = to.size(2);
  const auto width = static_cast<size_t>(to.size(3));
  parallel_for(keys, threads_for_rows(call.run, keys, of_heads.count()), [&](int64_t m, int) {
    std::array<T, kMaxHeadDim> sum{};  // `width` are used
    if (!part.front().first) load_row(carried, {m}, sum.data());
    int64_t next = 0;
    for (const AlikeHeads& heads : part) {
      if (heads.alone()) continue;
      const T* row = reinterpret_cast<const T*>(of_heads.at({next++, m}));
      for (size_t i = 0; i < width; ++i) sum[i] += row[i];
      if (!heads.last) continue;
      store_row(sum.data(), T{1}, to, {heads.batch, heads.kv_head, m});
      sum = {};
    }
    if (!part.back().last) store_row(sum.data(), T{1}, carried, {m});
  });
}

template <class T>
class BackwardCall {
 public:
  BackwardCall(const Call& call, const Tensor& grad_out, const TokenRows& saved,
               const HeadGatedGradients& to)
      : call_(call), grad_out_(grad_out), saved_(saved), to_(to) {}

  void run() {
    const int64_t dim = call_.q.size(3), value_dim = call_.v.size(3), keys = call_.k.size(2);
    const DType dtype = call_.q.dtype();
    const std::vector<Part> parts =
        parts_of(call_, keys * (dim + value_dim) * static_cast<int64_t>(sizeof(T)));
    const auto goes_on = [](const Part& part) { return !part.back().last; };
    if (std::any_of(parts.begin(), parts.end(), goes_on)) {
      k_carried_ = Array(call_.wide(), {keys, dim});
      v_carried_ = Array(call_.wide(), {keys, value_dim});
    }
    const int64_t most = most_rows(parts);
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
    for_each_row(call_, part,
                 [&](const QueryAt& q, int64_t row) { prepare_row(q, row, rows, grad_attention); });
    run_engine(part, rows, grad_attention, grad_q);
    for_each_row(call_, part, [&](const QueryAt& q, int64_t row) {
      copy_row(grad_q, {row}, to_.q, {q.batch, q.head, q.row});
    });
  }

  void prepare_row(const QueryAt& q, int64_t row, const PartRows& rows,
                   const Tensor& grad_attention) const {
    const std::initializer_list<int64_t> at = {q.batch, q.head, q.row};
    copy_row(call_.q, at, rows.q, {row});
    copy_row(saved_.attention, at, rows.out, {row});
    rows.lse.as<T>()[row] = *reinterpret_cast<const T*>(saved_.lse.at(at));
    const auto width = static_cast<size_t>(call_.v.size(3));
    std::array<T, kMaxHeadDim> attention, gradient;  // `width` are used
    load_row(saved_.attention, at, attention.data());
    load_row(grad_out_, at, gradient.data());
    T of_gate = 0;
    for (size_t i = 0; i < width; ++i) of_gate += gradient[i] * attention[i];
    const T gate = static_cast<T>(call_.gate(q.batch, q.head, q.row));
    store_row(gradient.data(), gate, grad_attention, {row});
    const Tensor gates = to_.gates;
    const Tensor as_rows(gates.data(), gates.dtype(),
                         {gates.size(0), gates.size(1), gates.size(2), 1});
    store_row(&of_gate, T{1}, as_rows, at);
  }

  void run_engine(const Part& part, const PartRows& rows, const Tensor& grad_attention,
                  const Tensor& grad_q) const {
    const int64_t keys = call_.k.size(2);
    const auto shared = std::count_if(part.begin(), part.end(),
                                      [](const AlikeHeads& heads) { return !heads.alone(); });
    Array k_sums, v_sums;
    if (shared > 0) {
      k_sums = Array(call_.wide(), {shared, keys, call_.k.size(3)});
      v_sums = Array(call_.wide(), {shared, keys, call_.v.size(3)});
    }
    std::vector<tiled::SequenceGradient> gradients;
    int64_t first = 0, next = 0;
    for (const AlikeHeads& heads : part) {
      const int64_t count = heads.count(), at = heads.alone() ? 0 : next++;
      const auto of_keys = [&](const Array& sums, const Array& whole) {
        return heads.alone() ? of_key_head(whole, heads) : sums.view().slice(0, at, at + 1);
      };
      gradients.push_back({as_head(grad_attention, first, count),
                           {},
                           as_head(grad_q, first, count),
                           of_keys(k_sums, to_.k),
                           of_keys(v_sums, to_.v),
                           {}});
      first += count;
    }
    tiled::backward(problem_of(call_, part, rows), gradients, nullptr, call_.run);
    if (shared == 0) return;
    add_heads<T>(call_, part, k_sums, k_carried_, to_.k);
    add_heads<T>(call_, part, v_sums, v_carried_, to_.v);
  }

  const Call& call_;
  const Tensor& grad_out_;
  const TokenRows& saved_;
  const HeadGatedGradients& to_;
  Array k_carried_, v_carried_;  // [Lk,width], of a key head in several parts
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
  with_wide_type(q.dtype(), [&]<class T>(T) { run_forward<T>(call, {out, attention, lse}); });
}

HeadGatedResult head_gated_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                     const Tensor& gates, const HeadGatedOptions& options,
                                     const RunOptions& run) {
  HeadGatedResult result{empty_result(q, v), empty_result(q, v), empty_statistic(q)};
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
  with_wide_type(q.dtype(), [&]<class T>(T) {
    BackwardCall<T>(call, grad_out, {{}, attention, lse}, gradients).run();
  });
  return gradients;
}

}  // namespace heed
