// Cutting text into words before BPE, by regular expressions.
#pragma once
#include <functional>
#include <memory>
#include <string_view>
#include <vector>

struct pcre2_real_code_8;
struct pcre2_real_match_data_8;

namespace heed {

/// The name of ours that llama.cpp treats alike (llama3 is llama-bpe), which most names are themselves.
std::string_view pretokenizer_like(std::string_view name);

/// The pre-tokenizers of `tokenizer.ggml.pre`.
class Pretokenizer {
 public:
  /// smollm, gpt-2, llama-bpe, qwen2 or another name of these; throws Error naming the four for anything
  /// else.
  explicit Pretokenizer(std::string_view name);

  /// Calls word(part) for the parts of a text in order; together they are the text. The text must be
  /// valid UTF-8.
  void split(std::string_view text, const std::function<void(std::string_view)>& word) const;

  /// A word that is a token as a whole is not built by merges (llama-bpe).
  bool whole_words_first() const { return whole_words_first_; }

 private:
  struct FreeCode {
    void operator()(pcre2_real_code_8* code) const;
  };
  struct FreeMatch {
    void operator()(pcre2_real_match_data_8* match) const;
  };
  using Match = std::unique_ptr<pcre2_real_match_data_8, FreeMatch>;
  void split_from(size_t pattern, std::string_view text, const std::vector<Match>& matches,
                  const std::function<void(std::string_view)>& word) const;

  // Applied one after the other, each within the parts that the one before it made.
  std::vector<std::unique_ptr<pcre2_real_code_8, FreeCode>> patterns_;
  bool whole_words_first_ = false;
};

}  // namespace heed
