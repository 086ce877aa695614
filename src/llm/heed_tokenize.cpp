// Test program: token ids of texts, for comparison with other implementations.
// heed_tokenize MODEL.gguf [--specials]: each line of standard input is a text in hexadecimal; its ids
// are printed on one line, then the decoded bytes in hexadecimal on the next.
#include <cstdio>
#include <iostream>
#include <string>

#include "heed/error.h"
#include "llm/gguf.h"
#include "llm/tokenizer.h"

namespace {

std::string from_hex(const std::string& hex) {
  std::string bytes;
  for (size_t i = 0; i + 1 < hex.size(); i += 2)
    bytes += static_cast<char>(std::stoi(hex.substr(i, 2), nullptr, 16));
  return bytes;
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc < 2) throw heed::Error("usage: heed_tokenize MODEL.gguf [--specials]");
  heed::GgufFile file = heed::GgufFile::open(argv[1]);
  heed::Tokenizer tokenizer(file);
  heed::EncodeOptions options{.parse_specials = argc > 2, .add_bos_eos = false};
  for (std::string line; std::getline(std::cin, line);) {
    std::vector<int32_t> ids = tokenizer.encode(from_hex(line), options);
    for (int32_t id : ids) std::printf("%d ", id);
    std::printf("\n");
    for (char c : tokenizer.decode(ids)) std::printf("%02x", static_cast<unsigned char>(c));
    std::printf("\n");
  }
} catch (const std::exception& error) {
  std::fprintf(stderr, "heed_tokenize: %s\n", error.what());
  return 1;
}
