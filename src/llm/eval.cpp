#include "llm/eval.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "heed/error.h"
#include "kernels/transformer_rows.h"
#include "llm/model.h"

namespace heed {

Perplexity perplexity(Model& model, std::span<const int32_t> tokens,
                      const PerplexityOptions& options) {
  const int64_t count = static_cast<int64_t>(tokens.size());
  if (count < 2) {
    throw Error("text: it has " + std::to_string(count) + " tokens, at least 2 are needed");
  }
  const int64_t context = model.context();
  if (context < 2) {
    throw Error("context is " + std::to_string(context) + ", at least 2 is needed");
  }
  const int64_t stride = options.stride.value_or(context / 2);
  if (stride < 1 || stride > context) {
    throw Error("stride is " + std::to_string(stride) + ", 1 to " + std::to_string(context) +
                " is needed");
  }
  Perplexity result;
  double sum = 0;
  const double attention_before = model.attention_seconds(), total_before = model.total_seconds();
  model.prepare(count);
  const int64_t windows = stride < context ? 1 : 1 + (count - 1) / context;
  const int64_t total = count - windows;  // the first token of windows that are apart is not scored
  int64_t next = 1;                       // the token to score; the row before it gives its logits
  bool go_on = true, finite = true;
  for (int64_t begin = 0; go_on && result.scored < total; begin += stride) {
    next = std::max(next, begin + 1);
    const int64_t end = std::min(count, begin + context);
    (void)model.truncate(0);  // leaves none
    const int64_t rows = end - begin - 1;
    model.reserve(rows);
    // Part by part, as the model would cut it anyway: a long window can be stopped.
    const int64_t parts = 1 + (rows - 1) / model.chunk();
    for (int64_t part = 0; go_on && part < parts; ++part) {
      const int64_t from = begin + rows * part / parts, to = begin + rows * (part + 1) / parts;
      model.append(
          tokens.subspan(static_cast<size_t>(from), static_cast<size_t>(to - from)),
          std::max<int64_t>(0, next - 1 - from), [&](int64_t i, std::span<const float> logits) {
            next = from + i + 1;
            const int32_t token = tokens[static_cast<size_t>(next++)];
            const double all = log_sum_exp(logits.data(), static_cast<int64_t>(logits.size()));
            finite = finite && std::isfinite(all);
            sum += all - static_cast<double>(logits[static_cast<size_t>(token)]);
            ++result.scored;
          });
      if (!finite) {
        throw Error(
            "perplexity: the logits for tokens " + std::to_string(from + 1) + " to " +
            std::to_string(to) +
            " hold NaN or infinity, needed finite ones or -inf; the model or its --attention "
            "overflowed");
      }
      result.passed += to - from;
      if (options.on_progress) go_on = options.on_progress(result.scored, total);
    }
  }
  result.complete = result.scored == total;
  result.mean_nll = sum / static_cast<double>(result.scored);
  result.perplexity = std::exp(result.mean_nll);
  result.attention_seconds = model.attention_seconds() - attention_before;
  result.total_seconds = model.total_seconds() - total_before;
  return result;
}

}  // namespace heed
