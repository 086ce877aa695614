#include "llm/gguf_parser.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <limits>

#include "heed/error.h"
#include "llm/shown.h"

namespace heed {
namespace {

struct ValueType {
  std::string_view name;
  uint64_t bytes;
};
constexpr std::array<ValueType, 13> kValueTypes = {{
    {"uint8", 1},
    {"int8", 1},
    {"uint16", 2},
    {"int16", 2},
    {"uint32", 4},
    {"int32", 4},
    {"float32", 4},
    {"bool", 1},
    {"string", 0},
    {"array", 0},
    {"uint64", 8},
    {"int64", 8},
    {"float64", 8},
}};

constexpr uint32_t kVersion = 3, kOldVersion = 2;  // 3 only added big-endian files
constexpr uint64_t kDefaultAlignment = 32;
constexpr uint32_t kMaxRank = 4;
constexpr uint64_t kMaxKeyBytes = 65535;  // from the specification
constexpr uint64_t kMaxNameBytes = 65535;
// Smallest possible entries: key length + 1 byte + type + 1 byte of value; name length + rank + one
// dimension + type + offset.
constexpr uint64_t kLeastPairBytes = 8 + 1 + 4 + 1;
constexpr uint64_t kLeastTensorBytes = 8 + 4 + 8 + 4 + 8;

}  // namespace

std::string_view gguf_value_name(uint32_t type) {
  return type < kValueTypes.size() ? kValueTypes[type].name : "unknown type";
}

uint64_t gguf_value_bytes(uint32_t type) {
  return type < kValueTypes.size() ? kValueTypes[type].bytes : 0;
}

bool gguf_is_integer(uint32_t type) {
  return type <= gguf_value::kInt32 || type == gguf_value::kUint64 || type == gguf_value::kInt64;
}

void GgufParser::fail(const std::string& what) const { file_.fail(what); }

void GgufParser::need(uint64_t bytes, const std::string& what) const {
  if (bytes > left())
    fail(what + " needs " + std::to_string(bytes) + " bytes at offset " +
         std::to_string(position_) + ", but the file ends after " + std::to_string(left()));
}

template <class T>
T GgufParser::read(const std::string& what) {
  need(sizeof(T), what);
  T value;
  std::memcpy(&value, file_.bytes_.data() + position_, sizeof value);
  position_ += sizeof value;
  return value;
}

std::string_view GgufParser::read_string(const std::string& what) {
  auto length = read<uint64_t>("the length of " + what);
  need(length, what);
  std::string_view text(reinterpret_cast<const char*>(file_.bytes_.data() + position_), length);
  position_ += length;
  return text;
}

void GgufParser::check_count(uint64_t count, uint64_t least_bytes, const char* what) const {
  if (count > left() / least_bytes)
    fail("the header counts " + std::to_string(count) + " " + what + ", but the " +
         std::to_string(left()) + " bytes that follow hold at most " +
         std::to_string(left() / least_bytes));
}

void GgufParser::parse() {
  parse_header();
  for (uint64_t i = 0; i < pair_count_; ++i) parse_pair();
  check_count(tensor_count_, kLeastTensorBytes, "tensors");
  file_.tensors_.reserve(tensor_count_);
  tensor_offsets_.reserve(tensor_count_);
  for (uint64_t i = 0; i < tensor_count_; ++i) parse_tensor();
  place_tensors();
  check_overlap();
}

void GgufParser::parse_header() {
  if (file_.bytes_.size() < 4 || std::memcmp(file_.bytes_.data(), "GGUF", 4) != 0)
    fail("does not begin with GGUF, so it is not a GGUF file");
  position_ = 4;
  auto version = read<uint32_t>("the version");
  if (version == kVersion << 24) fail("is a big-endian GGUF file, needed little-endian");
  if (version != kVersion && version != kOldVersion)
    fail("is GGUF version " + std::to_string(version) + ", needed version " +
         std::to_string(kOldVersion) + " or " + std::to_string(kVersion));
  tensor_count_ = read<uint64_t>("the number of tensors");
  pair_count_ = read<uint64_t>("the number of metadata pairs");
  check_count(pair_count_, kLeastPairBytes, "metadata pairs");
  check_count(tensor_count_, kLeastTensorBytes, "tensors");
}

void GgufParser::parse_pair() {
  std::string_view key = read_string("a metadata key");
  if (key.empty() || key.size() > kMaxKeyBytes)
    fail("metadata key " + shown(key) + " has " + std::to_string(key.size()) +
         " bytes, needed 1 to " + std::to_string(kMaxKeyBytes));
  std::string what = "metadata key " + shown(key);
  GgufFile::Value value{};
  value.type = read<uint32_t>("the type of " + what);
  value.count = 1;
  if (value.type == gguf_value::kArray) {
    value.is_array = true;
    value.type = read<uint32_t>("the element type of " + what);
    value.count = read<uint64_t>("the element count of " + what);
    if (value.type == gguf_value::kArray) fail(what + " is an array of arrays, which is not read");
  }
  if (value.type >= kValueTypes.size())
    fail(what + " has value type " + std::to_string(value.type) + ", needed 0 to " +
         std::to_string(kValueTypes.size() - 1));
  value.offset = position_;
  skip_values(value, what);
  if (!file_.metadata_.emplace(std::string(key), value).second) fail(what + " stands twice");
}

void GgufParser::skip_values(GgufFile::Value& value, const std::string& what) {
  if (value.type == gguf_value::kString) {
    // A string takes at least its 8 length bytes: a count beyond that fails before the loop.
    if (value.count > left() / 8)
      fail(what + " has " + std::to_string(value.count) + " strings, but only " +
           std::to_string(left()) + " bytes follow");
    for (uint64_t i = 0; i < value.count; ++i) read_string(what);
    return;
  }
  uint64_t size = gguf_value_bytes(value.type);
  if (size != 0 && value.count > left() / size)
    fail(what + " has " + std::to_string(value.count) + " values of " + std::to_string(size) +
         " bytes, but only " + std::to_string(left()) + " bytes follow");
  if (value.type == gguf_value::kBool)
    for (uint64_t i = 0; i < value.count; ++i) {
      auto byte = std::to_integer<int>(file_.bytes_[position_ + i]);
      if (byte > 1)
        fail(what + " is a bool with value " + std::to_string(byte) + ", needed 0 or 1");
    }
  position_ += value.count * size;
}

void GgufParser::parse_tensor() {
  GgufTensor tensor;
  std::string_view name = read_string("a tensor name");
  if (name.size() > kMaxNameBytes)
    fail("tensor name " + shown(name) + " has " + std::to_string(name.size()) +
         " bytes, needed at most " + std::to_string(kMaxNameBytes));
  tensor.name = name;
  std::string what = "tensor " + shown(name);
  auto rank = read<uint32_t>("the rank of " + what);
  if (rank < 1 || rank > kMaxRank)
    fail(what + " has " + std::to_string(rank) + " dimensions, needed 1 to 4");
  int64_t count = 1;
  for (uint32_t axis = 0; axis < rank; ++axis) {
    auto extent = read<uint64_t>("a dimension of " + what);
    if (extent < 1 || extent > static_cast<uint64_t>(std::numeric_limits<int64_t>::max() / count))
      fail(what + " has dimension " + std::to_string(extent) +
           ", needed at least 1 and a product below 2^63");
    count *= static_cast<int64_t>(extent);
    tensor.shape.push_back(static_cast<int64_t>(extent));
  }
  // The file lists the contiguous dimension first.
  std::reverse(tensor.shape.begin(), tensor.shape.end());

  auto type = read<uint32_t>("the type of " + what);
  const std::optional<BlockFormat> format = block_format(type);
  if (!format)
    fail(what + " is stored as " + ggml_type_name(type) +
         ", which heed does not read; it reads F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, "
         "Q5_K and Q6_K");
  tensor.type = static_cast<GgmlType>(type);
  if (tensor.shape.back() % weights_per_block(*format) != 0)
    fail(what + " has rows of " + std::to_string(tensor.shape.back()) +
         " values, needed a multiple of " + std::to_string(weights_per_block(*format)) + " for " +
         name_of(*format));
  tensor_offsets_.push_back(read<uint64_t>("the offset of " + what));
  if (!file_.tensor_index_.emplace(tensor.name, file_.tensors_.size()).second)
    fail(what + " stands twice");
  file_.tensors_.push_back(std::move(tensor));
}

uint64_t GgufParser::alignment() const {
  std::optional<int64_t> given = file_.integer("general.alignment");
  if (!given) return kDefaultAlignment;
  auto value = static_cast<uint64_t>(*given);
  if (*given < 8 || !std::has_single_bit(value))
    fail("metadata key \"general.alignment\" is " + std::to_string(*given) +
         ", needed a power of two of at least 8");
  return value;
}

void GgufParser::place_tensors() {
  uint64_t align = alignment();
  if (file_.tensors_.empty()) return;
  uint64_t padding = (align - position_ % align) % align;
  need(padding, "the padding before the tensor data");
  uint64_t start = position_ + padding;
  uint64_t size = file_.bytes_.size() - start;
  for (size_t i = 0; i < file_.tensors_.size(); ++i) {
    GgufTensor& tensor = file_.tensors_[i];
    uint64_t offset = tensor_offsets_[i];
    if (offset % align != 0)
      fail("tensor " + shown(tensor.name) + " is at offset " + std::to_string(offset) +
           ", needed a multiple of " + std::to_string(align));
    const BlockLayout& block = layout_of(block_format(tensor.type));
    auto blocks = static_cast<uint64_t>(tensor.count() / block.weights);
    auto block_bytes = static_cast<uint64_t>(block.bytes);
    if (offset > size || blocks > (size - offset) / block_bytes)
      fail("tensor " + shown(tensor.name) + " needs " + std::to_string(blocks) + " blocks of " +
           std::to_string(block_bytes) + " bytes at offset " + std::to_string(offset) +
           ", but the file has " + std::to_string(size) + " bytes of tensor data");
    tensor.bytes = file_.bytes_.subspan(start + offset, blocks * block_bytes);
  }
}

void GgufParser::check_overlap() const {
  std::vector<const GgufTensor*> order;
  order.reserve(file_.tensors_.size());
  for (const GgufTensor& tensor : file_.tensors_) order.push_back(&tensor);
  std::sort(order.begin(), order.end(), [](const GgufTensor* a, const GgufTensor* b) {
    return a->bytes.data() < b->bytes.data();
  });
  for (size_t i = 1; i < order.size(); ++i)
    if (order[i - 1]->bytes.data() + order[i - 1]->bytes.size() > order[i]->bytes.data())
      fail("tensors " + shown(order[i - 1]->name) + " and " + shown(order[i]->name) + " overlap");
}

}  // namespace heed
