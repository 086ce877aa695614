#include "llm/chat.h"

#include <algorithm>
#include <array>
#include <optional>
#include <string_view>

#include "heed/error.h"
#include "llm/gguf.h"
#include "llm/shown.h"
#include "llm/tokenizer.h"

namespace heed {
namespace {

constexpr const char* kWayOut =
    "; use --no-chat to continue the text as it is, with special tokens where you write them";

std::optional<ChatFormat> recognise(std::string_view text) {
  auto has = [&](std::string_view marker) { return text.find(marker) != std::string_view::npos; };
  // <|im_sep|> belongs to a relative of ChatML that writes roles differently.
  if (has("<|im_start|>") && has("<|im_end|>") && !has("<|im_sep|>")) return ChatFormat::kChatMl;
  if (has("<|start_header_id|>") && has("<|end_header_id|>") && has("<|eot_id|>"))
    return ChatFormat::kLlama3;
  if (has("[INST]") && has("<<SYS>>")) return ChatFormat::kLlama2;
  return std::nullopt;
}

// The text of a Jinja string literal without its escapes.
std::string unescaped(std::string_view literal) {
  std::string out;
  for (size_t i = 0; i < literal.size(); ++i) {
    char c = literal[i];
    if (c == '\\' && i + 1 < literal.size()) {
      c = literal[++i];
      if (c == 'n') c = '\n';
      if (c == 't') c = '\t';
    }
    out += c;
  }
  return out;
}

// The next such quote from `begin` on that no backslash stands before.
size_t find_quote(std::string_view text, char quote, size_t begin) {
  for (size_t i = begin; i < text.size(); ++i) {
    if (text[i] == '\\') {
      ++i;
    } else if (text[i] == quote) {
      return i;
    }
  }
  return std::string_view::npos;
}

// A ChatML template gives its default system message as one literal, from the start marker to the end
// marker: '<|im_start|>system\nYou are ...<|im_end|>\n'. Empty when there is none.
std::string find_default_system(std::string_view text) {
  constexpr std::string_view kOpen = "<|im_start|>system", kClose = "<|im_end|>";
  // What comes next after a literal's begin. As begins only grow, each is looked for where the last one
  // was passed, so that a template takes time in proportion to its length whatever it repeats.
  size_t end = 0, single_quote = 0, double_quote = 0;
  for (size_t at = text.find(kOpen); at != std::string_view::npos; at = text.find(kOpen, at + 1)) {
    if (at == 0 || (text[at - 1] != '\'' && text[at - 1] != '"')) continue;
    const char quote = text[at - 1];
    const size_t begin = at + kOpen.size();
    if (end < begin) end = text.find(kClose, begin);
    if (end == std::string_view::npos) break;
    const std::string_view literal = text.substr(begin, end - begin);
    const std::string start = unescaped(literal.substr(0, 3));
    if (start.size() < 2 || start[0] != '\n') continue;
    size_t& closing = quote == '"' ? double_quote : single_quote;
    if (closing < begin) closing = find_quote(text, quote, begin);
    if (closing < end) continue;  // the literal ends before its end marker: it is no whole message
    return unescaped(literal).substr(1);
  }
  return {};
}

// What a ChatML template writes behind "assistant\n" where an answer begins, as one literal:
// '<|im_start|>assistant\n<think>\n'. Mostly nothing.
std::string find_answer_start(std::string_view text) {
  constexpr std::string_view kOpen = "<|im_start|>assistant";
  const size_t asked = text.rfind("add_generation_prompt");
  const size_t at = asked == std::string_view::npos ? asked : text.find(kOpen, asked);
  if (at == std::string_view::npos || (text[at - 1] != '\'' && text[at - 1] != '"')) return {};
  const size_t begin = at + kOpen.size();
  size_t end = begin;
  while (end < text.size() && text[end] != text[at - 1]) end += text[end] == '\\' ? 2 : 1;
  if (end >= text.size()) return {};
  const std::string rest = unescaped(text.substr(begin, end - begin));
  return rest.starts_with('\n') ? rest.substr(1) : std::string();
}

// Whether a template says `message['content'] | trim`.
bool trims_contents(std::string_view text) {
  std::string dense(text);
  std::erase_if(dense,
                [](char c) { return std::string_view(" '\"]").find(c) != std::string::npos; });
  return dense.find("content|trim") != std::string::npos;
}

// What str.strip() of Python removes, which templates call: White_Space of Unicode and U+001C to U+001F.
constexpr std::array<std::string_view, 29> kSpaces = {
    " ",      "\t",     "\n",     "\v",     "\f",     "\r",     "\x1c",   "\x1d",
    "\x1e",   "\x1f",   "\u0085", "\u00a0", "\u1680", "\u2000", "\u2001", "\u2002",
    "\u2003", "\u2004", "\u2005", "\u2006", "\u2007", "\u2008", "\u2009", "\u200a",
    "\u2028", "\u2029", "\u202f", "\u205f", "\u3000"};

std::string_view stripped(std::string_view text) {
  const auto space_at = [&](auto is_at) {
    const auto found = std::find_if(kSpaces.begin(), kSpaces.end(), is_at);
    return found == kSpaces.end() ? size_t{0} : found->size();
  };
  const auto begins = [&](std::string_view space) { return text.starts_with(space); };
  const auto ends = [&](std::string_view space) { return text.ends_with(space); };
  while (const size_t bytes = space_at(begins)) text.remove_prefix(bytes);
  while (const size_t bytes = space_at(ends)) text.remove_suffix(bytes);
  return text;
}

// An answer without what the model thought before it.
std::string_view without_thoughts(std::string_view text) {
  constexpr std::string_view kEnd = "</think>";
  const size_t end = text.rfind(kEnd);
  if (end == std::string_view::npos) return text;
  text.remove_prefix(end + kEnd.size());
  text.remove_prefix(std::min(text.find_first_not_of('\n'), text.size()));
  return text;
}

[[noreturn]] void bad_message(size_t index, const std::string& what) {
  throw Error("chat: messages[" + std::to_string(index) + "] " + what);
}

void check_roles(std::span<const ChatMessage> messages) {
  if (messages.empty()) throw Error("chat: messages is empty, needed at least one");
  for (size_t i = 0; i < messages.size(); ++i) {
    const std::string& role = messages[i].role;
    if (role != "system" && role != "user" && role != "assistant")
      bad_message(i, "has role " + shown(role) + ", needed system, user or assistant");
    if (role == "system" && i > 0) bad_message(i, "has role system, needed it only in messages[0]");
  }
}

}  // namespace

// Collects tokens. Text is held back until a marker follows, because neighbouring pieces of text are
// tokenised as one.
class ChatTemplate::Writer {
 public:
  explicit Writer(const Tokenizer& tokenizer) : tokenizer_(tokenizer) {}

  Writer& text(std::string_view part) {
    text_ += part;
    return *this;
  }
  Writer& token(int32_t id) {
    flush();
    ids_.push_back(id);
    return *this;
  }
  std::vector<int32_t> finish() {
    flush();
    return std::move(ids_);
  }

 private:
  void flush() {
    if (text_.empty()) return;
    EncodeOptions plain{.parse_specials = false, .add_bos_eos = false};
    std::vector<int32_t> more = tokenizer_.encode(text_, plain);
    ids_.insert(ids_.end(), more.begin(), more.end());
    text_.clear();
  }

  const Tokenizer& tokenizer_;
  std::string text_;
  std::vector<int32_t> ids_;
};

ChatTemplate::ChatTemplate(const GgufFile& file, const Tokenizer& tokenizer)
    : tokenizer_(&tokenizer), stop_tokens_(tokenizer.end_tokens()) {
  std::optional<std::string_view> text = file.string("tokenizer.chat_template");
  if (!text)
    throw Error("chat: the model file has no tokenizer.chat_template" + std::string(kWayOut));
  std::optional<ChatFormat> format = recognise(*text);
  if (!format)
    throw Error("chat: tokenizer.chat_template " + shown(*text) +
                " is not recognised, needed ChatML, Llama 2 or Llama 3" + kWayOut);
  format_ = *format;

  auto marker = [&](std::string_view name) {
    std::optional<int32_t> id = tokenizer.find_special(name);
    if (!id)
      throw Error("chat: tokenizer.chat_template uses " + shown(name) +
                  ", needed a control token of that text in the vocabulary" + kWayOut);
    return *id;
  };
  auto end = [&](std::optional<int32_t> id, const char* key) {
    if (!id)
      throw Error("chat: the chat form uses a begin or end token, needed " + std::string(key) +
                  kWayOut);
    return *id;
  };
  switch (format_) {
    case ChatFormat::kChatMl:
      if (tokenizer.adds_bos()) bos_ = tokenizer.bos().value_or(-1);
      open_ = marker("<|im_start|>");
      turn_end_ = marker("<|im_end|>");
      default_system_ = find_default_system(*text);
      answer_start_ = find_answer_start(*text);
      trims_ = trims_contents(*text);
      drops_thoughts_ = text->find("split('</think>')") != std::string_view::npos;
      break;
    case ChatFormat::kLlama2:
      bos_ = end(tokenizer.bos(), "tokenizer.ggml.bos_token_id");
      turn_end_ = end(tokenizer.eos(), "tokenizer.ggml.eos_token_id");
      break;
    case ChatFormat::kLlama3:
      bos_ = end(tokenizer.bos(), "tokenizer.ggml.bos_token_id");
      open_ = marker("<|start_header_id|>");
      role_end_ = marker("<|end_header_id|>");
      turn_end_ = marker("<|eot_id|>");
      // Llama 3.1 and later put dates before the system message; the second is the fixed fallback of
      // their templates, so that a conversation always gives the same tokens.
      if (text->find("Cutting Knowledge Date: December 2023") != std::string_view::npos)
        system_preamble_ = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n";
  }
}

std::vector<int32_t> ChatTemplate::render(std::span<const ChatMessage> messages,
                                          bool add_generation_prompt) const {
  check_roles(messages);
  Writer out(*tokenizer_);
  switch (format_) {
    case ChatFormat::kChatMl:
      render_chatml(messages, add_generation_prompt, out);
      break;
    case ChatFormat::kLlama2:
      render_llama2(messages, out);
      break;
    case ChatFormat::kLlama3:
      render_llama3(messages, add_generation_prompt, out);
      break;
  }
  return out.finish();
}

void ChatTemplate::render_chatml(std::span<const ChatMessage> messages, bool prompt,
                                 Writer& out) const {
  if (bos_ >= 0) out.token(bos_);
  auto turn = [&](std::string_view role, std::string_view content) {
    out.token(open_).text(role).text("\n").text(content).token(turn_end_).text("\n");
  };
  if (messages[0].role != "system" && !default_system_.empty()) turn("system", default_system_);
  const auto question = std::find_if(messages.rbegin(), messages.rend(),
                                     [](const ChatMessage& m) { return m.role == "user"; });
  const auto answered = static_cast<size_t>(messages.rend() - question);  // messages up to it
  for (size_t i = 0; i < messages.size(); ++i) {
    const auto& [role, content] = messages[i];
    const bool drops = drops_thoughts_ && role == "assistant" && i < answered;
    const std::string_view said = drops ? without_thoughts(content) : content;
    turn(role, trims_ ? stripped(said) : said);
  }
  if (prompt) out.token(open_).text("assistant\n").text(answer_start_);
}

void ChatTemplate::render_llama2(std::span<const ChatMessage> messages, Writer& out) const {
  std::string system;
  size_t first = 0;
  if (messages[0].role == "system") {
    system = "<<SYS>>\n" + messages[0].content + "\n<</SYS>>\n\n";
    first = 1;
    if (messages.size() == 1)
      throw Error("chat: messages has only a system message, needed a user's");
  }
  for (size_t i = first; i < messages.size(); ++i) {
    const char* needed = (i - first) % 2 == 0 ? "user" : "assistant";
    if (messages[i].role != needed)
      bad_message(
          i, "has role " + messages[i].role + ", needed " + needed + ": Llama 2 turns alternate");
    if (messages[i].role == "user") {
      std::string content = (i == first ? system : std::string()) + messages[i].content;
      out.token(bos_).text("[INST] ").text(stripped(content)).text(" [/INST]");
    } else {
      out.text(" ").text(stripped(messages[i].content)).text(" ").token(turn_end_);
    }
  }
}

void ChatTemplate::render_llama3(std::span<const ChatMessage> messages, bool prompt,
                                 Writer& out) const {
  out.token(bos_);
  auto header = [&](std::string_view role) {
    out.token(open_).text(role).token(role_end_).text("\n\n");
  };
  if (messages[0].role != "system" && !system_preamble_.empty()) {
    header("system");
    out.text(system_preamble_).token(turn_end_);
  }
  for (const ChatMessage& message : messages) {
    header(message.role);
    if (message.role == "system") out.text(system_preamble_);
    out.text(stripped(message.content)).token(turn_end_);
  }
  if (prompt) header("assistant");
}

}  // namespace heed
