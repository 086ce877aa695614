// How a cascade is put on a machine, as data: which array runs which Einsum and when (binding), which
// tensors stay in the buffer, what goes through DRAM (mapping).
#pragma once
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "hardware/einsum.h"

namespace heed::hardware {

/// What goes through DRAM besides the inputs and the result.
enum class Memory {
  streamed,        // nothing; keys and values once for each group of query tiles in the buffer
  between_phases,  // every tensor that one phase makes and another reads
  score_rows,      // FLAT: whole rows of scores, or what of them does not fit the buffer
};

/// One step of an epoch, the work on one tile of scores. Both arrays run at the same time; a drain
/// waits until a reduction has gone down the rows of the matrix array.
struct Phase {
  std::vector<std::string> matrix, vector;
  std::string drain;
};

struct Mapping {
  std::string name, title;
  std::string machine;  // built-in machine it is meant for
  std::string cascade;  // of src/hardware/cascades
  Memory memory = Memory::streamed;
  bool overlapped_operations = false;         // kinds of operations of one Einsum run in a pipeline
  std::optional<double> tiling_buffer_bytes;  // the buffer that tiles are chosen for, if another
  std::vector<std::string> resident;          // tensors that live in the buffer
  std::map<std::string, std::vector<std::string>>
      forwarded;  // read from registers instead, by whom
  std::vector<Phase> phases;

  bool is_resident(const std::string& tensor) const;
  bool is_forwarded(const std::string& tensor, const std::string& reader) const;
};

/// Throws heed::Error, also where a name is no tensor of the cascade or an Einsum is bound to no
/// phase or to two.
Mapping parse_mapping(std::string_view text, const std::string& file);
/// "unfused", "flat", "cascade", "architecture", "binding": the five configurations of the paper.
const Mapping& builtin_mapping(const std::string& name);
const std::vector<std::string>& builtin_mappings();

/// "three_pass", "two_pass", "one_pass".
const EinsumCascade& builtin_cascade(const std::string& name);

}  // namespace heed::hardware
