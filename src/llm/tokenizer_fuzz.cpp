// Any bytes as text: the first byte chooses a tokenizer, the rest is encoded and must come back, whole
// and as a stream.
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>
#include <vector>

#include "llm/gguf.h"
#include "llm/gguf_builder.h"
#include "llm/tokenizer.h"
#include "llm/utf8.h"

namespace {

// The vocabulary of bpe.gguf with another pre-tokenizer.
heed::Tokenizer bpe(const char* pre) {
  heed::GgufFile file = heed::GgufFile::open(HEED_SOURCE_DIR "/src/llm/testdata/bpe.gguf");
  auto copy = [&](const char* key) {
    std::vector<std::string_view> views = file.require_strings(key);
    return std::vector<std::string>(views.begin(), views.end());
  };
  heed::GgufBuilder builder;
  std::vector<int64_t> types = file.integers("tokenizer.ggml.token_type").value();
  std::string bytes =
      builder.string("tokenizer.ggml.model", "gpt2")
          .string("tokenizer.ggml.pre", pre)
          .strings("tokenizer.ggml.tokens", copy("tokenizer.ggml.tokens"))
          .array<int64_t>("tokenizer.ggml.token_type", heed::gguf_value::kInt64, types)
          .strings("tokenizer.ggml.merges", copy("tokenizer.ggml.merges"))
          .build();
  return heed::Tokenizer(heed::parse_gguf(bytes));
}

const std::vector<heed::Tokenizer>& tokenizers() {
  static const std::vector<heed::Tokenizer> all = [] {
    std::vector<heed::Tokenizer> list;
    for (const char* pre : {"gpt-2", "smollm", "llama-bpe", "qwen2"}) list.push_back(bpe(pre));
    list.emplace_back(heed::GgufFile::open(HEED_SOURCE_DIR "/models/stories260K.gguf"));
    return list;
  }();
  return all;
}

void check(bool good) {
  if (!good) std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const heed::Tokenizer& tokenizer = tokenizers()[data[0] % tokenizers().size()];
  std::string_view text(reinterpret_cast<const char*>(data) + 1, size - 1);
  std::string valid = heed::to_valid_utf8(text);
  check(heed::to_valid_utf8(valid) == valid);

  std::vector<int32_t> ids = tokenizer.encode(text);
  std::string expected = valid;
  // U+2581 is the llama tokenizer's own sign for a space.
  if (tokenizer.adds_bos())
    for (size_t at; (at = expected.find("\xe2\x96\x81")) != std::string::npos;)
      expected.replace(at, 3, " ");
  check(tokenizer.decode(ids) == expected);
  heed::StreamDecoder stream(tokenizer);
  std::string streamed;
  for (int32_t id : ids) {
    std::string part = stream.put(id);
    check(heed::to_valid_utf8(part) == part);
    streamed += part;
  }
  check(streamed + stream.finish() == expected);
  for (int32_t id : tokenizer.encode(text, {.parse_specials = true})) tokenizer.token_text(id);
  return 0;
}
