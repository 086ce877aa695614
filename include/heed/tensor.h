// Strided views of caller memory, owning arrays and their element types. No dependencies.
#pragma once
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <span>
#include <string>

namespace heed {

enum class DType : uint8_t { f64, f32, bf16, f16, i64, i32, boolean };

size_t size_of(DType dtype);
const char* name_of(DType dtype);  // "float64", "bfloat16", ...
constexpr bool is_floating(DType t) { return t <= DType::f16; }
constexpr bool is_half(DType t) { return t == DType::bf16 || t == DType::f16; }
/// The type of float or double.
template <class T>
inline constexpr DType dtype_of = sizeof(T) == sizeof(double) ? DType::f64 : DType::f32;

/// Storage of one 16-bit float; arithmetic happens in float32.
struct bfloat16 {
  uint16_t bits = 0;
};
struct float16 {
  uint16_t bits = 0;
};
inline float to_float(bfloat16 x) {
  return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}
float to_float(float16 x);
bfloat16 to_bfloat16(float x);  // round to nearest even, NaN stays NaN
float16 to_float16(float x);

inline constexpr int kMaxRank = 6;

/// A sequence of up to kMaxRank extents or strides. Indices are not checked.
class Dims {
 public:
  Dims() = default;
  Dims(std::initializer_list<int64_t> values);
  explicit Dims(std::span<const int64_t> values);
  int rank() const { return rank_; }
  int64_t operator[](int axis) const { return values_[static_cast<size_t>(axis)]; }
  int64_t& operator[](int axis) { return values_[static_cast<size_t>(axis)]; }
  int64_t back() const { return values_[static_cast<size_t>(rank_ - 1)]; }
  std::span<const int64_t> span() const { return {values_.data(), static_cast<size_t>(rank_)}; }
  bool operator==(const Dims& other) const;

 private:
  std::array<int64_t, kMaxRank> values_{};
  int rank_ = 0;
};

std::string to_string(const Dims& dims);  // "[2,8,512,64]"
int64_t element_count(const Dims& shape);
Dims contiguous_strides(const Dims& shape);

/// A non-owning view: element (i0,i1,...) lies at data + sum(i_k * stride_k) elements.
/// Whoever makes the view keeps the memory alive. Inputs are never written through.
class Tensor {
 public:
  Tensor() = default;
  Tensor(const void* data, DType dtype, const Dims& shape);  // contiguous, last axis fastest
  Tensor(const void* data, DType dtype, const Dims& shape, const Dims& strides);

  bool defined() const { return data_ != nullptr || rank() > 0; }
  void* data() const { return data_; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  DType dtype() const { return dtype_; }
  int rank() const { return shape_.rank(); }
  const Dims& shape() const { return shape_; }
  const Dims& strides() const { return strides_; }
  int64_t size(int axis) const { return shape_[axis]; }
  int64_t stride(int axis) const { return strides_[axis]; }
  int64_t count() const { return element_count(shape_); }
  bool is_contiguous() const;

  /// The view with index `i` taken along `axis`, which disappears. Throws Error where there is none.
  Tensor select(int axis, int64_t i) const;
  /// The view of [begin, end) along `axis`. Throws Error where that is not inside.
  Tensor slice(int axis, int64_t begin, int64_t end) const;
  /// Address of the element at the leading indices (missing ones are 0). Nothing is checked.
  std::byte* at(std::initializer_list<int64_t> index) const;

 private:
  void* data_ = nullptr;
  DType dtype_ = DType::f32;
  Dims shape_;
  Dims strides_;
};

/// "q [2,8,512,64] bfloat16"
std::string describe(const char* name, const Tensor& tensor);

/// Owns 64-byte aligned contiguous memory. Moves, never copies silently.
class Array {
 public:
  Array() = default;
  Array(DType dtype, const Dims& shape);  // contents undefined
  static Array zeros(DType dtype, const Dims& shape);
  Tensor view() const { return tensor_; }
  operator Tensor() const { return tensor_; }  // NOLINT: an Array is usable wherever a view is
  DType dtype() const { return tensor_.dtype(); }
  const Dims& shape() const { return tensor_.shape(); }
  int64_t count() const { return tensor_.count(); }
  template <class T>
  T* as() const {
    return tensor_.as<T>();
  }

 private:
  struct Free {
    Free() : Free(0) {}
    explicit Free(size_t size) : bytes(size) {}
    void operator()(void* p) const;
    size_t bytes;
  };
  std::unique_ptr<void, Free> memory_;
  Tensor tensor_;
};

/// Copies elements with conversion between floating types; shapes must be equal, strides may differ.
void copy(const Tensor& from, const Tensor& to);
/// A contiguous copy in another floating type.
Array convert(const Tensor& from, DType to);

}  // namespace heed
