#include "llm/bpe.h"

#include <optional>
#include <queue>

#include "heed/error.h"
#include "llm/shown.h"
#include "llm/utf8.h"

namespace heed {
namespace {

// The byte alphabet: each byte is written as one printable character, itself where Latin-1 has it
// printable, else the characters from U+0100 on in order of the bytes.
struct ByteAlphabet {
  std::array<std::string, 256> characters;
  TextIds bytes;

  ByteAlphabet() {
    uint32_t next = 0x100;
    for (int b = 0; b < 256; ++b) {
      bool printable = (b >= 0x21 && b <= 0x7e) || (b >= 0xa1 && b <= 0xac) || b >= 0xae;
      uint32_t c = printable ? static_cast<uint32_t>(b) : next++;
      std::string& text = characters[static_cast<size_t>(b)];
      if (c < 0x80) {
        text += static_cast<char>(c);
      } else {
        text += static_cast<char>(0xc0 | c >> 6);
        text += static_cast<char>(0x80 | (c & 0x3f));
      }
      bytes.emplace(text, b);
    }
  }
};

const ByteAlphabet& alphabet() {
  static const ByteAlphabet instance;
  return instance;
}

struct Symbol {
  int32_t id;
  int32_t previous;  // -1 at the ends
  int32_t next;
};

struct Candidate {
  int32_t rank;
  int32_t at;                   // left symbol
  int32_t left, right, merged;  // ids, to recognise candidates that an earlier merge made void

  bool operator>(const Candidate& other) const {
    return rank != other.rank ? rank > other.rank : at > other.at;
  }
};

}  // namespace

BpeEncoder::BpeEncoder(const Vocabulary& vocabulary, std::span<const std::string_view> merges,
                       std::string_view pretokenizer, bool add_space_prefix)
    : vocabulary_(vocabulary), pretokenizer_(pretokenizer), add_space_prefix_(add_space_prefix) {
  TextIds ids;
  ids.reserve(vocabulary.texts.size());
  for (int32_t id = 0; id < vocabulary.size(); ++id) {
    TokenType type = vocabulary.types[static_cast<size_t>(id)];
    if (type != TokenType::kNormal) continue;
    ids.emplace(vocabulary.texts[static_cast<size_t>(id)], id);
    if (pretokenizer_.whole_words_first()) whole_words_.emplace(BpeEncoder::token_bytes(id), id);
  }
  for (size_t b = 0; b < 256; ++b) {
    auto found = ids.find(alphabet().characters[b]);
    byte_ids_[b] = found == ids.end() ? -1 : found->second;
  }
  add_merges(merges, ids);
}

void BpeEncoder::add_merges(std::span<const std::string_view> merges, const TextIds& ids) {
  merges_.reserve(merges.size());
  for (size_t rank = 0; rank < merges.size(); ++rank) {
    std::string_view merge = merges[rank];
    std::string what = "tokenizer: merge " + std::to_string(rank) + " " + shown(merge);
    size_t space = merge.find(' ', 1);
    if (space == std::string_view::npos || space + 1 == merge.size())
      throw Error(what + " is malformed, needed two texts with a space between them");
    std::string_view left = merge.substr(0, space), right = merge.substr(space + 1);
    auto id_of = [&](std::string_view text) {
      auto found = ids.find(text);
      if (found == ids.end())
        throw Error(what + " uses " + shown(text) + ", which is no normal token of the vocabulary");
      return found->second;
    };
    uint64_t pair = static_cast<uint64_t>(id_of(left)) << 32 | static_cast<uint64_t>(id_of(right));
    int32_t merged = id_of(std::string(left) + std::string(right));
    merges_.emplace(pair, Merge{static_cast<int32_t>(rank), merged});
  }
}

const BpeEncoder::Merge* BpeEncoder::merge_of(int32_t left, int32_t right) const {
  auto found = merges_.find(static_cast<uint64_t>(left) << 32 | static_cast<uint64_t>(right));
  return found == merges_.end() ? nullptr : &found->second;
}

void BpeEncoder::encode(std::string_view text, bool begins, std::vector<int32_t>& out) const {
  std::string prefixed;
  if (add_space_prefix_ && begins && text[0] != ' ') text = prefixed.append(1, ' ').append(text);
  pretokenizer_.split(text, [&](std::string_view word) { encode_word(word, out); });
}

void BpeEncoder::encode_word(std::string_view word, std::vector<int32_t>& out) const {
  if (auto whole = whole_words_.find(word); whole != whole_words_.end()) {
    out.push_back(whole->second);
    return;
  }
  std::vector<Symbol> symbols;
  symbols.reserve(word.size());
  for (char c : word) {
    int32_t id = byte_ids_[static_cast<unsigned char>(c)];
    if (id < 0) continue;
    auto at = static_cast<int32_t>(symbols.size());
    symbols.push_back({id, at - 1, at + 1});
  }
  if (symbols.empty()) return;
  symbols.back().next = -1;

  std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> queue;
  auto consider = [&](int32_t at) {
    if (at < 0) return;
    const Symbol& left = symbols[static_cast<size_t>(at)];
    if (left.next < 0) return;
    int32_t right = symbols[static_cast<size_t>(left.next)].id;
    if (const Merge* merge = merge_of(left.id, right))
      queue.push({merge->rank, at, left.id, right, merge->id});
  };
  for (size_t at = 0; at < symbols.size(); ++at) consider(static_cast<int32_t>(at));

  constexpr int32_t kGone = -1;
  while (!queue.empty()) {
    Candidate best = queue.top();
    queue.pop();
    Symbol& left = symbols[static_cast<size_t>(best.at)];
    if (left.id != best.left || left.next < 0) continue;
    Symbol& right = symbols[static_cast<size_t>(left.next)];
    if (right.id != best.right) continue;
    left.id = best.merged;
    left.next = right.next;
    right.id = kGone;
    if (left.next >= 0) symbols[static_cast<size_t>(left.next)].previous = best.at;
    consider(left.previous);
    consider(best.at);
  }
  for (int32_t at = 0; at >= 0; at = symbols[static_cast<size_t>(at)].next)
    out.push_back(symbols[static_cast<size_t>(at)].id);
}

std::string BpeEncoder::token_bytes(int32_t id) const {
  std::string_view text = vocabulary_.texts[static_cast<size_t>(id)];
  TokenType type = vocabulary_.types[static_cast<size_t>(id)];
  if (type == TokenType::kControl || type == TokenType::kUserDefined) return std::string(text);
  std::string bytes;
  for (std::string_view rest = text; !rest.empty();) {
    size_t step = utf8_step(rest).bytes;
    auto found = alphabet().bytes.find(rest.substr(0, step));
    // A text with a character outside of the alphabet is not in it at all.
    if (found == alphabet().bytes.end()) return std::string(text);
    bytes += static_cast<char>(found->second);
    rest.remove_prefix(step);
  }
  return bytes;
}

}  // namespace heed
