#include "llm/eval.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "heed/error.h"
#include "llm/test_models.h"
#include "llm/tokenizer.h"

namespace heed {
namespace {

std::vector<int32_t> text_tokens(const GgufFile& file) {
  return Tokenizer(file).encode(
      "Once upon a time, there was a little boy named Tim. Tim liked to run and jump. One day, Tim "
      "found a red box in the park. He opened the box and saw a big toy car inside. Tim was "
      "happy.");
}

Model plain_model(const GgufFile& file, int64_t context) {
  ModelOptions options = plain_options();
  options.context = context;
  return Model(file, std::move(options));
}

// -log softmax(logits)[next], in float64.
double negative_log_likelihood(const std::vector<float>& logits, int32_t next) {
  double sum = 0;
  for (float x : logits) sum += std::exp(static_cast<double>(x));
  return std::log(sum) - static_cast<double>(logits[static_cast<size_t>(next)]);
}

TEST(Perplexity, EqualsTheDefinitionForEveryWindow) {
  const GgufFile file = stories_file();
  const std::vector<int32_t> tokens = text_tokens(file);
  const int64_t count = static_cast<int64_t>(tokens.size());
  ASSERT_GT(count, 60);
  for (auto [context, stride] :
       std::vector<std::pair<int64_t, int64_t>>{{count, 10},
                                                {count + 9, 10},
                                                {32, 8},
                                                {32, 31},
                                                {17, 16},
                                                {20, 1},
                                                {2, 1},
                                                {32, 32},
                                                {1 + (count - 1) / 2, 1 + (count - 1) / 2},
                                                {count - 1, count - 1},
                                                {2, 2}}) {
    Model model = plain_model(file, context);
    double sum = 0;
    int64_t scored = 0;
    for (int64_t t = 1; t < count;
         ++t) {  // the first window begin, begin + stride, ... that holds t
      int64_t begin = 0;
      while (begin + context <= t) begin += stride;
      if (begin == t) continue;  // nothing precedes it in its window
      ++scored;
      EXPECT_EQ(model.truncate(0), 0);
      const auto rows = all_logits(
          model,
          std::span(tokens).subspan(static_cast<size_t>(begin), static_cast<size_t>(t - begin)));
      sum += negative_log_likelihood(rows.back(), tokens[static_cast<size_t>(t)]);
    }
    int64_t last = 0;
    const Perplexity found = perplexity(model, tokens, {stride, [&](int64_t n, int64_t total) {
                                                          EXPECT_GT(n, last);
                                                          EXPECT_EQ(total, scored);
                                                          last = n;
                                                          return true;
                                                        }});
    EXPECT_EQ(last, scored);
    EXPECT_EQ(found.scored, scored);
    EXPECT_EQ(scored, stride < context ? count - 1 : count - 1 - (count - 1) / context);
    EXPECT_TRUE(found.complete);
    EXPECT_NEAR(found.mean_nll, sum / static_cast<double>(scored), 1e-4)
        << context << " " << stride;
    EXPECT_NEAR(found.perplexity, std::exp(found.mean_nll), 1e-9);
    EXPECT_GT(found.attention_seconds, 0);
    EXPECT_GT(found.total_seconds, found.attention_seconds);
  }
}

TEST(Perplexity, StopsWhenAsked) {
  const GgufFile file = stories_file();
  Model model = plain_model(file, 20);
  const std::vector<int32_t> tokens = text_tokens(file);
  const Perplexity part =
      perplexity(model, tokens, {10, [](int64_t n, int64_t) { return n < 25; }});
  EXPECT_EQ(part.scored, 29);
  EXPECT_FALSE(part.complete);
  EXPECT_TRUE(std::isfinite(part.perplexity));
}

TEST(Perplexity, StopsWithinAWindow) {
  const GgufFile file = stories_file();
  const auto model_of = [&](int64_t context) {
    return Model(file, {.context = context,
                        .attention = {find_mechanism("flash_attention").model_attention({}, {})}});
  };
  Model model = model_of(800);
  std::vector<int32_t> tokens = text_tokens(file);
  while (tokens.size() < 601) tokens.push_back(tokens[tokens.size() - 60]);
  tokens.resize(601);  // 600 rows: two parts of 300
  std::vector<int64_t> calls;
  const Perplexity part = perplexity(model, tokens, {{}, [&](int64_t n, int64_t) {
                                                       calls.push_back(n);
                                                       return false;
                                                     }});
  EXPECT_EQ(calls, (std::vector<int64_t>{300}));
  EXPECT_EQ(part.scored, 300);
  EXPECT_EQ(part.passed, 300);
  // The first part of a second window may be known already.
  calls.clear();
  Model shorter = model_of(580);
  const Perplexity all = perplexity(shorter, tokens, {30, [&](int64_t n, int64_t) {
                                                        calls.push_back(n);
                                                        return true;
                                                      }});
  EXPECT_EQ(calls, (std::vector<int64_t>{289, 579, 579, 600}));
  EXPECT_EQ(all.passed, 579 + 570);
  EXPECT_TRUE(std::isfinite(all.perplexity));
}

TEST(Perplexity, Refusals) {
  const GgufFile file = stories_file();
  Model model = plain_model(file, 20), narrow = plain_model(file, 1);
  const std::vector<int32_t> tokens = text_tokens(file), one{1};
  EXPECT_THROW(perplexity(model, one), Error);
  EXPECT_THROW(perplexity(narrow, tokens), Error);
  EXPECT_THROW(perplexity(model, tokens, {0, {}}), Error);
  EXPECT_THROW(perplexity(model, tokens, {21, {}}), Error);
  const ModelAttention broken{.over_cache = [](const Tensor&, const Tensor&, const Tensor&,
                                               const Tensor& out, const RunOptions&) {
    std::fill_n(out.as<float>(), out.count(), std::numeric_limits<float>::quiet_NaN());
  }};
  Model nan(file, {.context = 20, .attention = {broken}});
  try {
    perplexity(nan, tokens);
    FAIL() << "a perplexity of NaN";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("tokens 1 to 19 hold NaN"), std::string::npos)
        << error.what();
  }
}

}  // namespace
}  // namespace heed
