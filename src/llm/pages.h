// Large memory straight from the operating system, in huge pages where it grants them.
#pragma once
#include <cstddef>

namespace heed {

/// Zero-filled private memory that becomes real page by page as it is touched; aligned to 2 MB.
class Pages {
 public:
  Pages() = default;
  /// Throws Error naming the number of bytes when the system refuses.
  explicit Pages(size_t bytes);
  ~Pages();
  Pages(Pages&& other) noexcept;
  Pages& operator=(Pages&& other) noexcept;

  std::byte* data() const { return data_; }
  size_t size() const { return bytes_; }

 private:
  std::byte* mapping_ = nullptr;
  size_t mapped_ = 0;
  std::byte* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace heed
