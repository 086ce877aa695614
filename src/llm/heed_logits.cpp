// Test program: heed_logits MODEL DTYPE OUT [ID...] writes the logits after each token, float32
// [tokens, vocab] in native byte order, to OUT.
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <vector>

#include "llm/gguf.h"
#include "llm/model.h"
#include "mechanisms/registry.h"

int main(int argc, char** argv) {
  if (argc < 5) {
    std::fprintf(stderr, "use: heed_logits MODEL DTYPE OUT ID...\n");
    return 2;
  }
  try {
    const heed::GgufFile file = heed::GgufFile::open(argv[1]);
    const auto attention = heed::find_mechanism("flash_attention").model_attention({}, {});
    heed::Model model(file, {.dtype = heed::parse_model_dtype(argv[2]), .attention = {attention}});
    std::vector<int32_t> tokens;
    for (int i = 4; i < argc; ++i) tokens.push_back(std::atoi(argv[i]));
    std::ofstream out(argv[3], std::ios::binary);
    model.append(tokens, 0, [&](int64_t, std::span<const float> logits) {
      out.write(reinterpret_cast<const char*>(logits.data()),
                static_cast<std::streamsize>(logits.size_bytes()));
    });
    out.close();
    if (!out) {
      std::fprintf(stderr, "heed_logits: cannot write %s\n", argv[3]);
      return 1;
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "heed_logits: %s\n", error.what());
    return 1;
  }
  return 0;
}
