#include "heed/tensor.h"

#include <bit>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "base/blocks.h"
#include "heed/error.h"

namespace heed {

size_t size_of(DType dtype) {
  switch (dtype) {
    case DType::f64:
    case DType::i64:
      return 8;
    case DType::f32:
    case DType::i32:
      return 4;
    case DType::bf16:
    case DType::f16:
      return 2;
    case DType::boolean:
      return 1;
  }
  return 0;
}

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::f64:
      return "float64";
    case DType::f32:
      return "float32";
    case DType::bf16:
      return "bfloat16";
    case DType::f16:
      return "float16";
    case DType::i64:
      return "int64";
    case DType::i32:
      return "int32";
    case DType::boolean:
      return "bool";
  }
  return "?";
}

bfloat16 to_bfloat16(float x) {
  uint32_t bits = std::bit_cast<uint32_t>(x);
  if (std::isnan(x)) return {static_cast<uint16_t>((bits >> 16) | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

float to_float(float16 x) {
  uint32_t sign = uint32_t{x.bits & 0x8000u} << 16;
  uint32_t exponent = (x.bits >> 10) & 0x1f;
  uint32_t mantissa = x.bits & 0x3ff;
  if (exponent == 0x1f) return std::bit_cast<float>(sign | 0x7f800000 | (mantissa << 13));
  if (exponent == 0) {  // zero or subnormal: the value is mantissa * 2^-24
    float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(magnitude));
  }
  return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

float16 to_float16(float x) {
  uint32_t bits = std::bit_cast<uint32_t>(x);
  auto sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) {
    return {static_cast<uint16_t>(sign | 0x7e00 | ((magnitude >> 13) & 0x3ff))};
  }
  if (magnitude >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};  // rounds to inf
  if (magnitude < 0x38800000) {  // subnormal: adding 0.5 makes the float unit round to 2^-24
    float rounded = std::bit_cast<float>(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(rounded) - 0x3f000000))};
  }
  uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1) - 0x38000000;
  return {static_cast<uint16_t>(sign | (rounded >> 13))};
}

Dims::Dims(std::initializer_list<int64_t> values)
    : Dims(std::span<const int64_t>(values.begin(), values.size())) {}

Dims::Dims(std::span<const int64_t> values) {
  if (values.size() > kMaxRank) {
    throw Error("tensor has rank " + std::to_string(values.size()) + ", at most " +
                std::to_string(kMaxRank) + " is supported");
  }
  rank_ = static_cast<int>(values.size());
  std::copy(values.begin(), values.end(), values_.begin());
}

bool Dims::operator==(const Dims& other) const {
  return std::equal(span().begin(), span().end(), other.span().begin(), other.span().end());
}

std::string to_string(const Dims& dims) {
  std::string text = "[";
  for (int i = 0; i < dims.rank(); ++i) {
    if (i) text += ',';
    text += std::to_string(dims[i]);
  }
  return text + "]";
}

int64_t element_count(const Dims& shape) {
  bool empty = false;
  for (int64_t extent : shape.span()) {
    if (extent < 0) throw Error("shape " + to_string(shape) + " has a negative extent");
    empty |= extent == 0;
  }
  int64_t count = empty ? 0 : 1;
  for (int64_t extent : shape.span()) {
    if (__builtin_mul_overflow(count, extent, &count)) {
      throw Error("shape " + to_string(shape) + " has more than 2^63 elements");
    }
  }
  return count;
}

Dims contiguous_strides(const Dims& shape) {
  (void)element_count(shape);  // throws where steps are too large
  Dims strides = shape;
  int64_t step = 1;
  for (int i = shape.rank() - 1; i >= 0; --i) {
    strides[i] = step;
    if (shape[i] == 0 || __builtin_mul_overflow(step, shape[i], &step)) step = 1;  // of no element
  }
  return strides;
}

Tensor::Tensor(const void* data, DType dtype, const Dims& shape)
    : Tensor(data, dtype, shape, contiguous_strides(shape)) {}

Tensor::Tensor(const void* data, DType dtype, const Dims& shape, const Dims& strides)
    : data_(const_cast<void*>(data)), dtype_(dtype), shape_(shape), strides_(strides) {
  if (shape.rank() != strides.rank()) {
    throw Error("tensor of shape " + to_string(shape) + " has strides " + to_string(strides) +
                ", one stride per dimension is needed");
  }
  if (element_count(shape) > 0 && data == nullptr) {
    throw Error("tensor of shape " + to_string(shape) + " has no memory");
  }
}

bool Tensor::is_contiguous() const {
  Dims expected = contiguous_strides(shape_);
  for (int i = 0; i < rank(); ++i) {
    if (shape_[i] > 1 && strides_[i] != expected[i]) return false;
  }
  return true;
}

std::byte* Tensor::at(std::initializer_list<int64_t> index) const {
  int64_t offset = 0;
  int axis = 0;
  for (int64_t i : index) offset += i * strides_[axis++];
  return static_cast<std::byte*>(data_) + offset * static_cast<int64_t>(size_of(dtype_));
}

namespace {

[[noreturn]] void refuse_view(const char* call, const std::string& found, const Dims& shape) {
  throw Error(std::string(call) + ": " + found + " of a tensor of shape " + to_string(shape) +
              " does not exist");
}

void check_axis(const char* call, int axis, const Dims& shape) {
  if (axis < 0 || axis >= shape.rank()) {
    refuse_view(call, "axis " + std::to_string(axis), shape);
  }
}

}  // namespace

Tensor Tensor::select(int axis, int64_t i) const {
  check_axis("select", axis, shape_);
  if (i < 0 || i >= size(axis)) {
    refuse_view("select", "index " + std::to_string(i) + " of axis " + std::to_string(axis),
                shape_);
  }
  Dims shape, strides;
  std::array<int64_t, kMaxRank> kept_shape{}, kept_strides{};
  size_t kept = 0;
  for (int a = 0; a < rank(); ++a) {
    if (a == axis) continue;
    kept_shape[kept] = shape_[a];
    kept_strides[kept++] = strides_[a];
  }
  auto* start =
      static_cast<std::byte*>(data_) + i * strides_[axis] * static_cast<int64_t>(size_of(dtype_));
  return Tensor(start, dtype_, Dims(std::span<const int64_t>(kept_shape.data(), kept)),
                Dims(std::span<const int64_t>(kept_strides.data(), kept)));
}

Tensor Tensor::slice(int axis, int64_t begin, int64_t end) const {
  check_axis("slice", axis, shape_);
  if (begin < 0 || begin > end || end > size(axis)) {
    refuse_view("slice",
                "range " + std::to_string(begin) + " to " + std::to_string(end) + " of axis " +
                    std::to_string(axis),
                shape_);
  }
  Tensor part = *this;
  part.shape_[axis] = end - begin;
  part.data_ = static_cast<std::byte*>(data_) +
               begin * strides_[axis] * static_cast<int64_t>(size_of(dtype_));
  return part;
}

std::string describe(const char* name, const Tensor& tensor) {
  if (!tensor.defined()) return std::string(name) + " is missing";
  return std::string(name) + " " + to_string(tensor.shape()) + " " + name_of(tensor.dtype());
}

void Array::Free::operator()(void* p) const { free_block(p, bytes); }

Array::Array(DType dtype, const Dims& shape) {
  int64_t count = element_count(shape);
  int64_t bytes = 0;
  if (__builtin_mul_overflow(count, static_cast<int64_t>(size_of(dtype)), &bytes) ||
      bytes > INT64_MAX - 64) {
    throw Error("shape " + to_string(shape) + " needs more memory than can be addressed");
  }
  const auto size = static_cast<size_t>(bytes);
  memory_ = std::unique_ptr<void, Free>(allocate_block(size), Free{size});
  tensor_ = Tensor(memory_.get(), dtype, shape);
}

Array Array::zeros(DType dtype, const Dims& shape) {
  Array array(dtype, shape);
  std::memset(array.tensor_.data(), 0, static_cast<size_t>(array.count()) * size_of(dtype));
  return array;
}

namespace {

// Calls body(T{}) with the element type.
template <class Body>
void with_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f64:
      return body(double{});
    case DType::f32:
      return body(float{});
    case DType::bf16:
      return body(bfloat16{});
    case DType::f16:
      return body(float16{});
    case DType::i64:
      return body(int64_t{});
    case DType::i32:
      return body(int32_t{});
    case DType::boolean:
      return body(bool{});
  }
}

template <class From>
double load(From x) {
  if constexpr (std::is_arithmetic_v<From>) {
    return static_cast<double>(x);
  } else {
    return to_float(x);
  }
}

// To odd: a number that lies between two floats becomes the one whose last bit is 1, so that rounding to
// fewer bits afterwards sees on which side of a tie it lay.
float round_to_odd(double x) {
  const auto nearest = static_cast<float>(x);
  if (std::isnan(x) || static_cast<double>(nearest) == x) return nearest;
  auto bits = std::bit_cast<uint32_t>(nearest);
  if (std::abs(static_cast<double>(nearest)) > std::abs(x)) --bits;
  return std::bit_cast<float>(bits | 1);
}

template <class To>
To store(double x) {
  if constexpr (std::is_same_v<To, bfloat16>) {
    return to_bfloat16(round_to_odd(x));
  } else if constexpr (std::is_same_v<To, float16>) {
    return to_float16(round_to_odd(x));
  } else {
    return static_cast<To>(x);
  }
}

void copy_row(const Tensor& from, const Tensor& to) {
  const int64_t count = from.size(0), read = from.stride(0), write = to.stride(0);
  with_type(from.dtype(), [&](auto of_from) {
    with_type(to.dtype(), [&](auto of_to) {
      using From = decltype(of_from);
      using To = decltype(of_to);
      const From* source = from.as<From>();
      To* target = to.as<To>();
      if constexpr (std::is_same_v<To, From>) {
        for (int64_t i = 0; i < count; ++i) target[i * write] = source[i * read];
      } else if constexpr (!std::is_integral_v<To>) {
        for (int64_t i = 0; i < count; ++i) target[i * write] = store<To>(load(source[i * read]));
      } else {
        throw Error(std::string("copy: cannot convert to ") + name_of(to.dtype()) +
                    ", a floating type is needed");
      }
    });
  });
}

void copy_axis(const Tensor& from, const Tensor& to) {
  if (from.rank() == 1) return copy_row(from, to);
  if (from.rank() == 0) {
    const Tensor source(from.data(), from.dtype(), {1}), target(to.data(), to.dtype(), {1});
    return copy_row(source, target);
  }
  for (int64_t i = 0; i < from.size(0); ++i) copy_axis(from.select(0, i), to.select(0, i));
}

}  // namespace

void copy(const Tensor& from, const Tensor& to) {
  if (!(from.shape() == to.shape())) {
    throw Error("copy: source has shape " + to_string(from.shape()) + ", destination " +
                to_string(to.shape()) + "; equal shapes are needed");
  }
  if (from.count() == 0) return;
  if (from.dtype() == to.dtype() && from.is_contiguous() && to.is_contiguous()) {
    std::memcpy(to.data(), from.data(), static_cast<size_t>(from.count()) * size_of(from.dtype()));
    return;
  }
  copy_axis(from, to);
}

Array convert(const Tensor& from, DType to) {
  Array result(to, from.shape());
  copy(from, result);
  return result;
}

}  // namespace heed
