// Text to token ids and back, from the tokenizer that a GGUF file carries.
#pragma once
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace heed {

class GgufFile;
class TokenizerModel;

/// Kind of a token: `tokenizer.ggml.token_type` in the file.
enum class TokenType : int32_t {
  kNormal = 1,
  kUnknown = 2,
  kControl = 3,
  kUserDefined = 4,
  kUnused = 5,
  kByte = 6,
};

struct EncodeOptions {
  /// Reads the texts of control tokens as those tokens. Off: they are plain text, which is what text from
  /// a user must be. Those of user-defined tokens (<think>) are always read, unless they end or mark turns.
  bool parse_specials = false;
  /// Adds the begin and end tokens where the file asks for them, but no second begin token before one that
  /// parse_specials read there.
  bool add_bos_eos = true;
  /// No end token even so: what follows goes on with the text.
  bool to_continue = false;
};

/// Tokenizers of GGUF files, `tokenizer.ggml.model`:
///  - `gpt2`: byte-level BPE (Radford et al. 2019) with the pre-tokenizers smollm, gpt-2, llama-bpe and
///    qwen2 (`tokenizer.ggml.pre`, also by names that mean one of these: llama3, ...). A byte that has no token in the vocabulary is dropped, as in the
///    reference implementation. No Unicode normalisation takes place.
///  - `llama`: BPE by piece scores as in SentencePiece (Kudo and Richardson, arXiv:1808.06226) with byte
///    fallback. With add_space_prefix a space is put before the text and after each control token.
///    Spaces are U+2581 in its pieces, so that character in a text decodes as a space. Control,
///    user-defined and unused pieces are never formed from text by merging.
/// Text that is not UTF-8 is read with U+FFFD for each ill-formed sequence. Of tokens with equal text the
/// lowest id is used. Immutable after construction, so usable from several threads.
/// Time is O(n log n) in the length of the text.
class Tokenizer {
 public:
  /// Copies what it needs. Throws Error for an unknown kind of tokenizer or inconsistent tables.
  explicit Tokenizer(const GgufFile& file);
  ~Tokenizer();
  Tokenizer(Tokenizer&&) noexcept;
  Tokenizer& operator=(Tokenizer&&) noexcept;

  std::vector<int32_t> encode(std::string_view text, const EncodeOptions& options = {}) const;

  /// The bytes of the tokens: not valid UTF-8 when the ids cut a character. Control tokens are left out
  /// unless `with_specials`. Inverse of encode for valid UTF-8, with the exceptions above.
  /// Throws Error for an id outside [0, vocab_size()).
  std::string decode(std::span<const int32_t> ids, bool with_specials = false) const;

  int32_t vocab_size() const;
  std::optional<int32_t> bos() const;
  std::optional<int32_t> eos() const;
  bool adds_bos() const;
  bool adds_eos() const;
  /// Ids that end a text or a turn: eos, eot and eom of the file, each once.
  const std::vector<int32_t>& end_tokens() const;

  /// Text of the token as it stands in the file. Throws Error for an id outside the vocabulary.
  std::string_view token_text(int32_t id) const;
  TokenType token_type(int32_t id) const;
  /// Control or user-defined token of exactly this text.
  std::optional<int32_t> find_special(std::string_view text) const;

 private:
  friend class StreamDecoder;
  std::unique_ptr<const TokenizerModel> model_;
};

/// Decodes a stream of tokens; what it returns is always valid UTF-8. Bytes of a character that is not
/// complete yet are kept back; ill-formed bytes become U+FFFD. Control tokens give nothing.
/// The tokenizer must outlive the stream.
class StreamDecoder {
 public:
  /// `text_start`: the first token begins a text, so the space that add_space_prefix put before it is
  /// dropped; false when the tokens go on from text already shown.
  explicit StreamDecoder(const Tokenizer& tokenizer, bool text_start = true);
  /// Text that became complete with this token, often one word, possibly empty.
  std::string put(int32_t id);
  /// Ends the stream: U+FFFD for what is still incomplete, else empty.
  std::string finish();

 private:
  const Tokenizer* tokenizer_;
  bool at_start_;
  std::string pending_;
};

}  // namespace heed
