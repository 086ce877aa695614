// heed eval: how well a language model predicts a text.
#include "llm/eval.h"

#include <fmt/format.h>

#include <memory>

#include "cli/arguments.h"
#include "cli/commands.h"
#include "cli/language_model.h"
#include "cli/terminal.h"
#include "cli/text_files.h"
#include "heed/error.h"
#include "llm/utf8.h"

namespace heed::cli {
namespace {

struct Arguments {
  ModelArguments model;
  std::string text;
  std::optional<int64_t> stride;
  bool json = false;
};

int eval(const Arguments& arguments) {
  const std::string text = read_text("--text", arguments.text);
  LanguageModel loaded = load_model(arguments.model, Use::text);
  const auto tokens = loaded.tokenizer->encode(text);
  const InterruptGuard guard;
  Progress progress("scoring");
  PerplexityOptions options;
  options.stride = arguments.stride;
  options.on_progress = [&](int64_t scored, int64_t total) {
    progress.show(scored, total, fmt::format("{} of {} tokens", scored, total));
    return !guard.interrupted();
  };
  const Perplexity result = perplexity(*loaded.model, tokens, options);
  progress.clear();
  if (to_valid_utf8(text) != text) {
    say("heed: --text: '{}' is not UTF-8 throughout, U+FFFD stood for other bytes\n",
        arguments.text);
  }
  const double rate =
      result.total_seconds > 0 ? static_cast<double>(result.passed) / result.total_seconds : 0;
  const double share =
      result.total_seconds > 0 ? result.attention_seconds / result.total_seconds : 0;
  if (arguments.json) {
    print_json({{"perplexity", finite_or_null(result.perplexity)},
                {"mean_nll", finite_or_null(result.mean_nll)},
                {"tokens", tokens.size()},
                {"scored_tokens", result.scored},
                {"context", loaded.model->context()},
                {"seconds", result.total_seconds},
                {"tokens_per_s", rate},
                {"attention_share", share},
                {"cache_bytes", loaded.model->cache_bytes()},
                {"state_bytes", loaded.model->state_bytes()},
                {"complete", result.complete}});
  } else {
    fmt::print("perplexity {:.4f}  ({} tokens scored, context {}, {:.4f} nats per token)\n",
               result.perplexity, result.scored, loaded.model->context(), result.mean_nll);
    flush_output();
    say("[{:.1f} s, {:.1f} tokens/s, {:.0f} % of the time in attention{}]\n", result.total_seconds,
        rate, 100 * share,
        result.complete ? "" : "; interrupted, the rest of the text is not in it");
  }
  return result.complete ? kOk : kInterrupted;
}

}  // namespace

void add_eval(CLI::App& app, Outcome& outcome) {
  CLI::App* command = app.add_subcommand("eval", "Perplexity of a text under a language model");
  auto arguments = std::make_shared<Arguments>();
  command->add_option("--text", arguments->text, "File with the text, - for standard input")
      ->required();
  add_model_options(*command, arguments->model,
                    "Tokens in a window, 2 or more; without it the model's", 2);
  command
      ->add_option(
          "--stride", arguments->stride,
          "Tokens from window to window, 1 to those of a window, where windows are apart and "
          "the first token of each is not scored; without it half a window")
      ->transform(whole_number(1));
  command->add_flag("--json", arguments->json, "JSON");
  command->footer(
      std::string("After Ctrl-C the result so far is printed and the exit code is 130.\n") +
      kModelFooter);
  command->callback([arguments, &outcome] { outcome.exit_code = eval(*arguments); });
}

}  // namespace heed::cli
