#include "llm/gguf.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <limits>
#include <utility>

#include "heed/error.h"
#include "llm/gguf_parser.h"
#include "llm/shown.h"

namespace heed {
namespace {

class FileDescriptor {
 public:
  explicit FileDescriptor(int fd) : fd_(fd) {}
  ~FileDescriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  FileDescriptor(const FileDescriptor&) = delete;
  FileDescriptor& operator=(const FileDescriptor&) = delete;
  int get() const { return fd_; }

 private:
  int fd_;
};

template <class T>
T load(const std::byte* p) {
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

}  // namespace

int64_t GgufTensor::count() const {
  int64_t product = 1;
  for (int64_t extent : shape) product *= extent;
  return product;
}

std::vector<float> GgufTensor::to_float() const {
  std::vector<float> values(static_cast<size_t>(count()));
  dequantize(type, bytes, values.data(), count());
  return values;
}

void GgufFile::Unmap::operator()(const std::byte* address) const {
  ::munmap(const_cast<std::byte*>(address), size);
}

GgufFile GgufFile::open(const std::filesystem::path& path) {
  std::string what = "model file " + shown(path.string()) + ": ";
  FileDescriptor fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (fd.get() < 0) throw Error(what + std::strerror(errno));
  struct stat info{};
  if (::fstat(fd.get(), &info) != 0) throw Error(what + std::strerror(errno));
  if (!S_ISREG(info.st_mode)) throw Error(what + "not a regular file, needed a GGUF file");
  auto size = static_cast<size_t>(info.st_size);
  if (size == 0) throw Error(what + "the file is empty, needed a GGUF file");
  void* address = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, fd.get(), 0);
  if (address == MAP_FAILED) throw Error(what + "cannot be mapped: " + std::strerror(errno));

  GgufFile file;
  file.mapping_ = {static_cast<const std::byte*>(address), Unmap{size}};
  file.bytes_ = {file.mapping_.get(), size};
  file.name_ = path.string();
  GgufParser(file).parse();
  return file;
}

GgufFile GgufFile::from_bytes(std::span<const std::byte> bytes, std::string name) {
  GgufFile file;
  file.bytes_ = bytes;
  file.name_ = std::move(name);
  GgufParser(file).parse();
  return file;
}

const GgufFile::Value* GgufFile::value(std::string_view key) const {
  auto found = metadata_.find(key);
  return found == metadata_.end() ? nullptr : &found->second;
}

bool GgufFile::has(std::string_view key) const { return value(key) != nullptr; }

void GgufFile::fail(const std::string& what) const {
  throw Error("model file " + shown(name_) + ": " + what);
}

void GgufFile::wrong_type(std::string_view key, const Value& found, const char* needed) const {
  fail("metadata key " + shown(key) + " is " + (found.is_array ? "an array of " : "of type ") +
       std::string(gguf_value_name(found.type)) + ", needed " + needed);
}

std::optional<std::string_view> GgufFile::string(std::string_view key) const {
  const Value* v = value(key);
  if (v == nullptr) return std::nullopt;
  if (v->is_array || v->type != gguf_value::kString) wrong_type(key, *v, "a string");
  const std::byte* p = bytes_.data() + v->offset;
  return std::string_view(reinterpret_cast<const char*>(p + 8), load<uint64_t>(p));
}

int64_t GgufFile::integer_at(std::string_view key, const Value& v, uint64_t index) const {
  const std::byte* p = bytes_.data() + v.offset + index * gguf_value_bytes(v.type);
  switch (v.type) {
    case gguf_value::kUint8:
      return load<uint8_t>(p);
    case gguf_value::kInt8:
      return load<int8_t>(p);
    case gguf_value::kUint16:
      return load<uint16_t>(p);
    case gguf_value::kInt16:
      return load<int16_t>(p);
    case gguf_value::kUint32:
      return load<uint32_t>(p);
    case gguf_value::kInt32:
      return load<int32_t>(p);
    case gguf_value::kInt64:
      return load<int64_t>(p);
    case gguf_value::kUint64: {
      auto wide = load<uint64_t>(p);
      if (wide > static_cast<uint64_t>(std::numeric_limits<int64_t>::max()))
        fail("metadata key " + shown(key) + " is " + std::to_string(wide) +
             ", needed at most 2^63 - 1");
      return static_cast<int64_t>(wide);
    }
    default:
      wrong_type(key, v, v.is_array ? "an array of integers" : "an integer");
  }
}

double GgufFile::number_at(std::string_view key, const Value& v, uint64_t index) const {
  const std::byte* p = bytes_.data() + v.offset + index * gguf_value_bytes(v.type);
  switch (v.type) {
    case gguf_value::kFloat32:
      return load<float>(p);
    case gguf_value::kFloat64:
      return load<double>(p);
    case gguf_value::kBool:
    case gguf_value::kString:
      wrong_type(key, v, v.is_array ? "an array of numbers" : "a number");
    default:
      return static_cast<double>(integer_at(key, v, index));
  }
}

std::optional<int64_t> GgufFile::integer(std::string_view key) const {
  const Value* v = value(key);
  if (v == nullptr) return std::nullopt;
  if (v->is_array) wrong_type(key, *v, "an integer");
  return integer_at(key, *v, 0);
}

std::optional<double> GgufFile::number(std::string_view key) const {
  const Value* v = value(key);
  if (v == nullptr) return std::nullopt;
  if (v->is_array) wrong_type(key, *v, "a number");
  return number_at(key, *v, 0);
}

std::optional<bool> GgufFile::boolean(std::string_view key) const {
  const Value* v = value(key);
  if (v == nullptr) return std::nullopt;
  if (v->is_array || v->type != gguf_value::kBool) wrong_type(key, *v, "a bool");
  return load<uint8_t>(bytes_.data() + v->offset) != 0;
}

std::optional<std::vector<std::string_view>> GgufFile::strings(std::string_view key) const {
  const Value* v = value(key);
  if (v == nullptr) return std::nullopt;
  if (!v->is_array || v->type != gguf_value::kString) wrong_type(key, *v, "an array of strings");
  std::vector<std::string_view> result;
  result.reserve(v->count);
  const std::byte* p = bytes_.data() + v->offset;
  for (uint64_t i = 0; i < v->count; ++i) {
    auto length = load<uint64_t>(p);
    result.emplace_back(reinterpret_cast<const char*>(p + 8), length);
    p += 8 + length;
  }
  return result;
}

std::optional<std::vector<int64_t>> GgufFile::integers(std::string_view key) const {
  const Value* v = value(key);
  if (v == nullptr) return std::nullopt;
  if (!v->is_array || !gguf_is_integer(v->type)) wrong_type(key, *v, "an array of integers");
  std::vector<int64_t> result(v->count);
  for (uint64_t i = 0; i < v->count; ++i) result[i] = integer_at(key, *v, i);
  return result;
}

std::optional<std::vector<float>> GgufFile::floats(std::string_view key) const {
  const Value* v = value(key);
  if (v == nullptr) return std::nullopt;
  if (!v->is_array || v->type == gguf_value::kString || v->type == gguf_value::kBool)
    wrong_type(key, *v, "an array of numbers");
  std::vector<float> result(v->count);
  for (uint64_t i = 0; i < v->count; ++i) result[i] = static_cast<float>(number_at(key, *v, i));
  return result;
}

template <class T>
T GgufFile::required(std::optional<T> found, std::string_view key) const {
  if (!found) fail("metadata key " + shown(key) + " is missing");
  return std::move(*found);
}

std::string_view GgufFile::require_string(std::string_view key) const {
  return required(string(key), key);
}
int64_t GgufFile::require_integer(std::string_view key) const {
  return required(integer(key), key);
}
double GgufFile::require_number(std::string_view key) const { return required(number(key), key); }
std::vector<std::string_view> GgufFile::require_strings(std::string_view key) const {
  return required(strings(key), key);
}
std::vector<float> GgufFile::require_floats(std::string_view key) const {
  return required(floats(key), key);
}

const GgufTensor* GgufFile::find(std::string_view name) const {
  auto found = tensor_index_.find(name);
  return found == tensor_index_.end() ? nullptr : &tensors_[found->second];
}

const GgufTensor& GgufFile::require(std::string_view name) const {
  const GgufTensor* found = find(name);
  if (found == nullptr) fail("tensor " + shown(name) + " is missing");
  return *found;
}

}  // namespace heed
