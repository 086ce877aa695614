// Any bytes as a model file: opening, reading every tensor and using the tokenizer and the chat form must
// end in a result or in heed::Error.
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "heed/error.h"
#include "llm/chat.h"
#include "llm/gguf.h"
#include "llm/tokenizer.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    heed::GgufFile file = heed::GgufFile::from_bytes(std::as_bytes(std::span(data, size)));
    for (const heed::GgufTensor& tensor : file.tensors()) tensor.to_float();
    heed::Tokenizer tokenizer(file);
    std::vector<int32_t> ids =
        tokenizer.encode("ab  abc \xc3\xa9\xff<|im_end|>12", {.parse_specials = true});
    tokenizer.decode(ids, true);
    heed::ChatTemplate chat(file, tokenizer);
    chat.render(std::vector<heed::ChatMessage>{{"system", "ab"}, {"user", "ab\n"}});
  } catch (const heed::Error&) {
  }
  return 0;
}
