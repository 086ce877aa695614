#include "llm/gguf.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <bit>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <limits>

#include "heed/error.h"
#include "llm/gguf_builder.h"
#include "llm/shown.h"

namespace heed {
namespace {

constexpr uint32_t kF32 = 0, kQ4_1 = 3;

// A file with one value of each type and two tensors.
GgufBuilder sample() {
  std::vector<std::string> words = {"one", "", "drei"};
  std::vector<int32_t> numbers = {-1, 0, 7};
  std::vector<float> reals = {0.5f, -2.0f};
  GgufBuilder file;
  file.string("name", "a model")
      .value("u8", gguf_value::kUint8, uint8_t{200})
      .value("i8", gguf_value::kInt8, int8_t{-5})
      .value("u16", gguf_value::kUint16, uint16_t{60000})
      .value("i16", gguf_value::kInt16, int16_t{-3000})
      .value("u32", gguf_value::kUint32, uint32_t{4000000000})
      .value("i32", gguf_value::kInt32, int32_t{-7})
      .value("u64", gguf_value::kUint64, uint64_t{1} << 40)
      .value("i64", gguf_value::kInt64, int64_t{-1} << 40)
      .value("huge", gguf_value::kUint64, ~uint64_t{0})
      .value("f32", gguf_value::kFloat32, 0.25f)
      .value("f64", gguf_value::kFloat64, 1e300)
      .boolean("yes", true)
      .strings("words", words)
      .array<int32_t>("numbers", gguf_value::kInt32, numbers)
      .array<float>("reals", gguf_value::kFloat32, reals)
      .tensor("matrix", {3, 2}, kF32, 0)
      .tensor("packed", {32, 1}, kQ4_1, 32)
      .data(std::string(24, '\0') + std::string(8 + 20, '\1'));
  return file;
}

void expect_error(const std::string& bytes, const std::string& part) {
  try {
    parse_gguf(bytes);
    FAIL() << "no error, expected one with: " << part;
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
  }
}

template <class Call>
void expect_throws(Call call, const std::string& part) {
  try {
    call();
    FAIL() << "no error, expected one with: " << part;
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
  }
}

TEST(Gguf, ReadsMetadata) {
  std::string bytes = sample().build();
  GgufFile file = parse_gguf(bytes);
  EXPECT_EQ(file.require_string("name"), "a model");
  EXPECT_EQ(file.require_integer("u8"), 200);
  EXPECT_EQ(file.require_integer("i8"), -5);
  EXPECT_EQ(file.require_integer("u16"), 60000);
  EXPECT_EQ(file.require_integer("i16"), -3000);
  EXPECT_EQ(file.require_integer("u32"), 4000000000);
  EXPECT_EQ(file.require_integer("i32"), -7);
  EXPECT_EQ(file.require_integer("u64"), int64_t{1} << 40);
  EXPECT_EQ(file.require_integer("i64"), int64_t{-1} << 40);
  EXPECT_EQ(file.require_number("f32"), 0.25);
  EXPECT_EQ(file.require_number("f64"), 1e300);
  EXPECT_EQ(file.require_number("i32"), -7.0);
  EXPECT_EQ(file.boolean("yes"), true);
  EXPECT_EQ(file.require_strings("words"), (std::vector<std::string_view>{"one", "", "drei"}));
  EXPECT_EQ(file.integers("numbers"), (std::vector<int64_t>{-1, 0, 7}));
  EXPECT_EQ(file.require_floats("reals"), (std::vector<float>{0.5f, -2.0f}));
  EXPECT_EQ(file.require_floats("numbers"), (std::vector<float>{-1, 0, 7}));
}

TEST(Gguf, AbsentKeysAndWrongTypes) {
  std::string bytes = sample().build();
  GgufFile file = parse_gguf(bytes);
  EXPECT_FALSE(file.has("none"));
  EXPECT_EQ(file.string("none"), std::nullopt);
  EXPECT_EQ(file.integer("none"), std::nullopt);
  EXPECT_EQ(file.strings("none"), std::nullopt);
  expect_throws([&] { file.require_integer("none"); }, "\"none\" is missing");
  expect_throws([&] { file.string("u8"); }, "\"u8\" is of type uint8, needed a string");
  expect_throws([&] { file.integer("f32"); }, "\"f32\" is of type float32, needed an integer");
  const std::string folders(40, 'a'), name(40, 'b');
  EXPECT_EQ(shown(folders + name), '"' + folders + name + '"');
  EXPECT_EQ(shown(folders + "/" + name), '"' + folders + "..." + name + '"');
  expect_throws([&] { file.integer("words"); }, "\"words\" is an array of string");
  expect_throws([&] { file.number("name"); }, "needed a number");
  expect_throws([&] { file.boolean("u8"); }, "needed a bool");
  expect_throws([&] { file.strings("numbers"); }, "needed an array of strings");
  expect_throws([&] { file.integers("reals"); }, "needed an array of integers");
  expect_throws([&] { file.floats("words"); }, "needed an array of numbers");
  expect_throws([&] { file.integer("huge"); }, "18446744073709551615, needed at most 2^63 - 1");
}

TEST(Gguf, ReadsTensors) {
  std::string bytes = sample().build();
  GgufFile file = parse_gguf(bytes);
  ASSERT_EQ(file.tensors().size(), 2u);
  const GgufTensor& matrix = file.require("matrix");
  EXPECT_EQ(matrix.shape, (std::vector<int64_t>{2, 3}));
  EXPECT_EQ(matrix.count(), 6);
  EXPECT_EQ(matrix.bytes.size(), 24u);
  EXPECT_EQ(file.require("packed").bytes.size(), 20u);
  EXPECT_EQ(file.require("packed").bytes[19], std::byte{1});
  EXPECT_EQ(file.find("other"), nullptr);
  expect_throws([&] { file.require("other"); }, "tensor \"other\" is missing");
}

TEST(Gguf, EveryTruncationIsAnError) {
  std::string bytes = sample().build();
  for (size_t length = 0; length < bytes.size(); ++length)
    EXPECT_THROW(parse_gguf(std::string_view(bytes).substr(0, length)), Error) << length;
}

// Whatever one wrong bit makes of the file, reading all of it is an error or stays inside.
TEST(Gguf, EveryBitFlipIsSafe) {
  std::string bytes = sample().build();
  size_t errors = 0;
  for (size_t bit = 0; bit < 8 * bytes.size(); ++bit) {
    std::string wrong = bytes;
    wrong[bit / 8] = static_cast<char>(wrong[bit / 8] ^ (1 << bit % 8));
    try {
      GgufFile file = parse_gguf(wrong);
      for (const GgufTensor& tensor : file.tensors())
        EXPECT_EQ(tensor.to_float().size(), static_cast<size_t>(tensor.count()));
    } catch (const Error&) {
      ++errors;
    }
  }
  EXPECT_GT(errors, 100u);
}

TEST(Gguf, HeaderErrors) {
  GgufBuilder file = sample();
  file.magic = "GGML";
  expect_error(file.build(), "not a GGUF file");
  file = sample();
  file.version = 1;
  expect_error(file.build(), "GGUF version 1, needed version 2 or 3");
  file.version = 2;
  const std::string old = file.build();
  EXPECT_NO_THROW(parse_gguf(old));
  file.version = 0x03000000;
  expect_error(file.build(), "big-endian");
  file = sample();
  file.pair_count = uint64_t{1} << 60;
  expect_error(file.build(), "counts 1152921504606846976 metadata pairs");
  file = sample();
  file.tensor_count = ~uint64_t{0};
  expect_error(file.build(), "counts 18446744073709551615 tensors");
}

TEST(Gguf, MetadataErrors) {
  auto pair = [](const GgufBytes& value) { return GgufBuilder().raw_pair("key", value).build(); };
  uint64_t most = ~uint64_t{0};
  expect_error(pair(GgufBytes().put(uint32_t{gguf_value::kString}).put(most)), "\"key\"");
  expect_error(pair(GgufBytes().put(uint32_t{13})), "value type 13, needed 0 to 12");
  expect_error(pair(GgufBytes().put(uint32_t{gguf_value::kBool}).put(uint8_t{2})),
               "bool with value 2");
  auto array = [&](uint32_t type, uint64_t count) {
    return pair(GgufBytes().put(uint32_t{gguf_value::kArray}).put(type).put(count));
  };
  expect_error(array(gguf_value::kUint64, most), "18446744073709551615 values of 8 bytes");
  expect_error(array(gguf_value::kUint64, uint64_t{1} << 61), "2305843009213693952 values");
  expect_error(array(gguf_value::kString, most), "18446744073709551615 strings");
  expect_error(array(gguf_value::kArray, 1), "array of arrays");
  expect_error(array(99, 1), "value type 99");
  expect_error(GgufBuilder().integer("twice", 1).integer("twice", 2).build(),
               "\"twice\" stands twice");
  expect_error(GgufBuilder().integer("", 1).build(), "has 0 bytes, needed 1 to 65535");
  expect_error(GgufBuilder().integer(std::string(70000, 'k'), 1).build(), "has 70000 bytes");
  expect_error(GgufBuilder().integer("bad\n\xff", 1).integer("bad\n\xff", 1).build(),
               "\"bad\\x0a\\xff\" stands twice");
}

TEST(Gguf, TensorErrors) {
  auto one = [](const std::vector<uint64_t>& dims, uint32_t type, uint64_t offset) {
    return GgufBuilder().tensor("t", dims, type, offset).data(std::string(64, 'x')).build();
  };
  uint64_t big = uint64_t{1} << 32;
  EXPECT_NO_THROW(parse_gguf(one({16}, kF32, 0)));
  expect_error(one({}, kF32, 0), "\"t\" has 0 dimensions");
  expect_error(one({1, 1, 1, 1, 1}, kF32, 0), "\"t\" has 5 dimensions");
  expect_error(one({0}, kF32, 0), "dimension 0");
  expect_error(one({big, big}, kF32, 0), "a product below 2^63");
  expect_error(one({~uint64_t{0}}, kF32, 0), "dimension 18446744073709551615");
  expect_error(one({big, big / 4}, kF32, 0), "needs 4611686018427387904 blocks of 4 bytes");
  expect_error(one({17}, kF32, 0), "needs 17 blocks of 4 bytes at offset 0");
  expect_error(one({1}, kF32, 64), "needs 1 blocks");
  expect_error(one({1}, kF32, 4), "at offset 4, needed a multiple of 32");
  expect_error(one({1}, kF32, ~uint64_t{31}), "offset 18446744073709551584");
  expect_error(one({33}, kQ4_1, 0), "rows of 33 values, needed a multiple of 32 for Q4_1");
  expect_error(one({256}, 10, 0), "\"t\" is stored as type 10 (Q2_K), which heed does not read");
  expect_error(one({256}, 4, 0), "stored as type 4,");
}

TEST(Gguf, TensorsMayNotShareNamesOrBytes) {
  std::string data(128, 'x');
  expect_error(
      GgufBuilder().tensor("t", {1}, kF32, 0).tensor("t", {1}, kF32, 32).data(data).build(),
      "\"t\" stands twice");
  expect_error(
      GgufBuilder().tensor("b", {1}, kF32, 32).tensor("a", {9}, kF32, 0).data(data).build(),
      "tensors \"a\" and \"b\" overlap");
  expect_error(GgufBuilder().tensor("a", {1}, kF32, 0).tensor("b", {1}, kF32, 0).data(data).build(),
               "overlap");
  std::string gap =
      GgufBuilder().tensor("a", {8}, kF32, 0).tensor("b", {1}, kF32, 64).data(data).build();
  EXPECT_EQ(parse_gguf(gap).require("b").bytes.size(), 4u);
}

TEST(Gguf, Alignment) {
  auto file = [](uint32_t value) {
    GgufBuilder builder;
    builder.alignment = 64;
    return builder.integer("general.alignment", value)
        .tensor("a", {1}, kF32, 0)
        .tensor("b", {1}, kF32, 64)
        .data(std::string(68, 'x'))
        .build();
  };
  EXPECT_EQ(parse_gguf(file(64)).require("b").bytes[3], std::byte{'x'});
  expect_error(file(0), "\"general.alignment\" is 0, needed a power of two");
  expect_error(file(4), "\"general.alignment\" is 4,");
  expect_error(file(48), "\"general.alignment\" is 48,");
  expect_error(file(1u << 31), "padding");
}

TEST(Gguf, OpensFiles) {
  std::filesystem::path folder =
      std::filesystem::temp_directory_path() / ("heed_gguf_test_" + std::to_string(getpid()));
  std::filesystem::create_directory(folder);
  auto write = [&](const char* name, const std::string& bytes) {
    std::ofstream(folder / name, std::ios::binary) << bytes;
    return folder / name;
  };
  GgufFile file = GgufFile::open(write("good.gguf", sample().build()));
  GgufFile moved = std::move(file);
  EXPECT_EQ(moved.require("packed").bytes[19], std::byte{1});
  EXPECT_EQ(moved.require_string("name"), "a model");
  moved = GgufFile::open(write("small.gguf", GgufBuilder().integer("k", 1).build()));
  EXPECT_EQ(moved.require_integer("k"), 1);
  expect_throws([&] { GgufFile::open(folder / "none.gguf"); }, "none.gguf\": No such file");
  expect_throws([&] { GgufFile::open(folder); }, "not a regular file");
  expect_throws([&] { GgufFile::open(write("empty.gguf", "")); }, "empty");
  expect_throws([&] { GgufFile::open(write("bad.gguf", "PK\3\4")); }, "not a GGUF file");
  std::filesystem::remove_all(folder);
}

// testdata/quants.gguf holds random blocks of every type and what the Python package gguf makes of them.
TEST(Dequantize, EqualsTheReferenceBitForBit) {
  GgufFile file = GgufFile::open("src/llm/testdata/quants.gguf");
  const char* types[] = {"F16",  "BF16", "Q8_0", "Q4_0", "Q4_1",
                         "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"};
  for (std::string type : types) {
    const GgufTensor& tensor = file.require(type);
    ASSERT_EQ(name_of(block_format(tensor.type)), type);
    std::vector<float> found = tensor.to_float();
    std::vector<float> expected = file.require(type + ".expected").to_float();
    ASSERT_EQ(found.size(), expected.size()) << type;
    ASSERT_GE(found.size(), 256u) << type;
    for (size_t i = 0; i < found.size(); ++i)
      ASSERT_EQ(std::bit_cast<uint32_t>(found[i]), std::bit_cast<uint32_t>(expected[i]))
          << type << " value " << i << ": " << found[i] << ", expected " << expected[i];
  }
}

TEST(Dequantize, NanAndInfinityStay) {
  auto one = [](GgmlType type, uint16_t bits) {
    float value = 0.0f;
    dequantize(type, std::as_bytes(std::span(&bits, 1)), &value, 1);
    return value;
  };
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  EXPECT_EQ(one(GgmlType::kF16, 0x7c00), kInfinity);
  EXPECT_EQ(one(GgmlType::kF16, 0xfc00), -kInfinity);
  EXPECT_TRUE(std::isnan(one(GgmlType::kF16, 0x7e01)));
  EXPECT_EQ(one(GgmlType::kBF16, 0x7f80), kInfinity);
  EXPECT_TRUE(std::isnan(one(GgmlType::kBF16, 0xffc0)));
}

TEST(Dequantize, ChecksSizes) {
  std::vector<std::byte> bytes(40);
  std::vector<float> out(64);
  dequantize(GgmlType::kQ4_1, bytes, out.data(), 64);
  EXPECT_EQ(out[63], 0.0f);
  expect_throws([&] { dequantize(GgmlType::kQ4_1, bytes, out.data(), 33); }, "multiple of 32");
  expect_throws([&] { dequantize(GgmlType::kQ4_1, bytes, out.data(), -32); }, "count is -32");
  expect_throws([&] { dequantize(GgmlType::kQ4_1, bytes, out.data(), 32); }, "needed 1 blocks");
  auto unread = std::bit_cast<GgmlType>(uint32_t{10});
  expect_throws([&] { dequantize(unread, bytes, out.data(), 32); }, "Q2_K");
}

}  // namespace
}  // namespace heed
