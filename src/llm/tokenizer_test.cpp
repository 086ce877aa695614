#include "llm/tokenizer.h"

#include <gtest/gtest.h>

#include <fstream>
#include <map>
#include <random>
#include <sstream>

#include "heed/error.h"
#include "llm/gguf.h"
#include "llm/gguf_builder.h"
#include "llm/utf8.h"

namespace heed {
namespace {

constexpr EncodeOptions kPlain{.parse_specials = false, .add_bos_eos = false};
constexpr EncodeOptions kSpecials{.parse_specials = true, .add_bos_eos = false};
using Ids = std::vector<int32_t>;

template <class Call>
void expect_throws(Call call, const std::string& part) {
  try {
    call();
    FAIL() << "no error, expected one with: " << part;
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
  }
}

Tokenizer from(const GgufBuilder& builder) {
  std::string bytes = builder.build();
  return Tokenizer(parse_gguf(bytes));
}

// The vocabulary of testdata/bpe.gguf with another pre-tokenizer.
Tokenizer bpe(const std::string& pre) {
  GgufFile file = GgufFile::open("src/llm/testdata/bpe.gguf");
  auto copy = [&](const char* key) {
    std::vector<std::string_view> views = file.require_strings(key);
    return std::vector<std::string>(views.begin(), views.end());
  };
  std::vector<int64_t> wide = file.integers("tokenizer.ggml.token_type").value();
  std::vector<int32_t> types(wide.begin(), wide.end());
  return from(GgufBuilder()
                  .string("tokenizer.ggml.model", "gpt2")
                  .string("tokenizer.ggml.pre", pre)
                  .strings("tokenizer.ggml.tokens", copy("tokenizer.ggml.tokens"))
                  .array<int32_t>("tokenizer.ggml.token_type", gguf_value::kInt32, types)
                  .strings("tokenizer.ggml.merges", copy("tokenizer.ggml.merges")));
}

Tokenizer stories() { return Tokenizer(GgufFile::open("models/stories260K.gguf")); }

std::string from_hex(const std::string& hex) {
  std::string bytes;
  for (size_t i = 0; i + 1 < hex.size(); i += 2)
    bytes += static_cast<char>(std::stoi(hex.substr(i, 2), nullptr, 16));
  return bytes;
}

// testdata/tokens.txt comes from the Python packages tokenizers and sentencepiece.
TEST(Tokenizer, EqualsOtherImplementations) {
  std::map<std::string, Tokenizer> tokenizers;
  for (const char* pre : {"gpt-2", "smollm", "llama-bpe", "qwen2"})
    tokenizers.emplace(pre, bpe(pre));
  tokenizers.emplace("llama", stories());
  std::ifstream file("src/llm/testdata/tokens.txt");
  std::map<std::string, int> cases;
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    std::string kind, hex;
    words >> kind >> hex;
    std::string text = from_hex(hex);
    Ids expected;
    for (int32_t id; words >> id;) expected.push_back(id);
    const Tokenizer& tokenizer = tokenizers.at(kind);
    EXPECT_EQ(tokenizer.encode(text, kPlain), expected) << kind << ": " << text;
    EXPECT_EQ(tokenizer.decode(expected), text) << kind;
    ++cases[kind];
  }
  ASSERT_EQ(cases.size(), 5u);
  for (const auto& [other, ours] : {std::pair("llama3", "llama-bpe"),
                                    {"deepseek-r1-qwen", "qwen2"},
                                    {"exaone4", "gpt-2"},
                                    {"mpt", "gpt-2"},
                                    {"olmo", "gpt-2"},
                                    {"jais", "gpt-2"},
                                    {"command-r", "smollm"}}) {
    const std::string text = "It's 12345\n\n  words";
    EXPECT_EQ(bpe(other).encode(text, kPlain), tokenizers.at(ours).encode(text, kPlain)) << other;
  }
  for (const auto& [kind, count] : cases) EXPECT_GE(count, 15) << kind;
}

TEST(Tokenizer, LongRunsOfOneLetter) {
  // Quadratic work would take hours here.
  std::string letters(1 << 20, 'z'), spaces(1 << 20, ' ');
  for (const Tokenizer& tokenizer : {bpe("smollm"), bpe("llama-bpe"), stories()}) {
    EXPECT_EQ(tokenizer.decode(tokenizer.encode(letters, kPlain)), letters);
    EXPECT_EQ(tokenizer.decode(tokenizer.encode(spaces, kPlain)), spaces);
  }
}

TEST(Tokenizer, IllFormedTextIsReplaced) {
  std::string bad = "a\xff b\xe2\x82 c\xed\xa0\x80", good = to_valid_utf8(bad);
  for (const Tokenizer& tokenizer : {bpe("gpt-2"), stories()}) {
    EXPECT_EQ(tokenizer.encode(bad), tokenizer.encode(good));
    EXPECT_EQ(tokenizer.decode(tokenizer.encode(bad)), good);
  }
}

// As in sentencepiece and tokenizers, where they stand for words of their own.
TEST(Tokenizer, UserDefinedTokensAreReadInAnyText) {
  const std::vector<std::string> texts = {"a", "<", "|", ">",   "i",          "m",  "_",
                                          "e", "n", "d", "<a>", "<|im_end|>", "<e>"};
  const std::vector<int32_t> types = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 4, 4, 3};
  const Tokenizer tokenizer =
      from(GgufBuilder()
               .string("tokenizer.ggml.model", "gpt2")
               .string("tokenizer.ggml.pre", "gpt-2")
               .strings("tokenizer.ggml.tokens", texts)
               .array<int32_t>("tokenizer.ggml.token_type", gguf_value::kInt32, types)
               .strings("tokenizer.ggml.merges", {}));
  EXPECT_EQ(tokenizer.encode("a<a>a<a", kPlain), (Ids{0, 10, 0, 1, 0}));
  EXPECT_EQ(tokenizer.decode(Ids{0, 10, 0}), "a<a>a");
  EXPECT_EQ(tokenizer.encode("<e>", kPlain), (Ids{1, 7, 3}));
  // Some files call the ends of turns user-defined.
  EXPECT_EQ(tokenizer.encode("<|im_end|>", kPlain), (Ids{1, 2, 4, 5, 6, 7, 8, 9, 2, 3}));
  EXPECT_EQ(tokenizer.encode("<|im_end|><a>", kSpecials), (Ids{11, 10}));
}

// The text goes on behind them: no space is put there, and none is dropped from their own.
TEST(Tokenizer, UserDefinedTokensOfALlamaTokenizerPutNoSpace) {
  const std::vector<std::string> texts = {"<unk>", "<s>", "a", "\u2581", "\u2581a", "<x>", "  "};
  const std::vector<int32_t> types = {2, 3, 1, 1, 1, 4, 4};
  const std::vector<float> scores = {0, 0, -1, -1, -1, 0, 0};
  const Tokenizer tokenizer =
      from(GgufBuilder()
               .string("tokenizer.ggml.model", "llama")
               .strings("tokenizer.ggml.tokens", texts)
               .array<int32_t>("tokenizer.ggml.token_type", gguf_value::kInt32, types)
               .array<float>("tokenizer.ggml.scores", gguf_value::kFloat32, scores)
               .integer("tokenizer.ggml.unknown_token_id", 0));
  EXPECT_EQ(tokenizer.encode("a<x>a", kPlain), (Ids{4, 5, 2}));
  EXPECT_EQ(tokenizer.encode("a<x> a", kPlain), (Ids{4, 5, 4}));
  EXPECT_EQ(tokenizer.encode("a<s>a", kSpecials), (Ids{4, 1, 4}));
  for (const char* text : {"a<x>a", "a<x> a", "<x>a", "  a", " a"}) {
    const Ids ids = tokenizer.encode(text, kPlain);
    EXPECT_EQ(tokenizer.decode(ids), text);
    StreamDecoder stream(tokenizer);
    std::string streamed;
    for (int32_t id : ids) streamed += stream.put(id);
    EXPECT_EQ(streamed, text);
  }
}

TEST(Tokenizer, SpecialsOnlyWhenAsked) {
  Tokenizer tokenizer = bpe("gpt-2");
  int32_t start = tokenizer.find_special("<|im_start|>").value_or(-1),
          end = tokenizer.find_special("<|im_end|>").value_or(-1);
  EXPECT_EQ(tokenizer.find_special("hello"), std::nullopt);
  EXPECT_EQ(tokenizer.token_type(start), TokenType::kControl);
  std::string text = "<|im_start|>a b<|im_end|><|im_end|> <|im_";
  Ids plain = tokenizer.encode(text, kPlain), parsed = tokenizer.encode(text, kSpecials);
  for (int32_t id : plain) EXPECT_EQ(tokenizer.token_type(id), TokenType::kNormal);
  EXPECT_EQ(tokenizer.decode(plain), text);
  Ids expected = {start};
  for (int32_t id : tokenizer.encode("a b", kPlain)) expected.push_back(id);
  expected.insert(expected.end(), {end, end});
  for (int32_t id : tokenizer.encode(" <|im_", kPlain)) expected.push_back(id);
  EXPECT_EQ(parsed, expected);
  EXPECT_EQ(tokenizer.decode(parsed), "a b <|im_");
  EXPECT_EQ(tokenizer.decode(parsed, true), text);
}

// A byte-pair vocabulary small enough to work out by hand.
GgufBuilder tiny_bpe() {
  std::vector<std::string> tokens = {"a", "b", "c", "ab", "abc", "<x>", "<x>>", "bc"};
  std::vector<std::string> merges = {"a b", "b c", "ab c"};
  std::vector<int32_t> types = {1, 1, 1, 1, 1, 3, 4, 1};
  GgufBuilder file;
  file.string("tokenizer.ggml.model", "gpt2")
      .string("tokenizer.ggml.pre", "gpt-2")
      .strings("tokenizer.ggml.tokens", tokens)
      .array<int32_t>("tokenizer.ggml.token_type", gguf_value::kInt32, types)
      .strings("tokenizer.ggml.merges", merges);
  return file;
}

TEST(Tokenizer, BytePairByHand) {
  Tokenizer tokenizer = from(tiny_bpe());
  EXPECT_EQ(tokenizer.encode("abc", kPlain), (Ids{4}));
  EXPECT_EQ(tokenizer.encode("bcab", kPlain), (Ids{7, 3}));
  EXPECT_EQ(tokenizer.encode("aabcc", kPlain), (Ids{0, 4, 2}));
  EXPECT_EQ(tokenizer.encode("azb", kPlain), (Ids{3}));  // z has no token and is dropped
  EXPECT_EQ(tokenizer.encode("", kPlain), Ids{});
  EXPECT_EQ(tokenizer.encode("a<x>>b<x>", kSpecials), (Ids{0, 6, 1, 5}));  // the longest first
  EXPECT_EQ(tokenizer.decode(Ids{0, 6, 1, 5}), "a<x>>b");
  EXPECT_EQ(tokenizer.vocab_size(), 8);
  EXPECT_EQ(tokenizer.token_text(4), "abc");
  EXPECT_EQ(tokenizer.bos(), std::nullopt);
  EXPECT_TRUE(tokenizer.end_tokens().empty());
}

TEST(Tokenizer, BeginAndEndTokens) {
  Tokenizer both = from(tiny_bpe()
                            .integer("tokenizer.ggml.bos_token_id", 5)
                            .integer("tokenizer.ggml.eos_token_id", 6)
                            .integer("tokenizer.ggml.eot_token_id", 6)
                            .boolean("tokenizer.ggml.add_bos_token", true)
                            .boolean("tokenizer.ggml.add_eos_token", true));
  EXPECT_EQ(both.encode("ab"), (Ids{5, 3, 6}));
  EXPECT_EQ(both.encode(""), (Ids{5, 6}));
  EXPECT_EQ(both.encode("ab", kPlain), (Ids{3}));
  const EncodeOptions specials{.parse_specials = true};
  EXPECT_EQ(both.encode("ab<x>", specials), (Ids{5, 3, 5, 6}));
  EXPECT_EQ(both.encode("<x>ab", specials), (Ids{5, 3, 6}));  // not begun twice
  EXPECT_EQ(both.encode("<x><x>", specials), (Ids{5, 5, 6}));
  EXPECT_EQ(both.encode("<x>", specials), (Ids{5, 6}));
  EXPECT_EQ(both.encode("<x>ab", kSpecials), (Ids{5, 3}));
  EXPECT_EQ(both.end_tokens(), (Ids{6}));
  Tokenizer story = stories();
  EXPECT_TRUE(story.adds_bos());
  EXPECT_FALSE(story.adds_eos());
  EXPECT_EQ(story.encode("").size(), 1u);
  EXPECT_EQ(story.encode("")[0], story.bos());
  EXPECT_EQ(story.end_tokens(), (Ids{2}));
}

TEST(Tokenizer, LlamaSpaces) {
  Tokenizer tokenizer = stories();
  Ids ids = tokenizer.encode("Once upon", kPlain);
  EXPECT_EQ(tokenizer.token_text(ids[0]), "\xe2\x96\x81Once");
  EXPECT_EQ(tokenizer.decode(ids), "Once upon");
  EXPECT_EQ(tokenizer.decode(tokenizer.encode("  Once ")), "  Once ");
  EXPECT_EQ(tokenizer.decode(Ids{ids[0], ids[0]}), "Once Once");
  EXPECT_EQ(tokenizer.decode(tokenizer.encode("a\xe2\x96\x81")),
            "a ");  // U+2581 stands for a space
  // Byte fallback: U+20AC has no piece.
  EXPECT_EQ(tokenizer.decode(tokenizer.encode("5 \xe2\x82\xac")), "5 \xe2\x82\xac");
}

GgufBuilder tiny_llama(const std::vector<std::string>& tokens, const std::vector<float>& scores,
                       const std::vector<int32_t>& types) {
  GgufBuilder file;
  file.string("tokenizer.ggml.model", "llama")
      .strings("tokenizer.ggml.tokens", tokens)
      .array<float>("tokenizer.ggml.scores", gguf_value::kFloat32, scores)
      .array<int32_t>("tokenizer.ggml.token_type", gguf_value::kInt32, types);
  return file;
}

TEST(Tokenizer, ScoresDecideAndUnknownsStay) {
  std::vector<std::string> tokens = {"<unk>", "a", "b", "ab", "ba", "\xe2\x96\x81"};
  std::vector<int32_t> types = {2, 1, 1, 1, 1, 1};
  auto with = [&](float ab, float ba) {
    return from(tiny_llama(tokens, {0, -9, -9, ab, ba, -9}, types)
                    .integer("tokenizer.ggml.unknown_token_id", 0)
                    .boolean("tokenizer.ggml.add_space_prefix", false));
  };
  EXPECT_EQ(with(-1, -2).encode("aba", kPlain), (Ids{3, 1}));
  EXPECT_EQ(with(-2, -1).encode("aba", kPlain), (Ids{1, 4}));
  EXPECT_EQ(with(-1, -1).encode("aba", kPlain), (Ids{3, 1}));  // equal scores: leftmost
  EXPECT_EQ(with(-1, -2).encode("a?\xc3\xa9", kPlain), (Ids{1, 0, 0}));
  EXPECT_EQ(with(-1, -2).decode(Ids{1, 0, 5}), "a \xe2\x81\x87  ");
}

TEST(Tokenizer, StreamGivesWholeCharacters) {
  Tokenizer tokenizer = stories();
  std::string text = "Lily saw \xf0\x9f\x98\x80\xc3\xa9!";
  StreamDecoder stream(tokenizer);
  std::string shown;
  int silent = 0;
  for (int32_t id : tokenizer.encode(text)) {
    std::string part = stream.put(id);
    EXPECT_EQ(to_valid_utf8(part), part);
    silent += part.empty();
    shown += part;
  }
  EXPECT_EQ(shown + stream.finish(), text);
  EXPECT_EQ(silent, 1 + 3);  // BOS, and three of four bytes of the emoji; the letter has a piece
}

TEST(Tokenizer, StreamReplacesWhatCannotBeText) {
  Tokenizer tokenizer = stories();
  auto byte = [&](int b) { return 3 + b; };  // byte tokens follow <unk>, <s>, </s>
  StreamDecoder stream(tokenizer, false);
  EXPECT_EQ(stream.put(byte(0xe2)), "");
  EXPECT_EQ(stream.put(byte('x')), "\xef\xbf\xbdx");
  EXPECT_EQ(stream.put(byte(0xff)), "\xef\xbf\xbd");
  EXPECT_EQ(stream.put(byte(0xf0)), "");
  EXPECT_EQ(stream.finish(), "\xef\xbf\xbd");
  EXPECT_EQ(stream.finish(), "");
  int32_t once = tokenizer.encode("Once", kPlain)[0];
  EXPECT_EQ(stream.put(once), " Once");
  EXPECT_EQ(StreamDecoder(tokenizer).put(once), "Once");
}

TEST(Tokenizer, IdsOutsideTheVocabulary) {
  Tokenizer tokenizer = stories();
  StreamDecoder stream(tokenizer);
  for (int32_t id : {-1, 512}) {
    std::string message = "token id is " + std::to_string(id) + ", needed 0 to 511";
    expect_throws([&] { tokenizer.decode(Ids{id}); }, message);
    expect_throws([&] { tokenizer.token_text(id); }, message);
    expect_throws([&] { tokenizer.token_type(id); }, message);
    expect_throws([&] { stream.put(id); }, message);
  }
}

TEST(Tokenizer, BadFiles) {
  auto bad = [](const GgufBuilder& file, const std::string& part) {
    expect_throws([&] { from(file); }, part);
  };
  auto bpe_file = [](const std::vector<std::string>& merges, const char* pre = "gpt-2") {
    std::vector<std::string> tokens = {"a", "b", "ab"};
    return GgufBuilder()
        .string("tokenizer.ggml.model", "gpt2")
        .string("tokenizer.ggml.pre", pre)
        .strings("tokenizer.ggml.tokens", tokens)
        .strings("tokenizer.ggml.merges", merges);
  };
  bad(GgufBuilder(), "\"tokenizer.ggml.tokens\" is missing");
  bad(GgufBuilder().strings("tokenizer.ggml.tokens", {}), "has 0 tokens");
  bad(bpe_file({"a b"}, "other"), "\"other\", needed smollm, gpt-2, llama-bpe or qwen2");
  bad(bpe_file({"a b"}, "jina-v2-de"), "\"jina-v2-de\", needed smollm");
  bad(bpe_file({"ab"}), "merge 0 \"ab\" is malformed");
  bad(bpe_file({"a b", "a "}), "merge 1 \"a \" is malformed");
  bad(bpe_file({""}), "merge 0 \"\" is malformed");
  bad(bpe_file({"b a"}), "uses \"ba\", which is no normal token");
  bad(bpe_file({"a q"}), "uses \"q\"");
  std::vector<std::string> one = {"a"};
  bad(GgufBuilder().strings("tokenizer.ggml.tokens", one).string("tokenizer.ggml.model", "bert"),
      "\"bert\", needed gpt2 or llama");
  bad(tiny_bpe().integer("tokenizer.ggml.eos_token_id", 8), "eos_token_id is 8, needed 0 to 7");
  bad(tiny_bpe().boolean("tokenizer.ggml.add_bos_token", true),
      "needed tokenizer.ggml.bos_token_id");
  bad(tiny_bpe().boolean("tokenizer.ggml.add_eos_token", true),
      "needed tokenizer.ggml.eos_token_id");

  float nan = std::numeric_limits<float>::quiet_NaN();
  bad(tiny_llama({"a"}, {0, 1}, {1}), "scores has 2 entries, needed one for each of the 1 tokens");
  bad(tiny_llama({"a"}, {0}, {1, 1}), "token_type has 2 entries");
  bad(tiny_llama({"a"}, {0}, {7}), "token_type of token 0 is 7, needed 1 to 6");
  bad(tiny_llama({"a"}, {nan}, {1}), "the score of token 0 \"a\" is nan");
  bad(tiny_llama({"a"}, {0}, {1}), "neither all 256 byte tokens nor an unknown token");
  for (const char* text : {"<0xG0>", "<0x0>", "<0x000>", "0x00", "<0x-1>", "<0x+1>"})
    bad(tiny_llama({text}, {0}, {6}), "malformed, needed a text like");
  bad(tiny_llama({"a"}, {0}, {1}).boolean("tokenizer.ggml.remove_extra_whitespaces", true),
      "normalisation");
}

TEST(Utf8, Steps) {
  struct Case {
    const char* text;
    Utf8Step step;
  };
  const Case cases[] = {
      {"a", {1, true, false}},
      {"\xc3\xa9z", {2, true, false}},
      {"\xe2\x82\xac", {3, true, false}},
      {"\xf0\x9f\x98\x80", {4, true, false}},
      {"\xf4\x8f\xbf\xbf", {4, true, false}},
      {"\xf0\x9f\x98", {3, false, true}},
      {"\xc3", {1, false, true}},
      {"\x80", {1, false, false}},
      {"\xc0\x80", {1, false, false}},  // too long a form
      {"\xe0\x80\x80", {1, false, false}},
      {"\xed\xa0\x80", {1, false, false}},      // a surrogate
      {"\xf4\x90\x80\x80", {1, false, false}},  // above U+10FFFF
      {"\xe2\x82z", {2, false, false}},
      {"\xff", {1, false, false}},
  };
  for (const Case& c : cases) {
    Utf8Step found = utf8_step(c.text);
    EXPECT_EQ(found.bytes, c.step.bytes) << c.text;
    EXPECT_EQ(found.valid, c.step.valid) << c.text;
    EXPECT_EQ(found.cut, c.step.cut) << c.text;
  }
  EXPECT_EQ(to_valid_utf8("a\xe2\x82z\xed\xa0\x80\xf0\x9f"),
            "a\xef\xbf\xbdz\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd");
}

TEST(Tokenizer, RandomBytesComeBackAsText) {
  std::mt19937 random(3);
  Tokenizer byte_level = bpe("qwen2"), pieces = stories();
  for (int round = 0; round < 300; ++round) {
    std::string text;
    for (size_t i = random() % 200; i > 0; --i)
      text += static_cast<char>(round % 2 ? random() : "ab \n\xc3\xa9'1"[random() % 8]);
    EXPECT_EQ(byte_level.decode(byte_level.encode(text)), to_valid_utf8(text));
    EXPECT_EQ(pieces.decode(pieces.encode(text)), to_valid_utf8(text));
  }
}

}  // namespace
}  // namespace heed
