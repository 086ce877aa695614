// Parsing of the header, metadata and tensor table of a GGUF file, with every check.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>

#include "llm/gguf.h"

namespace heed {

/// Value types of metadata. Source: GGUF specification, gguf_metadata_value_type.
namespace gguf_value {
enum : uint32_t {
  kUint8 = 0,
  kInt8 = 1,
  kUint16 = 2,
  kInt16 = 3,
  kUint32 = 4,
  kInt32 = 5,
  kFloat32 = 6,
  kBool = 7,
  kString = 8,
  kArray = 9,
  kUint64 = 10,
  kInt64 = 11,
  kFloat64 = 12,
};
}  // namespace gguf_value

/// "uint32", "string", ...; "unknown type" for ids outside the table.
std::string_view gguf_value_name(uint32_t type);
/// Bytes of a value of fixed size; 0 for strings, arrays and unknown types.
uint64_t gguf_value_bytes(uint32_t type);
bool gguf_is_integer(uint32_t type);

/// Fills the tables of a GgufFile whose bytes are set. Throws Error at the first mistake.
class GgufParser {
 public:
  explicit GgufParser(GgufFile& file) : file_(file) {}
  void parse();

 private:
  [[noreturn]] void fail(const std::string& what) const;
  uint64_t left() const { return file_.bytes_.size() - position_; }
  void need(uint64_t bytes, const std::string& what) const;
  template <class T>
  T read(const std::string& what);
  std::string_view read_string(const std::string& what);
  void check_count(uint64_t count, uint64_t least_bytes, const char* what) const;

  void parse_header();
  void parse_pair();
  void skip_values(GgufFile::Value& value, const std::string& what);
  void parse_tensor();
  void place_tensors();
  void check_overlap() const;
  uint64_t alignment() const;

  GgufFile& file_;
  uint64_t position_ = 0;
  uint64_t tensor_count_ = 0;
  uint64_t pair_count_ = 0;
  std::vector<uint64_t> tensor_offsets_;  // from the start of the data section
};

}  // namespace heed
