// heed run: a language model answers, once or in a conversation.
#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <iostream>
#include <limits>
#include <memory>

#include "base/text.h"
#include "cli/arguments.h"
#include "cli/commands.h"
#include "cli/language_model.h"
#include "cli/terminal.h"
#include "cli/text_files.h"
#include "heed/error.h"
#include "llm/chat.h"
#include "llm/generate.h"
#include "llm/utf8.h"

namespace heed::cli {
namespace {

struct Arguments {
  ModelArguments model;
  std::optional<std::string> prompt, file, system;
  bool no_chat = false, json = false;
  GenerateOptions generate;
  std::string draw_option;  // one that was given and speaks of draws
};

// The newline that ends the last line of a file is none of the prompt.
std::string without_last_newline(std::string text) {
  for (const std::string_view end : {"\r\n", "\n"}) {
    if (!text.ends_with(end)) continue;
    text.resize(text.size() - end.size());
    break;
  }
  return text;
}

// The tokenizer would read other bytes as U+FFFD.
std::string utf8_of(std::string_view option, std::string text) {
  if (const auto at = first_ill_formed(text)) {
    throw Error(fmt::format("{}: found byte 0x{:02x} at offset {}, needed UTF-8", option,
                            static_cast<unsigned char>(text[*at]), *at));
  }
  return text;
}

// The prompt that was given, from the option, a file, or a pipe; none: a conversation.
std::optional<std::string> given_prompt(const Arguments& arguments) {
  if (arguments.prompt) return utf8_of("--prompt", *arguments.prompt);
  constexpr size_t kMost = size_t{1} << 28;  // more than any context holds; a pipe may never end
  const auto read = [](const char* option, const std::string& path) {
    return utf8_of(option, without_last_newline(read_text(option, path, kMost)));
  };
  if (arguments.file) return read("--file", *arguments.file);
  if (!is_terminal(stdin)) return read("standard input", "-");
  return std::nullopt;
}

Json result_json(const GenerateResult& result, const std::string& text, const Model& model) {
  return {{"prompt_tokens", result.prompt_tokens},
          {"prompt_tokens_read", result.read_tokens},
          {"tokens", result.tokens},
          {"text", text},
          {"prefill_tokens_per_s", result.prefill_tokens_per_s()},
          {"decode_tokens_per_s", result.decode_tokens_per_s()},
          {"attention_share", result.attention_share()},
          {"cache_bytes", model.cache_bytes()},
          {"state_bytes", model.state_bytes()},
          {"stop", name_of(result.stop)}};
}

std::string memory_text(const Model& model) {
  const auto part = [](const char* name, size_t bytes) {
    return bytes == 0 ? "" : fmt::format("; {} {:.1f} MB", name, static_cast<double>(bytes) / 1e6);
  };
  return part("cache", model.cache_bytes()) + part("states", model.state_bytes());
}

void print_statistics(const GenerateResult& result, const Model& model) {
  std::string line = fmt::format("prompt {} tokens, {:.1f} tokens/s", result.read_tokens,
                                 result.prefill_tokens_per_s());
  if (result.reused_tokens > 0)
    line += fmt::format(" ({} more known already)", result.reused_tokens);
  line += fmt::format("; answer {} tokens", result.tokens.size());
  if (result.decoded_tokens > 0)
    line += fmt::format(", {:.1f} tokens/s", result.decode_tokens_per_s());
  line += fmt::format("; {:.0f} % of the time in attention", 100 * result.attention_share());
  line += memory_text(model);
  if (result.stop == StopReason::context) line += "; stopped: the context is full";
  if (result.stop == StopReason::max_tokens) line += "; stopped at --max-tokens";
  if (result.stop == StopReason::cancelled) line += "; interrupted";
  say("[{}]\n", line);
}

/// A model that answers prompts and shows the words as they come.
class Speaker {
 public:
  Speaker(LanguageModel& loaded, const Arguments& arguments)
      : loaded_(loaded), arguments_(arguments), generator_(*loaded.model) {}

  struct Answer {
    GenerateResult result;
    std::string text;
  };
  /// `opens_text`: the answer is a text of its own, not the continuation of the prompt.
  Answer answer(std::span<const int32_t> prompt, std::vector<int32_t> stop_tokens,
                bool opens_text) {
    StreamDecoder stream(*loaded_.tokenizer, opens_text);
    Answer answer;
    const auto show = [&](const std::string& text) {
      answer.text += text;
      if (arguments_.json) return;
      std::fwrite(text.data(), 1, text.size(), stdout);
      flush_output();
    };
    const InterruptGuard guard;
    Progress progress("reading the prompt");
    GenerateOptions options = arguments_.generate;
    options.vocab = loaded_.tokenizer->vocab_size();
    options.stop_tokens = std::move(stop_tokens);
    options.on_prompt = [&](int64_t done, int64_t total) {
      progress.show(done, total, fmt::format("{} of {} tokens", done, total));
      if (done == total) progress.clear();
      return !guard.interrupted();
    };
    options.on_token = [&](int32_t token) {
      show(stream.put(token));
      return !guard.interrupted();
    };
    answer.result = generator_.generate(prompt, options);
    progress.clear();
    show(stream.finish());
    return answer;
  }

 private:
  LanguageModel& loaded_;
  const Arguments& arguments_;
  Generator generator_;
};

std::vector<ChatMessage> opening(const Arguments& arguments) {
  if (!arguments.system) return {};
  return {{"system", *arguments.system}};
}

int answer_once(LanguageModel& loaded, const Arguments& arguments, const std::string& prompt) {
  Speaker speaker(loaded, arguments);
  Speaker::Answer answer;
  if (arguments.no_chat) {
    // The text is the operator's own, who alone can write the turns of a chat form that is not known here.
    const auto tokens =
        loaded.tokenizer->encode(prompt, {.parse_specials = true, .to_continue = true});
    answer = speaker.answer(tokens, loaded.tokenizer->end_tokens(), false);
  } else {
    const ChatTemplate& chat = loaded.chat.value();
    std::vector<ChatMessage> messages = opening(arguments);
    messages.push_back({"user", prompt});
    answer = speaker.answer(chat.render(messages), chat.stop_tokens(), true);
  }
  if (arguments.json) {
    print_json(result_json(answer.result, answer.text, *loaded.model));
  } else {
    fmt::print("\n");
    flush_output();
    print_statistics(answer.result, *loaded.model);
  }
  return answer.result.stop == StopReason::cancelled ? kInterrupted : kOk;
}

constexpr const char* kCommands =
    "/reset starts a new conversation, /exit or /quit ends, /help says this";
constexpr const char* kKeys = "Ctrl-C stops an answer, Ctrl-D ends";

struct Line {
  std::optional<std::string> text;  // none: the conversation is over
  int exit_code = kOk;
};

// The next line that says something; none after the last one or two times Ctrl-C in a row.
Line next_line() {
  for (bool warned = false;;) {
    fmt::print("{}", bold("> "));
    flush_output();
    const InterruptGuard guard(true);
    std::string line;
    if (std::getline(std::cin, line)) {
      if (!trimmed(line).empty()) return {line};
      warned = false;
      continue;
    }
    if (!guard.interrupted()) return {};
    if (warned) return {std::nullopt, kInterrupted};
    warned = true;
    std::clearerr(stdin);
    std::cin.clear();
    say("\nCtrl-D or Ctrl-C once more ends\n");
  }
}

// What the kernel keeps of a line that is typed, without the newline (termios(3)).
constexpr size_t kTerminalLine = 4095;

// "/rset", but not "/etc/hosts is empty".
bool is_word_after_slash(std::string_view text) {
  return text.starts_with('/') && text.find_first_of(" \t/", 1) == std::string_view::npos;
}

/// Questions and their answers.
class Conversation {
 public:
  Conversation(LanguageModel& loaded, const Arguments& arguments)
      : loaded_(loaded), arguments_(arguments), speaker_(loaded, arguments) {
    reset();
  }
  void reset() { messages_ = opening(arguments_); }

  /// Where this fails, the question is as never asked.
  void ask(const std::string& question) {
    std::vector<ChatMessage> messages = messages_;
    messages.push_back({"user", question});
    const std::vector<int32_t> prompt = fitting_prompt(messages);
    const int64_t context = loaded_.model->context();
    if (static_cast<int64_t>(prompt.size()) > context) {
      say("heed: the question is too long: it has {} tokens in the chat form, the context holds "
          "{}; a larger --context at the start takes longer ones\n",
          prompt.size(), context);
      return;
    }
    const auto answer = speaker_.answer(prompt, chat().stop_tokens(), true);
    fmt::print("\n");
    flush_output();
    print_statistics(answer.result, *loaded_.model);
    if (answer.result.tokens.empty() && answer.result.stop == StopReason::cancelled) {
      messages.pop_back();  // nobody answered
    } else {
      messages.push_back({"assistant", answer.text});
    }
    messages_ = std::move(messages);
  }

 private:
  const ChatTemplate& chat() const { return loaded_.chat.value(); }
  std::vector<int32_t> fitting_prompt(std::vector<ChatMessage>& messages) const;

  LanguageModel& loaded_;
  const Arguments& arguments_;
  Speaker speaker_;
  std::vector<ChatMessage> messages_;
};

// The prompt of the messages; where it leaves no room for an answer, without the oldest of them. Then a
// quarter of the context is made free at once: a prompt that begins otherwise is read from there again,
// which each question would cost if it were only as much as one answer needs.
std::vector<int32_t> Conversation::fitting_prompt(std::vector<ChatMessage>& messages) const {
  const int64_t context = loaded_.model->context(), quarter = context / 4;
  std::vector<int32_t> prompt = chat().render(messages);
  const auto fits = [&](int64_t room) {
    return static_cast<int64_t>(prompt.size()) <= context - room;
  };
  if (fits(std::min(arguments_.generate.max_tokens, quarter))) return prompt;
  const size_t first = messages.front().role == "system" ? 1 : 0;
  int forgotten = 0;
  while (messages.size() > first + 1 && !fits(quarter)) {
    const auto oldest = messages.begin() + static_cast<std::ptrdiff_t>(first);
    messages.erase(oldest, oldest + 2);
    ++forgotten;
    prompt = chat().render(messages);
  }
  if (forgotten > 0 && fits(0)) {
    say("heed: the context of {} tokens is full, so {} forgotten\n", context,
        forgotten == 1 ? "the oldest question and its answer are"
                       : fmt::format("the {} oldest questions and their answers are", forgotten));
  }
  return prompt;
}

int converse(LanguageModel& loaded, const Arguments& arguments) {
  Conversation conversation(loaded, arguments);
  say("{}, {}\n", kCommands, kKeys);
  Line next;
  while ((next = next_line()).text) {
    const std::string& line = *next.text;
    const std::string_view command = trimmed(line);
    if (command == "/exit" || command == "/quit") return kOk;
    if (command == "/reset") {
      conversation.reset();
      continue;
    }
    if (command == "/help") {
      say("{}, {}\n", kCommands, kKeys);
      continue;
    }
    if (line.size() == kTerminalLine) {
      say("heed: the terminal cuts a line at {} bytes, so nothing was asked; -f FILE takes longer "
          "prompts\n",
          kTerminalLine);
      continue;
    }
    if (const auto at = first_ill_formed(line)) {
      say("heed: the line is not UTF-8 from byte {} on, so nothing was asked\n", *at);
      continue;
    }
    if (is_word_after_slash(command)) {
      say("there is no {}: {}\n", command, kCommands);
      continue;
    }
    try {
      conversation.ask(line);
    } catch (const Error& error) {
      say("heed: {}; /reset starts a new conversation\n", error.what());
    }
  }
  fmt::print("\n");
  return next.exit_code;
}

int run(const Arguments& arguments) {
  if (arguments.system && arguments.no_chat) {
    throw Error("--system: --no-chat has no system message");
  }
  if (arguments.system) (void)utf8_of("--system", *arguments.system);
  const auto prompt = given_prompt(arguments);
  if (!prompt && (arguments.no_chat || arguments.json)) {
    throw Error("--no-chat and --json need a prompt: -p TEXT, -f FILE or standard input");
  }
  if (prompt && prompt->empty()) throw Error("the prompt is empty");
  (void)Sampler(arguments.generate.sampler);  // its errors before the weights are read
  if (!arguments.draw_option.empty() && arguments.generate.sampler.temperature == 0) {
    throw Error(arguments.draw_option +
                ": at --temperature 0 nothing is drawn, a --temperature above 0 is needed");
  }
  LanguageModel loaded = load_model(arguments.model, arguments.no_chat ? Use::text : Use::chat);
  return prompt ? answer_once(loaded, arguments, *prompt) : converse(loaded, arguments);
}

}  // namespace

void add_run(CLI::App& app, Outcome& outcome) {
  CLI::App* command = app.add_subcommand("run", "Let a language model answer, once or in a chat");
  auto arguments = std::make_shared<Arguments>();
  SamplerOptions& sampler = arguments->generate.sampler;
  CLI::Option* prompt = command->add_option("-p,--prompt", arguments->prompt, "What to answer");
  command->add_option("-f,--file", arguments->file, "File with the prompt, - for standard input")
      ->excludes(prompt);
  command->add_flag("--no-chat", arguments->no_chat,
                    "Continue the text as it is, without roles; texts of special tokens in it, as "
                    "<|user|> or <s>, are those tokens, and a begin token is not doubled");
  command->add_option("--system", arguments->system, "System message instead of the model's own");
  add_model_options(*command, arguments->model,
                    "Tokens of prompt and answer, its last one apart; without it the model's");
  command->add_option("--max-tokens", arguments->generate.max_tokens, "Longest answer")
      ->transform(whole_number(0))
      ->capture_default_str();
  command
      ->add_option("--temperature", sampler.temperature,
                   "0: always the most probable token; --top-k, --top-p, --min-p and --seed need "
                   "more")
      ->capture_default_str();
  const std::vector<CLI::Option*> draws = {
      command->add_option("--top-k", sampler.top_k, "Draw among this many most probable tokens")
          ->transform(whole_number(1, std::numeric_limits<int>::max())),
      command
          ->add_option("--top-p", sampler.top_p, "Draw among the fewest tokens of this probability")
          ->capture_default_str(),
      command->add_option("--min-p", sampler.min_p, "Draw among tokens of this share of the best's")
          ->capture_default_str(),
      command->add_option("--seed", sampler.seed, "Seed of the draws")
          ->transform(whole_number(0, std::numeric_limits<uint64_t>::max()))
          ->capture_default_str()};
  command->add_flag(
      "--json", arguments->json,
      "JSON at the end instead of words as they come; prompt_tokens_read is less than "
      "prompt_tokens where Ctrl-C came while the prompt was read");
  command->footer(
      std::string(
          "--top-k, --top-p and --min-p choose, in this order, by probabilities before the\n"
          "temperature, which then divides the logits of what is left.\n"
          "Without -p and -f, a chat starts on a terminal (/help lists its commands); standard\n"
          "input that is piped is one prompt.\n"
          "After Ctrl-C the statistics are printed and the exit code is 130; a chat goes on, and "
          "two\n"
          "times Ctrl-C at its prompt end it with 130, Ctrl-D and /exit with 0.\n") +
      kModelFooter);
  command->callback([arguments, draws, &outcome] {
    for (const CLI::Option* option : draws) {
      if (option->count() > 0) arguments->draw_option = option->get_name();
    }
    outcome.exit_code = run(*arguments);
  });
}

}  // namespace heed::cli
