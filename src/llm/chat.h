// Conversations as token ids, in the form the model was trained on.
#pragma once
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace heed {

class GgufFile;
class Tokenizer;

struct ChatMessage {
  std::string role;  // "system", "user", "assistant"
  std::string content;
};

enum class ChatFormat { kChatMl, kLlama2, kLlama3 };

/// The chat form of a model, recognised from `tokenizer.chat_template` in its file by the markers it
/// uses. The template's own default system message is used when a conversation has none; where it drops
/// what the model thought (<think>...</think>) from answers before the last question, so does this.
/// Markers are control tokens; roles and contents never are, whatever they say.
class ChatTemplate {
 public:
  /// Throws Error (which says to use --no-chat) when the file has no template, one of another form, or
  /// lacks the tokens that the form needs. The tokenizer must outlive the result.
  ChatTemplate(const GgufFile& file, const Tokenizer& tokenizer);

  ChatFormat format() const { return format_; }
  const std::string& default_system() const { return default_system_; }

  /// Token ids of the conversation, begin token included where the form has one. With
  /// `add_generation_prompt` it ends where the assistant's next answer begins.
  /// Throws Error for an unknown role, a system message that is not first, no message at all, and for
  /// Llama 2 for turns that do not alternate user, assistant.
  std::vector<int32_t> render(std::span<const ChatMessage> messages,
                              bool add_generation_prompt = true) const;

  /// Ids at which the answer is complete.
  const std::vector<int32_t>& stop_tokens() const { return stop_tokens_; }

 private:
  class Writer;
  void render_chatml(std::span<const ChatMessage> messages, bool prompt, Writer& out) const;
  void render_llama2(std::span<const ChatMessage> messages, Writer& out) const;
  void render_llama3(std::span<const ChatMessage> messages, bool prompt, Writer& out) const;

  const Tokenizer* tokenizer_;
  ChatFormat format_;
  std::string default_system_;   // empty: none
  std::string system_preamble_;  // Llama 3.1 and later: dates before the system message
  std::string answer_start_;     // ChatML: what each answer begins with, "<think>\n"
  bool drops_thoughts_ = false;
  bool trims_ = false;
  std::vector<int32_t> stop_tokens_;
  // Token ids, -1 where the form has none. Roles stand between open and role_end in Llama 3.
  int32_t bos_ = -1;
  int32_t open_ = -1;
  int32_t role_end_ = -1;
  int32_t turn_end_ = -1;
};

}  // namespace heed
