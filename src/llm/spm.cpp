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

constexpr std::string_view kSpaceMark = "\xe2\x96\x81";        // U+2581, a space inside a piece
constexpr std::string_view kUnknownText = " \xe2\x81\x87 ";     // U+2047, how SentencePiece shows it

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
  std::string_view text;  // empty once merged into its left neighbour
  int32_t previous;       // -1 at the ends
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
        "tokenizer: the vocabulary has neither all 256 byte tokens nor an unknown token, needed one "
        "of the two");
}

void SpmEncoder::encode(std::string_view text, std::vector<int32_t>& out) const {
  std::string marked;
  marked.reserve(text.size() + 3);
  if (add_space_prefix_) marked += kSpaceMark;
  for (char c : text) {
    if (c == ' ') {
      marked += kSpaceMark;
    } else {
      marked += c;
    }
  }

  std::vector<Symbol> symbols;
  for (std::string_view rest = marked; !rest.empty();) {
    size_t bytes = utf8_step(rest).bytes;
    auto at = static_cast<int32_t>(symbols.size());
    symbols.push_back({rest.substr(0, bytes), at - 1, at + 1});
    rest.remove_prefix(bytes);
  }
  symbols.back().next = -1;

  std::priority_queue<Candidate> queue;
  auto consider = [&](int32_t left, int32_t right) {
    if (left < 0 || right < 0) return;
    std::string_view a = symbols[static_cast<size_t>(left)].text;
    size_t bytes = a.size() + symbols[static_cast<size_t>(right)].text.size();
    if (bytes > longest_piece_) return;
    // Neighbours lie side by side in `marked`.
    auto found = pieces_.find(std::string_view(a.data(), bytes));
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
    if (left.text.empty() || right.text.empty() ||
        left.text.size() + right.text.size() != best.bytes)
      continue;
    left.text = {left.text.data(), best.bytes};
    left.next = right.next;
    right.text = {};
    if (left.next >= 0) symbols[static_cast<size_t>(left.next)].previous = best.left;
    consider(left.previous, best.left);
    consider(best.left, left.next);
  }
  for (int32_t at = 0; at >= 0; at = symbols[static_cast<size_t>(at)].next)
    emit(symbols[static_cast<size_t>(at)].text, out);
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
