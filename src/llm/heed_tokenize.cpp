// Test program: token ids of texts, for comparison with other implementations.
// heed_tokenize MODEL.gguf [--specials|--chat]: each line of standard input is a text in hexadecimal, or
// with --chat a conversation "ROLE TEXT ROLE TEXT ..." with texts in hexadecimal ("-" for an empty one).
// Its ids are printed on one line, the decoded bytes in hexadecimal on the next.
#include <cstdio>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

#include "heed/error.h"
#include "llm/chat.h"
#include "llm/gguf.h"
#include "llm/tokenizer.h"

namespace {

std::string from_hex(const std::string& hex) {
  std::string bytes;
  for (size_t i = 0; i + 1 < hex.size(); i += 2)
    bytes += static_cast<char>(std::stoi(hex.substr(i, 2), nullptr, 16));
  return bytes;
}

std::vector<heed::ChatMessage> conversation(const std::string& line) {
  std::vector<heed::ChatMessage> messages;
  std::istringstream words(line);
  for (std::string role, hex; words >> role >> hex;)
    messages.push_back({role, hex == "-" ? "" : from_hex(hex)});
  return messages;
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc < 2) throw heed::Error("usage: heed_tokenize MODEL.gguf [--specials|--chat]");
  std::string mode = argc > 2 ? argv[2] : "";
  heed::GgufFile file = heed::GgufFile::open(argv[1]);
  heed::Tokenizer tokenizer(file);
  heed::EncodeOptions options{.parse_specials = mode == "--specials", .add_bos_eos = false};
  for (std::string line; std::getline(std::cin, line);) {
    std::vector<int32_t> ids = mode == "--chat"
                                   ? heed::ChatTemplate(file, tokenizer).render(conversation(line))
                                   : tokenizer.encode(from_hex(line), options);
    for (int32_t id : ids) std::printf("%d ", id);
    std::printf("\n");
    for (char c : tokenizer.decode(ids)) std::printf("%02x", static_cast<unsigned char>(c));
    std::printf("\n");
  }
} catch (const std::exception& error) {
  std::fprintf(stderr, "heed_tokenize: %s\n", error.what());
  return 1;
}
