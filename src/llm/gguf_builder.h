// Writes small GGUF files in memory, well-formed or not: for tests and fuzzers only.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "llm/gguf_parser.h"

namespace heed {

/// A sequence of bytes that numbers and strings are appended to.
struct GgufBytes {
  std::string data;

  template <class T>
  GgufBytes& put(T value) {
    data.append(reinterpret_cast<const char*>(&value), sizeof value);
    return *this;
  }
  GgufBytes& text(std::string_view value) {
    put<uint64_t>(value.size());
    data += value;
    return *this;
  }
};

class GgufBuilder {
 public:
  uint32_t version = 3;
  std::string magic = "GGUF";

  GgufBuilder& raw_pair(std::string_view key, const GgufBytes& type_and_value) {
    pairs_.text(key);
    pairs_.data += type_and_value.data;
    ++pair_count;
    return *this;
  }
  template <class T>
  GgufBuilder& value(std::string_view key, uint32_t type, T number) {
    return raw_pair(key, GgufBytes().put(type).put(number));
  }
  GgufBuilder& string(std::string_view key, std::string_view text) {
    return raw_pair(key, GgufBytes().put(uint32_t{gguf_value::kString}).text(text));
  }
  GgufBuilder& integer(std::string_view key, uint32_t number) {
    return value(key, gguf_value::kUint32, number);
  }
  GgufBuilder& boolean(std::string_view key, bool flag) {
    return value(key, gguf_value::kBool, static_cast<uint8_t>(flag));
  }
  GgufBuilder& strings(std::string_view key, std::span<const std::string> texts) {
    GgufBytes bytes = array_head(gguf_value::kString, texts.size());
    for (const std::string& text : texts) bytes.text(text);
    return raw_pair(key, bytes);
  }
  template <class T>
  GgufBuilder& array(std::string_view key, uint32_t type, std::span<const T> numbers) {
    GgufBytes bytes = array_head(type, numbers.size());
    for (T number : numbers) bytes.put(number);
    return raw_pair(key, bytes);
  }

  /// Dimensions in the order of the file, contiguous one first.
  GgufBuilder& tensor(std::string_view name, const std::vector<uint64_t>& dims, uint32_t type,
                      uint64_t offset) {
    tensors_.text(name).put(static_cast<uint32_t>(dims.size()));
    for (uint64_t extent : dims) tensors_.put(extent);
    tensors_.put(type).put(offset);
    ++tensor_count;
    return *this;
  }
  GgufBuilder& data(std::string bytes) {
    data_ = std::move(bytes);
    return *this;
  }

  std::string build() const {
    GgufBytes out;
    out.data = magic;
    out.put(version).put(tensor_count).put(pair_count);
    out.data += pairs_.data + tensors_.data;
    out.data.resize((out.data.size() + alignment - 1) / alignment * alignment, '\0');
    return out.data + data_;
  }

  // Counted by the calls above; overwrite them to lie.
  uint64_t pair_count = 0;
  uint64_t tensor_count = 0;
  size_t alignment = 32;

 private:
  static GgufBytes array_head(uint32_t type, size_t count) {
    return GgufBytes().put(uint32_t{gguf_value::kArray}).put(type).put<uint64_t>(count);
  }

  GgufBytes pairs_, tensors_;
  std::string data_;
};

/// The file in `bytes`, which must outlive it.
inline GgufFile parse_gguf(std::string_view bytes) {
  return GgufFile::from_bytes(std::as_bytes(std::span(bytes.data(), bytes.size())));
}

}  // namespace heed
