// A loaded language model and the options that heed run and heed eval share.
#pragma once
#include <CLI/CLI.hpp>
#include <csignal>
#include <memory>
#include <optional>
#include <string>

#include "llm/chat.h"
#include "llm/gguf.h"
#include "llm/model.h"
#include "llm/tokenizer.h"

namespace heed::cli {

struct ModelArguments {
  std::string model = "smollm2", attention = "flash";
  std::optional<std::string> dtype;
  std::optional<int64_t> context;
  std::optional<int> threads;
};
void add_model_options(CLI::App& command, ModelArguments& arguments, const char* context_help,
                       int64_t least_context = 1);
/// Where the help of these options goes on.
inline constexpr const char* kModelFooter = "docs/real-model.md says more of --attention.";

struct LanguageModel {
  std::unique_ptr<GgufFile> file;  // outlives the others
  std::unique_ptr<Tokenizer> tokenizer;
  std::optional<ChatTemplate> chat;  // where it was asked for
  std::unique_ptr<Model> model;
};
enum class Use { text, chat };
/// Checks every argument, and for a chat the model's form of it, before it reads the weights.
LanguageModel load_model(const ModelArguments& arguments, Use use);

/// Catches Ctrl-C while it lives: the first one only sets `interrupted`, a second one ends the
/// program. Where the parent had it ignored, it stays so.
class InterruptGuard {
 public:
  /// `ends_waiting`: the first one also ends a read or write that waits, which then fails.
  explicit InterruptGuard(bool ends_waiting = false);
  ~InterruptGuard();
  InterruptGuard(const InterruptGuard&) = delete;
  InterruptGuard& operator=(const InterruptGuard&) = delete;
  bool interrupted() const;

 private:
  struct sigaction before_{};
};

inline constexpr int kInterrupted = 130;  // exit code after Ctrl-C, as in a shell

}  // namespace heed::cli
