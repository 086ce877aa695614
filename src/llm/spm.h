// BPE by piece scores, as SentencePiece does it for Llama. Kudo and Richardson, arXiv:1808.06226.
#pragma once
#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "llm/special_tokens.h"
#include "llm/text_encoder.h"

namespace heed {

class SpmEncoder : public TextEncoder {
 public:
  /// `scores`: one per token; the pair whose piece has the highest score is merged first. `unknown`: id
  /// for characters that have neither a piece nor byte tokens, -1 when the file has none. Throws Error
  /// for scores that are not finite, malformed byte tokens, and when neither all byte tokens nor an
  /// unknown token are there. The vocabulary must outlive the encoder.
  SpmEncoder(const Vocabulary& vocabulary, std::vector<float> scores, int32_t unknown,
             bool add_space_prefix);

  void encode(std::string_view text, bool begins, std::vector<int32_t>& out) const override;
  std::string token_bytes(int32_t id) const override;
  bool adds_space() const override { return add_space_prefix_; }

 private:
  void emit(std::string_view symbol, std::vector<int32_t>& out) const;

  const Vocabulary& vocabulary_;
  std::vector<float> scores_;
  int32_t unknown_;
  bool add_space_prefix_;
  TextIds pieces_;                     // normal tokens only
  size_t longest_piece_ = 0;           // bytes
  std::array<int32_t, 256> byte_ids_;  // -1: no token
  bool all_bytes_ = true;
};

}  // namespace heed
