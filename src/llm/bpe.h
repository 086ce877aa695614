// Byte-level byte-pair encoding. Radford et al., "Language models are unsupervised multitask learners"
// (2019); Sennrich et al., arXiv:1508.07909.
#pragma once
#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "llm/pretokenizer.h"
#include "llm/special_tokens.h"
#include "llm/text_encoder.h"

namespace heed {

class BpeEncoder : public TextEncoder {
 public:
  /// `merges`: "left right" in order of rank, in the byte alphabet of the vocabulary. Throws Error when a
  /// merge is malformed or names a text that is no token. The vocabulary must outlive the encoder.
  BpeEncoder(const Vocabulary& vocabulary, std::span<const std::string_view> merges,
             std::string_view pretokenizer, bool add_space_prefix);

  void encode(std::string_view text, bool begins, std::vector<int32_t>& out) const override;
  std::string token_bytes(int32_t id) const override;
  bool adds_space() const override { return false; }

 private:
  struct Merge {
    int32_t rank;
    int32_t id;  // of the token that the pair becomes
  };
  void encode_word(std::string_view word, std::vector<int32_t>& out) const;
  void add_merges(std::span<const std::string_view> merges, const TextIds& ids);
  const Merge* merge_of(int32_t left, int32_t right) const;

  const Vocabulary& vocabulary_;
  Pretokenizer pretokenizer_;
  bool add_space_prefix_;
  std::array<int32_t, 256> byte_ids_;           // -1: the byte has no token
  std::unordered_map<uint64_t, Merge> merges_;  // left id in the high, right id in the low half
  TextIds whole_words_;                         // bytes to id; only where whole words come first
};

}  // namespace heed
