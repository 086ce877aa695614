#include "engine/operands.h"
#include "engine/tiled/problem.h"
#include "heed/parallax_attention.h"
#include "mechanisms/results.h"

namespace heed {

namespace {

constexpr const char* kOp = "parallax_attention";

tiled::Problem make_problem(const Tensor& q, const Tensor& r, const Tensor& k, const Tensor& v,
                            const Tensor& out, const ParallaxStatistics& statistics,
                            const ParallaxOptions& options) {
  tiled::check_operands(kOp, q, k, v, out, statistics.lse);
  check_rows_like(kOp, "r", r, q.shape(), q.dtype());
  const DType type = wide_type(q.dtype());
  if (statistics.v_mean.defined()) {
    check_rows_like(kOp, "v_mean", statistics.v_mean, out.shape(), type);
  }
  check_result(kOp, "t_mean", statistics.t_mean, {q.size(0), q.size(1), q.size(2)}, type);
  tiled::Problem problem;
  problem.sequences = tiled::batch_sequences(
      q, k, v, out, statistics.lse,
      tiled::TilePlan::from_masks(kOp, options.masks, q.size(0), q.size(2), k.size(2)));
  for (tiled::Sequence& s : problem.sequences) {
    s.r = r.select(0, s.batch);
    if (statistics.v_mean.defined()) s.v_mean = statistics.v_mean.select(0, s.batch);
    if (statistics.t_mean.defined()) s.t_mean = statistics.t_mean.select(0, s.batch);
  }
  problem.scale = tiled::resolve_scale(kOp, options.scale, q.size(3));
  return problem;
}

}  // namespace

void parallax_attention(const Tensor& q, const Tensor& r, const Tensor& k, const Tensor& v,
                        const Tensor& out, const ParallaxStatistics& statistics,
                        const ParallaxOptions& options, const RunOptions& run) {
  tiled::forward(make_problem(q, r, k, v, out, statistics, options), run);
}

ParallaxResult parallax_attention(const Tensor& q, const Tensor& r, const Tensor& k,
                                  const Tensor& v, const ParallaxOptions& options,
                                  const RunOptions& run) {
  ParallaxResult result{empty_result(q, v), empty_result(q, v, wide_type(q.dtype())),
                        empty_statistic(q), empty_statistic(q)};
  parallax_attention(q, r, k, v, result.out, result.statistics(), options, run);
  return result;
}

ParallaxGradients parallax_attention_backward(const Tensor& grad_out, const Tensor& grad_lse,
                                              const Tensor& q, const Tensor& r, const Tensor& k,
                                              const Tensor& v, const Tensor& out,
                                              const ParallaxStatistics& statistics,
                                              const ParallaxOptions& options,
                                              const RunOptions& run) {
  const tiled::Problem problem = make_problem(q, r, k, v, out, statistics, options);
  for (const auto& [name, t] :
       {std::pair("v_mean", &statistics.v_mean), std::pair("t_mean", &statistics.t_mean)}) {
    if (t->defined()) continue;
    fail(kOp, std::string(name) + " is missing", "the backward needs what the forward returned");
  }
  tiled::check_backward(kOp, grad_out, grad_lse, out, statistics.lse);
  ParallaxGradients to{empty_like(q), empty_like(r), empty_like(k), empty_like(v)};
  auto gradients = tiled::batch_gradients(grad_out, grad_lse, to.q, to.k, to.v);
  for (size_t b = 0; b < gradients.size(); ++b) {
    gradients[b].r = to.r.view().select(0, static_cast<int64_t>(b));
  }
  tiled::backward(problem, gradients, nullptr, run);
  return to;
}

}  // namespace heed
