// The tiled engine computes softmax attention, or the sums of polynomial weights; a pass over the rows of
// its result makes the normalizers of it. Backward the same: gradients of the engine's result and of its
// statistic first, then the engine.
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "base/parallel.h"
#include "base/round_up.h"
#include "engine/operands.h"
#include "engine/tiled/problem.h"
#include "heed/error.h"
#include "heed/recurrent_softmax_attention.h"
#include "kernels/row_maps.h"
#include "mechanisms/nearest.h"
#include "mechanisms/parameter.h"
#include "mechanisms/recurrent_softmax/row_result.h"
#include "mechanisms/results.h"
#include "mechanisms/row_blocks.h"

namespace heed {

namespace {

constexpr const char* kOp = "recurrent_softmax_attention";
constexpr int64_t kMostOrder = 100;
constexpr int64_t kItemRows = 64;

void check_options(const RecurrentSoftmaxOptions& options, const Tensor& q) {
  if (options.order && (*options.order < 0 || *options.order > kMostOrder)) {
    fail(kOp, "order is " + std::to_string(*options.order),
         "0 to " + std::to_string(kMostOrder) + " is needed, or none for the exponential");
  }
  if (options.score_clamp && !(*options.score_clamp > -INFINITY)) {
    fail(kOp, "score_clamp is " + std::to_string(*options.score_clamp),
         "a number above -inf is needed");
  }
  if (!std::isfinite(options.eps) || options.eps < 0) {
    fail(kOp, "eps is " + std::to_string(options.eps), "a finite number >= 0 is needed");
  }
  if (options.gate.defined()) {
    check_parameter(kOp, "gate", options.gate, {q.size(0), q.size(1), q.size(2)}, q.dtype());
  }
}

struct Call {
  tiled::Problem problem;
  tiled::TilePlan plan;
};

Call make_call(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& core,
               const Tensor& statistic, const RecurrentSoftmaxOptions& options) {
  Masks masks;
  masks.causal = options.causal;
  const std::vector<tiled::TilePlan> plans = tiled::TilePlan::from_masks(
      kOp, masks, std::max<int64_t>(1, q.size(0)), q.size(2), k.size(2));
  Call call{{}, plans[0]};
  call.problem.sequences = tiled::batch_sequences(q, k, v, core, statistic, plans);
  call.problem.scale = tiled::resolve_scale(kOp, options.scale, q.size(3));
  if (options.order) {
    call.problem.policy.weight = kernels::WeightKind::polynomial;
    call.problem.policy.order = static_cast<int>(*options.order);
  }
  if (options.score_clamp && *options.score_clamp < INFINITY) {
    call.problem.policy.most = options.score_clamp;
  }
  return call;
}

/// Rows of the engine's result and what the call asks of them. T is float or double.
template <class T>
class RowPass {
  static constexpr DType kType = dtype_of<T>;

 public:
  RowPass(const Tensor& core, const Tensor& statistic, const tiled::TilePlan& plan,
          const RecurrentSoftmaxOptions& options, const RunOptions& run)
      : core_(core),
        statistic_(statistic),
        plan_(plan),
        kind_{options.normalizer, options.order.has_value(), options.eps,
              static_cast<double>(core.size(3))},
        run_(run),
        maps_(kernels::row_map_kernels<T>(chosen_isa(run))) {
    if (options.gate.defined()) gate_ = convert(options.gate, kType);
  }

  void forward(const Tensor& out) const {
    for_row_blocks(core_, kItemRows, run_, [&](const RowBlock& block) {
      Rows rows;
      measure(block, rows);
      T scale[kItemRows], shift[kItemRows];
      for (int64_t r = 0; r < block.count; ++r) {
        const recurrent::RowResult result = recurrent::row_result(kind_, rows.row[r]);
        const double gate = gate_of(block, r, rows.row[r]);
        scale[r] = static_cast<T>(gate * result.scale);
        shift[r] = static_cast<T>(gate * result.shift);
      }
      maps_.combine(rows_of(core_, block), scale, nullptr, nullptr, shift, out_rows(out, block));
    });
  }

  /// Writes the gradient of core and, of each row, that of the polynomials' sum of weights, or what the
  /// exponential's weights subtract (SequenceGradient::delta); returns the gradient of the gate.
  Array backward(const Tensor& grad_out, const Tensor& grad_core, const Tensor& of_weights) const {
    Array grad_gate;
    if (gated()) grad_gate = Array(kType, gate_.shape());
    for_row_blocks(core_, kItemRows, run_, [&](const RowBlock& block) {
      Rows rows;
      measure(block, rows);
      double dots[kItemRows], sums[kItemRows];
      maps_.dots(rows_of(grad_out, block), rows_of(core_, block), dots);
      maps_.sums(rows_of(grad_out, block), sums);
      recurrent::RowGradient found[kItemRows];
      T of_gradient[kItemRows], of_row[kItemRows], constant[kItemRows], scale[kItemRows];
      for (int64_t r = 0; r < block.count; ++r) {
        const recurrent::RowResult result = recurrent::row_result(kind_, rows.row[r]);
        const double gate = gate_of(block, r, rows.row[r]);
        scale[r] = static_cast<T>(result.scale);
        recurrent::RowGradient& g = found[r];
        g = recurrent::row_gradient(kind_, rows.row[r], gate * dots[r], gate * sums[r]);
        of_gradient[r] = static_cast<T>(gate * g.of_gradient);
        // A numerator may overflow alone; gradients of 0 stay 0.
        const bool none =
            !std::isfinite(of_gradient[r]) && is_zero(rows_of(grad_out, row_of(block, r)));
        if (none) of_gradient[r] = 0;
        if (gated()) {
          const double gradient = result.scale * dots[r] + result.shift * sums[r];
          *reinterpret_cast<T*>(at(grad_gate, block, r)) =
              static_cast<T>(rows.row[r].keys > 0 && !none ? gradient : 0);
        }
        of_row[r] = static_cast<T>(g.of_row);
        constant[r] = static_cast<T>(g.constant);
      }
      const kernels::Rows gradient = rows_of(grad_out, block);
      const kernels::RowsOut to = out_rows(grad_core, block);
      if (!kind_.needs_square()) {
        maps_.combine(gradient, of_gradient, nullptr, nullptr, constant, to);
      } else {
        mapped(block, scale, nullptr, [&](const kernels::Rows& normalized) {
          maps_.combine(gradient, of_gradient, &normalized, of_row, constant, to);
        });
      }
      const bool subtracts =
          std::any_of(found, found + block.count, [](const auto& g) { return !g.of_num_alone; });
      if (!kind_.polynomial && subtracts) {  // as the engine sees it: rounded
        maps_.dots(rows_of(grad_core, block), rows_of(core_, block), dots);
      }
      for (int64_t r = 0; r < block.count; ++r) {
        const double delta = found[r].of_num_alone ? 0 : dots[r];
        *reinterpret_cast<T*>(at(of_weights, block, r)) =
            static_cast<T>(kind_.polynomial ? found[r].den : delta);
      }
    });
    return grad_gate;
  }

 private:
  struct Rows {
    recurrent::Row row[kItemRows];
  };

  static std::byte* at(const Tensor& t, const RowBlock& block, int64_t r) {
    return t.at({block.batch, block.head, block.begin + r});
  }
  static RowBlock row_of(const RowBlock& block, int64_t r) {
    return {block.batch, block.head, block.begin + r, 1};
  }
  bool is_zero(const kernels::Rows& row) const {
    double square = 0;
    maps_.dots(row, row, &square);
    return square == 0;
  }
  bool gated() const { return gate_.view().defined(); }
  /// 0 for a row that sees nothing, whatever its gate is.
  double gate_of(const RowBlock& block, int64_t r, const recurrent::Row& row) const {
    if (row.keys == 0) return 0;
    if (!gated()) return 1;
    return static_cast<double>(*reinterpret_cast<const T*>(at(gate_, block, r)));
  }

  /// Calls body(rows a[r] core[r] + c[r]); c may be null.
  template <class Body>
  void mapped(const RowBlock& block, const T* a, const T* c, const Body& body) const {
    const kernels::Rows core = rows_of(core_, block);
    const int64_t stride = round_up(core.width, 16);
    Scratch scratch(static_cast<size_t>(kItemRows * stride) * sizeof(T) + 64);
    T* rows = scratch.take<T>(kItemRows * stride);
    maps_.combine(core, a, nullptr, nullptr, c, {rows, kType, stride, block.count, core.width});
    body(kernels::Rows{rows, kType, stride, block.count, core.width});
  }

  void measure(const RowBlock& block, Rows& rows) const {
    double squares[kItemRows] = {}, means[kItemRows] = {};
    const kernels::Rows core = rows_of(core_, block);
    if (kind_.needs_mean()) {
      T ones[kItemRows], shift[kItemRows];
      maps_.sums(core, means);
      for (int64_t r = 0; r < block.count; ++r) {
        means[r] /= kind_.width;
        ones[r] = 1;
        shift[r] = static_cast<T>(-means[r]);
        means[r] = -static_cast<double>(shift[r]);
      }
      mapped(block, ones, shift,
             [&](const kernels::Rows& centred) { maps_.dots(centred, centred, squares); });
    } else if (kind_.needs_square()) {
      maps_.dots(core, core, squares);
    }
    for (int64_t r = 0; r < block.count; ++r) {
      const tiled::Interval seen = plan_.row(block.begin + r);
      rows.row[r] = {static_cast<double>(*reinterpret_cast<const T*>(at(statistic_, block, r))),
                     static_cast<double>(std::max<int64_t>(0, seen.end - seen.begin)), squares[r],
                     means[r]};
    }
  }

  const Tensor core_, statistic_;
  const tiled::TilePlan& plan_;
  const recurrent::RowKind kind_;
  const RunOptions& run_;
  const kernels::RowMapKernels<T>& maps_;
  Array gate_;
};

void check_saved(const Tensor& q, const Tensor& v, const Tensor& core, const Tensor& statistic) {
  const DType type = wide_type(q.dtype());
  check_rows_like(kOp, "core", core, out_shape(q, v), type);
  const Dims rows{q.size(0), q.size(1), q.size(2)};
  if (!statistic.defined()) {
    fail(kOp, "statistic is missing", to_string(rows) + " " + name_of(type) + " is needed");
  }
  check_result(kOp, "statistic", statistic, rows, type);
}

template <class T>
RecurrentSoftmaxGradients gradients(const Tensor& grad_out, const Call& call, const Tensor& q,
                                    const Tensor& k, const Tensor& v, const Tensor& core,
                                    const Tensor& statistic, const RecurrentSoftmaxOptions& options,
                                    const RunOptions& run) {
  // The engine multiplies bfloat16 rows with bfloat16 rows; float16 might overflow where float32 does not.
  Array grad_core(q.dtype() == DType::bf16 ? q.dtype() : core.dtype(), core.shape());
  Array of_weights(statistic.dtype(), statistic.shape());
  RecurrentSoftmaxGradients to{empty_like(q), empty_like(k), empty_like(v), {}};
  const RowPass<T> pass(core, statistic, call.plan, options, run);
  const Array gate = pass.backward(grad_out, grad_core, of_weights);
  if (options.gate.defined()) to.gate = convert(gate, options.gate.dtype());
  const bool polynomial = options.order.has_value();
  std::vector<tiled::SequenceGradient> gradients = tiled::batch_gradients(
      grad_core, polynomial ? of_weights.view() : Tensor(), to.q, to.k, to.v);
  for (size_t b = 0; b < gradients.size() && !polynomial; ++b) {
    gradients[b].delta = of_weights.view().select(0, static_cast<int64_t>(b));
  }
  tiled::backward(call.problem, gradients, nullptr, run);
  return to;
}

}  // namespace

const char* name_of(Normalizer normalizer) {
  switch (normalizer) {
    case Normalizer::softmax:
      return "softmax";
    case Normalizer::l2:
      return "l2";
    case Normalizer::rms:
      return "rms";
    case Normalizer::layer:
      return "layer";
    case Normalizer::divide_by_count:
      return "divide_by_count";
    case Normalizer::clamped:
      return "clamped";
    case Normalizer::none:
      return "none";
  }
  return "?";
}

Normalizer parse_normalizer(std::string_view name) {
  std::vector<std::string> names;
  for (Normalizer normalizer : kNormalizers) {
    if (name == name_of(normalizer)) return normalizer;
    names.emplace_back(name_of(normalizer));
  }
  throw Error(std::string(kOp) + ": unknown normalizer '" + std::string(name) + "'" +
              did_you_mean(name, names) + "; known: " + joined(names));
}

void recurrent_softmax_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                 const Tensor& out, const Tensor& core, const Tensor& statistic,
                                 const RecurrentSoftmaxOptions& options, const RunOptions& run) {
  tiled::check_operands(kOp, q, k, v, out, {});
  check_options(options, q);
  const DType type = wide_type(q.dtype());
  const bool plain =
      options.normalizer == Normalizer::softmax && !options.order && !options.gate.defined();
  const bool saved = core.defined() || statistic.defined();
  if (saved) check_saved(q, v, core, statistic);
  Array own_core, own_statistic;
  Tensor engine_out = core, engine_statistic = statistic;
  if (!saved && (plain || out.dtype() == type)) {
    engine_out = out;
  } else if (!saved) {
    engine_out = own_core = Array(type, out.shape());
  }
  if (!saved && !plain) {
    own_statistic = Array(type, {q.size(0), q.size(1), q.size(2)});
    engine_statistic = own_statistic;
  }
  const Call call = make_call(q, k, v, engine_out, engine_statistic, options);
  tiled::forward(call.problem, run);
  if (!saved && plain) return;
  with_wide_type(type, [&]<class T>(T) {
    RowPass<T>(engine_out, engine_statistic, call.plan, options, run).forward(out);
  });
}

Array recurrent_softmax_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                  const RecurrentSoftmaxOptions& options, const RunOptions& run) {
  Array out = empty_result(q, v);
  recurrent_softmax_attention(q, k, v, out, {}, {}, options, run);
  return out;
}

RecurrentSoftmaxGradients recurrent_softmax_attention_backward(
    const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& core,
    const Tensor& statistic, const RecurrentSoftmaxOptions& options, const RunOptions& run) {
  check_grad_out(kOp, grad_out, q, v);
  check_attention(kOp, q, k, v);
  check_options(options, q);
  check_saved(q, v, core, statistic);
  const Call call = make_call(q, k, v, core, statistic, options);
  return with_wide_type(q.dtype(), [&]<class T>(T) {
    return gradients<T>(grad_out, call, q, k, v, core, statistic, options, run);
  });
}

}  // namespace heed
