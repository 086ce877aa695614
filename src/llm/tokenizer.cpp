#include "llm/tokenizer.h"

#include <algorithm>
#include <array>
#include <limits>
#include <utility>

#include "heed/error.h"
#include "llm/bpe.h"
#include "llm/gguf.h"
#include "llm/pretokenizer.h"
#include "llm/shown.h"
#include "llm/special_tokens.h"
#include "llm/spm.h"
#include "llm/text_encoder.h"
#include "llm/utf8.h"

namespace heed {

class TokenizerModel {
 public:
  explicit TokenizerModel(const GgufFile& file);
  TokenizerModel(const TokenizerModel&) = delete;
  TokenizerModel& operator=(const TokenizerModel&) = delete;

  /// Throws Error for an id outside the vocabulary; the others need one inside.
  size_t index(int32_t id) const;
  bool is_control(int32_t id) const { return type(id) == TokenType::kControl; }
  /// What a token that is no control token adds to a text. At its start without the space that encode put
  /// there.
  std::string_view plain_bytes(int32_t id, bool& at_start) const;

  Vocabulary vocabulary;
  std::unique_ptr<TextEncoder> encoder;
  SpecialTokens specials;          // control and user-defined tokens
  SpecialTokens user_defined;      // those that any text may name
  std::vector<std::string> bytes;  // of each token
  std::optional<int32_t> bos, eos;
  bool adds_bos = false, adds_eos = false;
  std::vector<int32_t> end_tokens;

 private:
  TokenType type(int32_t id) const { return vocabulary.types[static_cast<size_t>(id)]; }
  void read_vocabulary(const GgufFile& file);
  void read_encoder(const GgufFile& file);
  void read_ends(const GgufFile& file);
  bool ends_or_marks(int32_t id) const;
  std::optional<int32_t> token_key(const GgufFile& file, const char* key) const;
};

namespace {

constexpr size_t kLongestText = std::numeric_limits<int32_t>::max() / 4;

// Control tokens that end a text or turn in models whose files name only one of them as eos.
constexpr std::array<std::string_view, 6> kEndTexts = {
    "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "</s>"};

// Marks of turns beside these. Some files call marks user-defined; still no text may forge them.
constexpr std::array<std::string_view, 3> kMarkTexts = {"<|im_start|>", "<|start_header_id|>",
                                                        "<|end_header_id|>"};

void check_same_count(const char* key, size_t found, size_t tokens) {
  if (found != tokens)
    throw Error("tokenizer: " + std::string(key) + " has " + std::to_string(found) +
                " entries, needed one for each of the " + std::to_string(tokens) + " tokens");
}

}  // namespace

TokenizerModel::TokenizerModel(const GgufFile& file) {
  read_vocabulary(file);
  read_encoder(file);
  bytes.reserve(vocabulary.texts.size());
  for (int32_t id = 0; id < vocabulary.size(); ++id) {
    bytes.push_back(encoder->token_bytes(id));
    if (is_control(id) || type(id) == TokenType::kUserDefined)
      specials.add(vocabulary.texts[static_cast<size_t>(id)], id);
  }
  read_ends(file);
  for (int32_t id = 0; id < vocabulary.size(); ++id) {
    const std::string& text = vocabulary.texts[static_cast<size_t>(id)];
    if (type(id) == TokenType::kUserDefined && !ends_or_marks(id)) user_defined.add(text, id);
  }
}

bool TokenizerModel::ends_or_marks(int32_t id) const {
  const auto has = [](const auto& list, const auto& item) {
    return std::find(list.begin(), list.end(), item) != list.end();
  };
  return id == bos || has(end_tokens, id) ||
         has(kMarkTexts, vocabulary.texts[static_cast<size_t>(id)]);
}

size_t TokenizerModel::index(int32_t id) const {
  if (id < 0 || id >= vocabulary.size())
    throw Error("tokenizer: token id is " + std::to_string(id) + ", needed 0 to " +
                std::to_string(vocabulary.size() - 1));
  return static_cast<size_t>(id);
}

std::string_view TokenizerModel::plain_bytes(int32_t id, bool& at_start) const {
  std::string_view text = bytes[static_cast<size_t>(id)];
  const bool has_space = at_start && type(id) != TokenType::kUserDefined && text.starts_with(' ');
  at_start = false;
  if (has_space) text.remove_prefix(1);
  return text;
}

void TokenizerModel::read_vocabulary(const GgufFile& file) {
  std::vector<std::string_view> tokens = file.require_strings("tokenizer.ggml.tokens");
  if (tokens.empty() || tokens.size() > static_cast<size_t>(std::numeric_limits<int32_t>::max()))
    throw Error("tokenizer: tokenizer.ggml.tokens has " + std::to_string(tokens.size()) +
                " tokens, needed 1 to 2^31 - 1");
  vocabulary.texts.assign(tokens.begin(), tokens.end());
  vocabulary.types.assign(tokens.size(), TokenType::kNormal);
  auto types = file.integers("tokenizer.ggml.token_type");
  if (!types) return;
  check_same_count("tokenizer.ggml.token_type", types->size(), tokens.size());
  for (size_t i = 0; i < tokens.size(); ++i) {
    int64_t type = (*types)[i];
    if (type < static_cast<int64_t>(TokenType::kNormal) ||
        type > static_cast<int64_t>(TokenType::kByte))
      throw Error("tokenizer: tokenizer.ggml.token_type of token " + std::to_string(i) + " is " +
                  std::to_string(type) + ", needed 1 to 6");
    vocabulary.types[i] = static_cast<TokenType>(type);
  }
}

void TokenizerModel::read_encoder(const GgufFile& file) {
  std::string_view kind = file.require_string("tokenizer.ggml.model");
  std::optional<bool> space = file.boolean("tokenizer.ggml.add_space_prefix");
  if (kind == "gpt2") {
    std::vector<std::string_view> merges = file.require_strings("tokenizer.ggml.merges");
    encoder = std::make_unique<BpeEncoder>(
        vocabulary, merges, file.require_string("tokenizer.ggml.pre"), space.value_or(false));
  } else if (kind == "llama") {
    if (file.has("tokenizer.ggml.precompiled_charsmap") ||
        file.boolean("tokenizer.ggml.remove_extra_whitespaces").value_or(false))
      throw Error(
          "tokenizer: the file asks for text normalisation (precompiled_charsmap or "
          "remove_extra_whitespaces), needed a llama tokenizer without it");
    std::vector<float> scores = file.require_floats("tokenizer.ggml.scores");
    check_same_count("tokenizer.ggml.scores", scores.size(), vocabulary.texts.size());
    std::optional<int32_t> unknown = token_key(file, "tokenizer.ggml.unknown_token_id");
    encoder = std::make_unique<SpmEncoder>(vocabulary, std::move(scores), unknown.value_or(-1),
                                           space.value_or(true));
  } else {
    throw Error("tokenizer: tokenizer.ggml.model is " + shown(kind) + ", needed gpt2 or llama");
  }
}

std::optional<int32_t> TokenizerModel::token_key(const GgufFile& file, const char* key) const {
  std::optional<int64_t> id = file.integer(key);
  if (!id) return std::nullopt;
  if (*id < 0 || *id >= vocabulary.size())
    throw Error("tokenizer: " + std::string(key) + " is " + std::to_string(*id) + ", needed 0 to " +
                std::to_string(vocabulary.size() - 1));
  return static_cast<int32_t>(*id);
}

void TokenizerModel::read_ends(const GgufFile& file) {
  bos = token_key(file, "tokenizer.ggml.bos_token_id");
  eos = token_key(file, "tokenizer.ggml.eos_token_id");
  std::optional<bool> asks_bos = file.boolean("tokenizer.ggml.add_bos_token");
  std::optional<bool> asks_eos = file.boolean("tokenizer.ggml.add_eos_token");
  // Files that do not say: Llama models begin every text with BOS, the others do not.
  bool is_llama = file.require_string("tokenizer.ggml.model") == "llama" ||
                  pretokenizer_like(file.string("tokenizer.ggml.pre").value_or("")) == "llama-bpe";
  adds_bos = asks_bos.value_or(is_llama && bos.has_value());
  adds_eos = asks_eos.value_or(false);
  if (adds_bos && !bos)
    throw Error(
        "tokenizer: tokenizer.ggml.add_bos_token is set, needed tokenizer.ggml.bos_token_id too");
  if (adds_eos && !eos)
    throw Error(
        "tokenizer: tokenizer.ggml.add_eos_token is set, needed tokenizer.ggml.eos_token_id too");

  auto add_end = [&](std::optional<int32_t> id) {
    if (id && std::find(end_tokens.begin(), end_tokens.end(), *id) == end_tokens.end())
      end_tokens.push_back(*id);
  };
  add_end(eos);
  add_end(token_key(file, "tokenizer.ggml.eot_token_id"));
  add_end(token_key(file, "tokenizer.ggml.eom_token_id"));
  for (std::string_view text : kEndTexts) add_end(specials.find(text));
}

Tokenizer::Tokenizer(const GgufFile& file) : model_(std::make_unique<TokenizerModel>(file)) {}
Tokenizer::~Tokenizer() = default;
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;

std::vector<int32_t> Tokenizer::encode(std::string_view text, const EncodeOptions& options) const {
  std::string valid = to_valid_utf8(text);
  if (valid.size() > kLongestText)
    throw Error("tokenizer: text has " + std::to_string(valid.size()) + " bytes, needed at most " +
                std::to_string(kLongestText));
  const TokenizerModel& model = *model_;
  std::vector<int32_t> ids;
  const bool has_begin = options.add_bos_eos && model.adds_bos && model.bos;
  if (has_begin) ids.push_back(*model.bos);
  bool begins = true;
  const auto plain = [&](std::string_view part) { model.encoder->encode(part, begins, ids); };
  const auto special = [&](int32_t id) {
    ids.push_back(id);
    begins = model.is_control(id);
  };
  const SpecialTokens& read = options.parse_specials ? model.specials : model.user_defined;
  read.split(valid, plain, special);
  if (has_begin && options.parse_specials && ids.size() > 1 && ids[1] == *model.bos)
    ids.erase(ids.begin());
  if (options.add_bos_eos && !options.to_continue && model.adds_eos && model.eos) {
    ids.push_back(*model.eos);
  }
  return ids;
}

std::string Tokenizer::decode(std::span<const int32_t> ids, bool with_specials) const {
  std::string text;
  bool at_start = model_->encoder->adds_space();
  for (int32_t id : ids) {
    const size_t i = model_->index(id);
    if (!model_->is_control(id)) {
      text += model_->plain_bytes(id, at_start);
    } else if (with_specials) {
      text += model_->bytes[i];
    }
  }
  return text;
}

int32_t Tokenizer::vocab_size() const { return model_->vocabulary.size(); }
std::optional<int32_t> Tokenizer::bos() const { return model_->bos; }
std::optional<int32_t> Tokenizer::eos() const { return model_->eos; }
bool Tokenizer::adds_bos() const { return model_->adds_bos; }
bool Tokenizer::adds_eos() const { return model_->adds_eos; }
const std::vector<int32_t>& Tokenizer::end_tokens() const { return model_->end_tokens; }

std::string_view Tokenizer::token_text(int32_t id) const {
  return model_->vocabulary.texts[model_->index(id)];
}

TokenType Tokenizer::token_type(int32_t id) const {
  return model_->vocabulary.types[model_->index(id)];
}

std::optional<int32_t> Tokenizer::find_special(std::string_view text) const {
  return model_->specials.find(text);
}

StreamDecoder::StreamDecoder(const Tokenizer& tokenizer, bool text_start)
    : tokenizer_(&tokenizer), at_start_(text_start && tokenizer.model_->encoder->adds_space()) {}

std::string StreamDecoder::put(int32_t id) {
  const TokenizerModel& model = *tokenizer_->model_;
  model.index(id);
  if (model.is_control(id)) return {};
  pending_ += model.plain_bytes(id, at_start_);

  std::string text;
  std::string_view rest = pending_;
  while (!rest.empty()) {
    Utf8Step step = utf8_step(rest);
    if (step.cut) break;
    if (step.valid) {
      text += rest.substr(0, step.bytes);
    } else {
      text += kReplacementCharacter;
    }
    rest.remove_prefix(step.bytes);
  }
  pending_ = std::string(rest);
  return text;
}

std::string StreamDecoder::finish() {
  std::string text = pending_.empty() ? std::string() : std::string(kReplacementCharacter);
  pending_.clear();
  return text;
}

}  // namespace heed
