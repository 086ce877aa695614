#include "llm/pages.h"

#include <sys/mman.h>

#include <cstdint>
#include <string>
#include <utility>

#include "base/huge_pages.h"
#include "heed/error.h"

namespace heed {

Pages::Pages(size_t bytes) : bytes_(bytes) {
  if (bytes == 0) return;
  void* mapping = MAP_FAILED;
  if (bytes <= SIZE_MAX - kHugePage) {
    mapped_ = bytes + kHugePage;
    mapping = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  }
  if (mapping == MAP_FAILED) {
    throw Error("memory: " + std::to_string(bytes) + " bytes are needed, the system refuses them");
  }
  mapping_ = static_cast<std::byte*>(mapping);
  const size_t past = reinterpret_cast<uintptr_t>(mapping_) % kHugePage;
  data_ = mapping_ + (past == 0 ? 0 : kHugePage - past);
  prefer_huge_pages(data_, bytes);
}

Pages::~Pages() {
  if (mapping_ != nullptr) munmap(mapping_, mapped_);
}

Pages::Pages(Pages&& other) noexcept
    : mapping_(std::exchange(other.mapping_, nullptr)),
      mapped_(std::exchange(other.mapped_, 0)),
      data_(std::exchange(other.data_, nullptr)),
      bytes_(std::exchange(other.bytes_, 0)) {}

Pages& Pages::operator=(Pages&& other) noexcept {
  std::swap(mapping_, other.mapping_);
  std::swap(mapped_, other.mapped_);
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

}  // namespace heed
