// Reader of GGUF files, versions 2 and 3 (little-endian), memory-mapped.
// Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
#pragma once
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "llm/ggml_types.h"

namespace heed {

/// One tensor of a file. `bytes` lies in the mapping: valid while the GgufFile lives (moves included),
/// read-only, aligned to the file's alignment (at least 8).
struct GgufTensor {
  std::string name;
  GgmlType type;
  std::vector<int64_t> shape;  // as in PyTorch, last dimension contiguous: [out, in] for a matrix
  std::span<const std::byte> bytes;

  int64_t count() const;  // product of the shape
  /// All values as float32, row-major.
  std::vector<float> to_float() const;
};

/// A GGUF file. Opening checks everything the reader will ever touch: counts, string lengths, types,
/// alignment, dimension products and tensor ranges against the file's size. Duplicate keys, duplicate
/// tensor names, overlapping tensors, nested arrays, and tensor types not in GgmlType are errors.
/// Every mistake in a file throws Error that names the key or tensor, what was found and what was needed.
class GgufFile {
 public:
  /// Maps a file. Throws Error when it cannot be opened or is not a valid GGUF file.
  static GgufFile open(const std::filesystem::path& path);
  /// Reads a file that is already in memory and outlives the result; `name` stands in error messages.
  static GgufFile from_bytes(std::span<const std::byte> bytes, std::string name = "memory");

  GgufFile(GgufFile&&) noexcept = default;
  GgufFile& operator=(GgufFile&&) noexcept = default;

  // Metadata. The getters give nullopt when the key is absent; a value of another type is an Error.
  // Views point into the file and live as long as it.
  bool has(std::string_view key) const;
  std::optional<std::string_view> string(std::string_view key) const;
  std::optional<int64_t> integer(std::string_view key) const;  // any integer type that fits int64
  std::optional<double> number(std::string_view key) const;    // any integer or float type
  std::optional<bool> boolean(std::string_view key) const;
  std::optional<std::vector<std::string_view>> strings(std::string_view key) const;
  std::optional<std::vector<int64_t>> integers(std::string_view key) const;
  std::optional<std::vector<float>> floats(std::string_view key) const;

  // The same, where an absent key is an Error that names it.
  std::string_view require_string(std::string_view key) const;
  int64_t require_integer(std::string_view key) const;
  double require_number(std::string_view key) const;
  std::vector<std::string_view> require_strings(std::string_view key) const;
  std::vector<float> require_floats(std::string_view key) const;

  /// In the order of the file.
  const std::vector<GgufTensor>& tensors() const { return tensors_; }
  /// nullptr when there is no such tensor.
  const GgufTensor* find(std::string_view name) const;
  /// Throws Error naming the tensor when there is none.
  const GgufTensor& require(std::string_view name) const;

  /// Path or name, for messages.
  const std::string& name() const { return name_; }
  /// Throws Error with `what` after the name of the file.
  [[noreturn]] void fail(const std::string& what) const;

 private:
  struct Value {
    uint32_t type;  // GGUF value type of the value, or of the elements of an array
    bool is_array;
    uint64_t count;   // elements; 1 for a single value
    uint64_t offset;  // of the first element in the file
  };
  struct Unmap {
    size_t size;
    void operator()(const std::byte* address) const;
  };
  friend class GgufParser;

  GgufFile() = default;
  const Value* value(std::string_view key) const;
  [[noreturn]] void wrong_type(std::string_view key, const Value& found, const char* needed) const;
  int64_t integer_at(std::string_view key, const Value& value, uint64_t index) const;
  double number_at(std::string_view key, const Value& value, uint64_t index) const;
  template <class T>
  T required(std::optional<T> found, std::string_view key) const;

  std::string name_;
  std::unique_ptr<const std::byte, Unmap> mapping_;
  std::span<const std::byte> bytes_;
  std::map<std::string, Value, std::less<>> metadata_;
  std::vector<GgufTensor> tensors_;
  std::map<std::string, size_t, std::less<>> tensor_index_;
};

}  // namespace heed
