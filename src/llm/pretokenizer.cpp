#include "llm/pretokenizer.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <array>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>

#include "heed/error.h"
#include "llm/shown.h"

namespace heed {
namespace {

// The patterns were written for engines whose \s is the Unicode property White_Space. PCRE2's own \s
// differs from it (U+180E), so \s is written out; S stands inside and outside of brackets.
#define HEED_S "\\p{White_Space}"
#define HEED_NOT_S "\\P{White_Space}"

// GPT-2, Radford et al. 2019.
constexpr const char* kGpt2 = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^" HEED_S
                              "\\p{L}\\p{N}]+|" HEED_S "+(?!" HEED_NOT_S ")|" HEED_S "+";
// The digits of a number one by one, before the GPT-2 pattern.
constexpr const char* kOneDigit = "\\p{N}";
// Llama 3 and Qwen 2 differ in how many digits stay together.
#define HEED_LLAMA3(DIGITS)                                                           \
  "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|" DIGITS "| ?[^" HEED_S \
  "\\p{L}\\p{N}]+[\\r\\n]*|" HEED_S "*[\\r\\n]+|" HEED_S "+(?!" HEED_NOT_S ")|" HEED_S "+"
constexpr const char* kLlama3 = HEED_LLAMA3("\\p{N}{1,3}");
constexpr const char* kQwen2 = HEED_LLAMA3("\\p{N}");

std::string pcre2_message(int code) {
  std::array<PCRE2_UCHAR, 256> text{};
  pcre2_get_error_message(code, text.data(), text.size());
  return reinterpret_cast<const char*>(text.data());
}

pcre2_code* compile(const char* pattern) {
  int code = 0;
  PCRE2_SIZE where = 0;
  pcre2_code* compiled = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern), PCRE2_ZERO_TERMINATED,
                                       PCRE2_UTF | PCRE2_NO_UTF_CHECK, &code, &where, nullptr);
  if (compiled == nullptr)
    throw Error("pre-tokenizer: the PCRE2 library refuses a pattern at " + std::to_string(where) +
                ": " + pcre2_message(code) + "; needed PCRE2 10.40 or newer");
  // Without a just-in-time compiler the same pattern is interpreted, only slower.
  pcre2_jit_compile(compiled, PCRE2_JIT_COMPLETE);
  return compiled;
}

}  // namespace

void Pretokenizer::FreeCode::operator()(pcre2_code* code) const { pcre2_code_free(code); }
void Pretokenizer::FreeMatch::operator()(pcre2_match_data* match) const {
  pcre2_match_data_free(match);
}

// Source: llama_vocab::impl::load in llama.cpp's src/llama-vocab.cpp. Names with rules of their own besides
// (jina-v2-de, roberta-bpe) are none of these.
std::string_view pretokenizer_like(std::string_view name) {
  constexpr std::pair<std::string_view, std::string_view> kAlike[] = {{"llama3", "llama-bpe"},
                                                                      {"llama-v3", "llama-bpe"},
                                                                      {"falcon3", "llama-bpe"},
                                                                      {"falcon-h1", "llama-bpe"},
                                                                      {"pixtral", "llama-bpe"},
                                                                      {"midm-2.0", "llama-bpe"},
                                                                      {"lfm2", "llama-bpe"},
                                                                      {"jina-v5-nano", "llama-bpe"},
                                                                      {"deepseek-r1-qwen", "qwen2"},
                                                                      {"kormo", "qwen2"},
                                                                      {"f2llmv2", "qwen2"},
                                                                      {"phi-2", "gpt-2"},
                                                                      {"jina-es", "gpt-2"},
                                                                      {"jina-de", "gpt-2"},
                                                                      {"gigachat", "gpt-2"},
                                                                      {"a.x-4.0", "gpt-2"},
                                                                      {"mellum", "gpt-2"},
                                                                      {"modern-bert", "gpt-2"},
                                                                      {"exaone4", "gpt-2"},
                                                                      {"mpt", "gpt-2"},
                                                                      {"olmo", "gpt-2"},
                                                                      {"jais", "gpt-2"},
                                                                      {"command-r", "smollm"}};
  for (const auto& [other, ours] : kAlike) {
    if (name == other) return ours;
  }
  return name;
}

Pretokenizer::Pretokenizer(std::string_view name) {
  name = pretokenizer_like(name);
  std::vector<const char*> patterns;
  if (name == "gpt-2") {
    patterns = {kGpt2};
  } else if (name == "smollm") {
    patterns = {kOneDigit, kGpt2};
  } else if (name == "llama-bpe") {
    patterns = {kLlama3};
    whole_words_first_ = true;
  } else if (name == "qwen2") {
    patterns = {kQwen2};
  } else {
    throw Error("tokenizer: the pre-tokenizer tokenizer.ggml.pre is " + shown(name) +
                ", needed smollm, gpt-2, llama-bpe or qwen2");
  }
  for (const char* pattern : patterns) patterns_.emplace_back(compile(pattern));
}

void Pretokenizer::split(std::string_view text,
                         const std::function<void(std::string_view)>& word) const {
  std::vector<Match> matches;
  for (const auto& pattern : patterns_) {
    matches.emplace_back(pcre2_match_data_create_from_pattern(pattern.get(), nullptr));
    if (matches.back() == nullptr) throw std::bad_alloc();
  }
  split_from(0, text, matches, word);
}

void Pretokenizer::split_from(size_t pattern, std::string_view text,
                              const std::vector<Match>& matches,
                              const std::function<void(std::string_view)>& word) const {
  auto pass_on = [&](std::string_view part) {
    if (part.empty()) return;
    if (pattern + 1 == patterns_.size()) {
      word(part);
    } else {
      split_from(pattern + 1, part, matches, word);
    }
  };
  pcre2_match_data* match = matches[pattern].get();
  size_t begin = 0;
  while (begin < text.size()) {
    int found = pcre2_match(patterns_[pattern].get(), reinterpret_cast<PCRE2_SPTR>(text.data()),
                            text.size(), begin, PCRE2_NO_UTF_CHECK, match, nullptr);
    if (found == PCRE2_ERROR_NOMATCH) break;
    if (found < 0)
      throw Error("tokenizer: cutting text into words failed: " + pcre2_message(found));
    const PCRE2_SIZE* span = pcre2_get_ovector_pointer(match);
    pass_on(text.substr(begin, span[0] - begin));
    pass_on(text.substr(span[0], span[1] - span[0]));
    begin = span[1];
  }
  pass_on(text.substr(begin));
}

}  // namespace heed
