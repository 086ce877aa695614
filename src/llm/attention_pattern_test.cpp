#include "llm/attention_pattern.h"

#include <gtest/gtest.h>

#include <string>

#include "heed/error.h"

namespace heed {
namespace {

ModelConfig config_of(int64_t layers) {
  ModelConfig config;
  config.layers = layers;
  config.heads = 4;
  config.kv_heads = 2;
  config.head_dim = 6;
  return config;
}

// One letter a layer: c with a cache, w with a cache and whole prompts, s with a state.
std::string kinds(std::string_view pattern, int64_t layers) {
  std::string letters;
  for (const ModelAttention& layer : parse_attention(pattern, config_of(layers))) {
    EXPECT_NE(layer.over_cache == nullptr, layer.over_state == nullptr);
    EXPECT_EQ(layer.state_shapes.empty(), layer.over_state == nullptr);
    letters += layer.over_state ? 's' : layer.whole_prompt ? 'w' : 'c';
  }
  return letters;
}

TEST(AttentionPattern, SaysWhatEachLayerGets) {
  EXPECT_EQ(kinds("flash", 5), "ccccc");
  EXPECT_EQ(kinds("flash:window=8,softcap=3", 2), "cc");
  EXPECT_EQ(kinds("flash/lightning", 6), "cscscs");
  EXPECT_EQ(kinds("3xflash/3xlightning:decay=0", 6), "cccsss");
  EXPECT_EQ(kinds("2xflash/linear:map=relu", 6), "ccsccs");
  EXPECT_EQ(kinds(" 2x flash:window=8 / 2x stochastic:window=4 /2xtaylor_state ", 6), "ccwwss");
  EXPECT_EQ(kinds("5xflash", 5), "ccccc");
  EXPECT_EQ(kinds("flash/flash/flash/flash/lightning", 5), "ccccs");
}

TEST(AttentionPattern, MistakesNameWhatWasFoundAndNeeded) {
  const auto expect = [](const std::string& pattern, std::initializer_list<const char*> parts) {
    std::string message;
    try {
      (void)parse_attention(pattern, config_of(6));
    } catch (const Error& error) {
      message = error.what();
    }
    for (const char* part : parts) {
      EXPECT_NE(message.find(part), std::string::npos)
          << pattern << ": " << message << " lacks " << part;
    }
  };
  expect("", {"NAME"});
  expect("flash/", {"NAME"});
  expect("/flash", {"NAME"});
  expect("2x", {"NAME"});
  expect("falsh/lightning", {"falsh", "did you mean 'flash'"});
  expect("falsh", {"a model takes: ", "flash, ", "taylor_state"});
  expect("flash/lightnin", {"lightnin", "did you mean 'lightning'"});
  expect("flash;lightning", {"flash;lightning"});
  expect("merge/flash", {"merge_attention", "cannot stand in", "these can: ", "flash, "});
  expect("3xflash/lightning", {"found a pattern of 4 layers", "divides the model's 6"});
  expect("12xflash", {"more than 6", "divides the model's 6"});
  expect("9223372036854775807xflash/9223372036854775807xflash", {"more than 6"});
  expect("99999999999999999999xflash", {"count of 99999999999999999999", "at least 1"});
  expect("0xflash", {"count of 0", "at least 1"});
  expect("flash:causal=0", {"'causal'", "'0'", "1 is needed"});
  for (const char* key : {"dropout", "seed", "right", "left", "block_rows", "block_keys"}) {
    expect("flash:" + std::string(key) + "=1", {key, "window, softcap, scale"});
  }
  expect("sigmoid:right=1", {"'right'", "bias, window, scale"});
  expect("flash/lightning:slopes=1", {"'slopes'", "decay, form"});
  expect("linear:map=performer", {"'performer'", "projection", "'elu1'"});
  expect("linear:map=elu", {"elu", "elu1"});
  expect("taylor_state:order=4", {"order", "4", "0 to 3"});
  expect("magnitude_aware_linear:width=4", {"'width'", "form, scale, eps"});
  expect("flash/flash:window=-5", {"window", "-5"});
  expect("3xflash:softcap=-1/3xlightning", {"softcap", "-1"});
  expect("stochastic:window=0", {"window is 0"});
  expect("local_linear:ridge=0", {"ridge"});
  expect("recurrent_softmax:order=101", {"order is 101"});
  expect("magnitude_aware_linear:form=paper,scale=2", {"scale", "paper"});
}

}  // namespace
}  // namespace heed
