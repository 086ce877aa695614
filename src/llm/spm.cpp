#include "llm/spm.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <queue>
#include <utility>

#include "heed/error.h"
#include "llm/shown.h"
#include "llm/utf8.h"

namespace heed {
namespace {

constexpr std::string_view kSpaceMark = "\xe2\x96\x81";      // U+2581, a space inside a piece
constexpr std::string_view kUnknownText = " \xe2\x81\x87 ";  // U+2047, how SentencePiece shows it

// The byte of a token "<0x0A>".
int parse_byte_token(std::string_view text) {
  int value = -1;
  if (text.size() == 6 && text.starts_with("<0x") && text[5] == '>') {
    auto [end, error] = std::from_chars(text.data() + 3, text.data() + 5, value, 16);
    if (error != std::errc() || end != text.data() + 5) value = -1;
  }
  if (value < 0)
    throw Error("tokenizer: the byte token " + shown(text) +
                " is malformed, needed a text like \"<0x0A>\"");
  return value;
}

struct Symbol {
  size_t begin;      // in the marked text
  size_t bytes;      // 0 once merged into its left neighbour
  int32_t previous;  // -1 at the ends
  int32_t next;
};

struct Candidate {
  float score;
  int32_t left, right;
  size_t bytes;  // of both, to recognise candidates that an earlier merge made void

  // Highest score first, of equals the leftmost.
  bool operator<(const Candidate& other) const {
    return score != other.score ? score < other.score : left > other.left;
  }
};

}  // namespace

SpmEncoder::SpmEncoder(const Vocabulary& vocabulary, std::vector<float> scores, int32_t unknown,
                       bool add_space_prefix)
    : vocabulary_(vocabulary),
      scores_(std::move(scores)),
      unknown_(unknown),
      add_space_prefix_(add_space_prefix) {
  byte_ids_.fill(-1);
  for (int32_t id = 0; id < vocabulary.size(); ++id) {
    auto i = static_cast<size_t>(id);
    const std::string& text = vocabulary.texts[i];
    if (!std::isfinite(scores_[i]))
      throw Error("tokenizer: the score of token " + std::to_string(id) + " " + shown(text) +
                  " is " + std::to_string(scores_[i]) + ", needed a finite number");
    if (vocabulary.types[i] == TokenType::kByte) {
      int32_t& slot = byte_ids_[static_cast<size_t>(parse_byte_token(text))];
      if (slot < 0) slot = id;
    } else if (vocabulary.types[i] == TokenType::kNormal) {
      pieces_.emplace(text, id);
      longest_piece_ = std::max(longest_piece_, text.size());
    }
  }
  all_bytes_ = std::find(byte_ids_.begin(), byte_ids_.end(), -1) == byte_ids_.end();
  if (!all_bytes_ && unknown_ < 0)
    throw Error(
        "tokenizer: the vocabulary has neither all 256 byte tokens nor an unknown token, needed "
        "one "
        "of the two");
}

void SpmEncoder::encode(std::string_view text, bool begins, std::vector<int32_t>& out) const {
  std::string marked;
  marked.reserve(text.size() + 3);
  if (add_space_prefix_ && begins) marked += kSpaceMark;
  for (char c : text) {
    if (c == ' ') {
      marked += kSpaceMark;
    } else {
      marked += c;
    }
  }

  std::vector<Symbol> symbols;
  const std::string_view whole = marked;
  for (size_t begin = 0; begin < whole.size(); begin += symbols.back().bytes) {
    auto at = static_cast<int32_t>(symbols.size());
    symbols.push_back({begin, utf8_step(whole.substr(begin)).bytes, at - 1, at + 1});
  }
  symbols.back().next = -1;

  std::priority_queue<Candidate> queue;
  auto consider = [&](int32_t left, int32_t right) {
    if (left < 0 || right < 0) return;
    const Symbol& a = symbols[static_cast<size_t>(left)];
    size_t bytes = a.bytes + symbols[static_cast<size_t>(right)].bytes;
    if (bytes > longest_piece_) return;
    auto found = pieces_.find(whole.substr(a.begin, bytes));
    if (found != pieces_.end())
      queue.push({scores_[static_cast<size_t>(found->second)], left, right, bytes});
  };
  for (size_t at = 0; at < symbols.size(); ++at)
    consider(static_cast<int32_t>(at), symbols[at].next);

  while (!queue.empty()) {
    Candidate best = queue.top();
    queue.pop();
    Symbol& left = symbols[static_cast<size_t>(best.left)];
    Symbol& right = symbols[static_cast<size_t>(best.right)];
    if (left.bytes == 0 || right.bytes == 0 || left.bytes + right.bytes != best.bytes) continue;
    left.bytes = best.bytes;
    left.next = right.next;
    right.bytes = 0;
    if (left.next >= 0) symbols[static_cast<size_t>(left.next)].previous = best.left;
    consider(left.previous, best.left);
    consider(best.left, left.next);
  }
  for (int32_t at = 0; at >= 0; at = symbols[static_cast<size_t>(at)].next) {
    const Symbol& symbol = symbols[static_cast<size_t>(at)];
    emit(whole.substr(symbol.begin, symbol.bytes), out);
  }
}

void SpmEncoder::emit(std::string_view symbol, std::vector<int32_t>& out) const {
  if (auto found = pieces_.find(symbol); found != pieces_.end()) {
    out.push_back(found->second);
  } else if (!all_bytes_) {
    out.push_back(unknown_);
  } else {
    for (char c : symbol) out.push_back(byte_ids_[static_cast<unsigned char>(c)]);
  }
}

std::string SpmEncoder::token_bytes(int32_t id) const {
  const std::string& text = vocabulary_.texts[static_cast<size_t>(id)];
  switch (vocabulary_.types[static_cast<size_t>(id)]) {
    case TokenType::kByte:
      return {static_cast<char>(parse_byte_token(text))};
    case TokenType::kUnknown:
      return std::string(kUnknownText);
    case TokenType::kControl:
      return text;
    default:
      break;
  }
  std::string bytes;
  for (size_t at = 0; at < text.size();) {
    if (text.compare(at, kSpaceMark.size(), kSpaceMark) == 0) {
      bytes += ' ';
      at += kSpaceMark.size();
    } else {
      bytes += text[at++];
    }
  }
  return bytes;
}

}  // namespace heed
