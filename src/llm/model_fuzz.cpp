// Any bytes as a language model: loading it and reading tokens, one at a time and many at once, must end in
// logits or in heed::Error.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "heed/error.h"
#include "llm/attention_pattern.h"
#include "llm/gguf.h"
#include "llm/model.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  constexpr int64_t kMostTokens = 96;
  try {
    const heed::GgufFile file = heed::GgufFile::from_bytes(std::as_bytes(std::span(data, size)));
    const heed::ModelConfig config = heed::read_model_config(file);
    for (const heed::ModelDtype dtype :
         {heed::default_model_dtype(file), heed::ModelDtype::bf16, heed::ModelDtype::f32}) {
      heed::Model model(file, {.dtype = dtype,
                               .attention = heed::parse_attention("flash", config),
                               .run = {.threads = 1}});
      const int64_t vocabulary = model.config().vocab;
      std::vector<int32_t> tokens;
      for (int64_t i = 0; i < std::min(model.context(), kMostTokens); ++i) {
        tokens.push_back(static_cast<int32_t>(i * i % vocabulary));
      }
      const std::span<const int32_t> all(tokens);
      model.append(all);
      model.logits();
      if (model.truncate(1) == 1 && all.size() > 1) model.append(all.subspan(1, 1));
      model.logits();
    }
  } catch (const heed::Error&) {
  }
  return 0;
}
