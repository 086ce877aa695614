#include "cli/language_model.h"

#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstring>

#include "cli/arguments.h"
#include "cli/model_file.h"
#include "cli/terminal.h"
#include "heed/error.h"
#include "llm/attention_pattern.h"

namespace heed::cli {
namespace {

volatile std::sig_atomic_t g_interrupted = 0;  // a signal handler can reach nothing else

extern "C" void on_interrupt(int) { g_interrupted = 1; }

}  // namespace

void add_model_options(CLI::App& command, ModelArguments& arguments, const char* context_help,
                       int64_t least_context) {
  command
      .add_option(
          "--model", arguments.model,
          "GGUF file, smollm2, or NAME for NAME.gguf in a folder of the environment variable "
          "HEED_MODELS (folders apart by ':')")
      ->capture_default_str();
  command
      .add_option(
          "--attention", arguments.attention,
          "In the place of the model's attention: NAME or NAME:key=value,...; A/B: by turns "
          "over the layers; 15xA/15xB: fifteen layers A, then fifteen B")
      ->capture_default_str();
  command.add_option(
      "--dtype", arguments.dtype,
      "f32 (exact), bf16 or int4 (weights as they are quantised; in long prompts activations "
      "are rounded to int8, or both to bf16); without it what suits the file");
  command.add_option("--context", arguments.context, context_help)
      ->transform(whole_number(least_context));
  add_threads(command, arguments.threads,
              "Threads; without it all cores, or what a container grants");
}

LanguageModel load_model(const ModelArguments& arguments, Use use) {
  use_threads(arguments.threads);
  (void)forced_isa();  // what is wrong with HEED_ISA is none of --attention
  ModelOptions options;
  if (arguments.dtype) {
    options.dtype = reading("--dtype", [&] { return parse_model_dtype(*arguments.dtype); });
  }
  options.run.threads = arguments.threads;
  options.context = arguments.context;
  LanguageModel loaded;
  loaded.file = std::make_unique<GgufFile>(GgufFile::open(find_model(arguments.model)));
  const ModelConfig config = read_model_config(*loaded.file);
  options.attention =
      reading("--attention", [&] { return parse_attention(arguments.attention, config); });
  const bool has_cache =
      std::any_of(options.attention.begin(), options.attention.end(),
                  [](const ModelAttention& layer) { return layer.over_cache != nullptr; });
  loaded.tokenizer = std::make_unique<Tokenizer>(*loaded.file);
  // More rows than tokens are padding.
  if (config.vocab < loaded.tokenizer->vocab_size()) {
    loaded.file->fail("token_embd.weight has " + std::to_string(config.vocab) +
                      " rows, one for each of the tokenizer's " +
                      std::to_string(loaded.tokenizer->vocab_size()) + " tokens is needed");
  }
  if (use == Use::chat) loaded.chat.emplace(*loaded.file, *loaded.tokenizer);
  loaded.model = std::make_unique<Model>(*loaded.file, std::move(options));
  if (has_cache && loaded.model->context() > config.context) {
    say("heed: --context {}: the model was trained for {} tokens\n", loaded.model->context(),
        config.context);
  }
  return loaded;
}

InterruptGuard::InterruptGuard(bool ends_waiting) {
  g_interrupted = 0;
  sigaction(SIGINT, nullptr, &before_);
  if (before_.sa_handler == SIG_IGN) return;
  struct sigaction action{};
  action.sa_handler = on_interrupt;
  // With SA_RESTART a write to a full pipe waits on instead of failing; a second signal ends it.
  action.sa_flags = static_cast<int>(SA_RESETHAND) | (ends_waiting ? 0 : SA_RESTART);
  sigaction(SIGINT, &action, nullptr);
}

InterruptGuard::~InterruptGuard() { sigaction(SIGINT, &before_, nullptr); }

bool InterruptGuard::interrupted() const { return g_interrupted != 0; }

}  // namespace heed::cli
