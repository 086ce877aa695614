#include "mechanisms/spec.h"

#include <gtest/gtest.h>

#include <functional>
#include <limits>

#include "heed/error.h"
#include "mechanisms/nearest.h"

namespace heed {
namespace {

std::string message_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

TEST(Spec, ReadsNameAndValues) {
  const Spec spec = Spec::parse("flash:window=256, causal=1,scale=-2.5e-1,form=code");
  EXPECT_EQ(spec.name(), "flash");
  EXPECT_EQ(spec.integer("window"), 256);
  EXPECT_TRUE(spec.flag("causal"));
  EXPECT_EQ(spec.number("scale"), -0.25);
  EXPECT_EQ(spec.text("form"), "code");
  EXPECT_FALSE(spec.has("bias"));
  EXPECT_EQ(spec.integer("bias"), std::nullopt);
  EXPECT_TRUE(spec.flag("bias", true));
}

TEST(Spec, NameAlone) {
  EXPECT_EQ(Spec::parse("sigmoid").name(), "sigmoid");
  EXPECT_EQ(Spec::parse("sigmoid:").str(), "sigmoid");
  EXPECT_EQ(Spec::parse_options("").str(), "");
}

TEST(Spec, WritesWhatItReads) {
  for (const char* text : {"flash", "flash:causal=1,window=8", "a:b=-1.5"}) {
    EXPECT_EQ(Spec::parse(text).str(), text);
  }
  EXPECT_EQ(Spec::parse_options("b=2,a=1").str(), "a=1,b=2");
}

TEST(Spec, Flags) {
  const Spec spec = Spec::parse_options("a=1,b=true,c=yes,d=on,e=0,f=false,g=no,h=off");
  for (const char* key : {"a", "b", "c", "d"}) EXPECT_TRUE(spec.flag(key)) << key;
  for (const char* key : {"e", "f", "g", "h"}) EXPECT_FALSE(spec.flag(key, true)) << key;
}

TEST(Spec, RefusesBadText) {
  for (const char* text : {"", ":", ":a=1", " ", "a=1", "flash:window", "flash:=1", "flash:a=",
                           "flash:a=1,", "flash:,a=1", "flash:a=1,a=1", "flash:a=1,,b=2"}) {
    EXPECT_THROW(Spec::parse(text), Error) << text;
  }
}

TEST(Spec, RefusesBadValuesByKey) {
  const Spec spec = Spec::parse_options(
      "w=8x,f=maybe,s=abc,n=nan,big=99999999999999999999,part=1.5,hex=0x10,sign=+-1,plus=+");
  for (const char* key : {"w", "big", "part", "hex", "sign", "plus"}) {
    EXPECT_NE(message_of([&] { spec.integer(key); }).find(std::string("'") + key + "'"),
              std::string::npos);
  }
  EXPECT_NE(message_of([&] { spec.integer("big"); }).find("from -2^63 to 2^63 - 1"),
            std::string::npos);
  for (const char* key : {"s", "n", "w", "plus"}) EXPECT_THROW(spec.number(key), Error) << key;
  EXPECT_THROW(spec.flag("f"), Error);
}

TEST(Spec, InfinityIsANumber) {
  EXPECT_EQ(Spec::parse_options("b=-inf").number("b"), -std::numeric_limits<double>::infinity());
  EXPECT_EQ(Spec::parse_options("b=+3").integer("b"), 3);
}

TEST(Spec, UnknownKeyNamesTheNearest) {
  const std::string message =
      message_of([] { Spec::parse("flash:windw=3").require_known({"causal", "scale", "window"}); });
  EXPECT_NE(message.find("flash: unknown option 'windw' (did you mean 'window'?)"),
            std::string::npos)
      << message;
  EXPECT_NE(message.find("causal, scale, window"), std::string::npos) << message;
  Spec::parse("flash:window=3").require_known({"causal", "window"});
}

TEST(Nearest, FindsTypingMistakes) {
  const std::vector<std::string> names = {"flash_attention", "sigmoid_attention", "bench", "eval"};
  EXPECT_EQ(nearest("flahs_attention", names), "flash_attention");
  EXPECT_EQ(nearest("Sigmod_Attention", names), "sigmoid_attention");
  EXPECT_EQ(nearest("bnech", names), "bench");
  EXPECT_EQ(nearest("eva", names), "eval");
  EXPECT_EQ(nearest("zzzzzz", names), "");
  EXPECT_EQ(nearest("", names), "");
  EXPECT_EQ(nearest("x", {}), "");
}

}  // namespace
}  // namespace heed
