#include "llm/layer_states.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "heed/error.h"
#include "heed/lightning_attention.h"
#include "llm/attention_pattern.h"
#include "llm/generate.h"
#include "llm/test_models.h"

namespace heed {
namespace {

// Ids that no text has, but every one of them different from its neighbours.
std::vector<int32_t> some_tokens(size_t count, int32_t factor = 37) {
  std::vector<int32_t> tokens;
  for (size_t i = 0; i < count; ++i) {
    tokens.push_back(3 + static_cast<int32_t>(i) * factor % 500);
  }
  return tokens;
}

ModelOptions with_attention(const GgufFile& file, std::string_view pattern) {
  ModelOptions options = plain_options();
  options.attention = parse_attention(pattern, read_model_config(file));
  return options;
}

using Rows = std::vector<std::vector<float>>;

// Largest difference over the largest logit; NaN if any is.
double relative_difference(const Rows& found, const Rows& expected) {
  EXPECT_EQ(found.size(), expected.size());
  double most = 0, size = 0;
  for (size_t i = 0; i < found.size(); ++i) {
    for (size_t j = 0; j < found[i].size(); ++j) {
      const double a = static_cast<double>(found[i][j]), b = static_cast<double>(expected[i][j]);
      size = std::max(size, std::abs(b));
      if (std::isnan(a - b)) return a - b;
      most = std::max(most, std::abs(a - b));
    }
  }
  return most / size;
}

Rows logits_in_steps(Model& model, std::span<const int32_t> tokens, size_t step) {
  Rows rows;
  for (size_t begin = 0; begin < tokens.size(); begin += step) {
    const auto part = tokens.subspan(begin, std::min(step, tokens.size() - begin));
    for (auto& row : all_logits(model, part)) rows.push_back(std::move(row));
  }
  return rows;
}

const char* const kStates[] = {"lightning",
                               "lightning:decay=0",
                               "lightning:form=paper",
                               "lightning:form=fla",
                               "linear",
                               "linear:map=relu,eps=0.1",
                               "linear:map=hedgehog_softmax",
                               "linear:map=exp,normalize=0",
                               "taylor_state",
                               "taylor_state:order=3,scale=0.02",
                               "magnitude_aware_linear",
                               "magnitude_aware_linear:form=paper"};

TEST(LayerStates, TokenByTokenIsOneCall) {
  const GgufFile file = stories_file();
  const std::vector<int32_t> tokens = some_tokens(90);
  for (const char* name : kStates) {
    Model whole(file, with_attention(file, name));
    const Rows expected = all_logits(whole, tokens);
    for (size_t step : {1, 7, 64}) {
      Model cut(file, with_attention(file, name));
      EXPECT_LT(relative_difference(logits_in_steps(cut, tokens, step), expected), 2e-3)
          << name << " " << step;
      EXPECT_EQ(cut.cache_bytes(), 0u);
    }
  }
}

TEST(LayerStates, EveryMechanismForModelsMayBeCutAnywhere) {
  const GgufFile file = stories_file();
  const std::vector<int32_t> tokens = some_tokens(50);
  int tried = 0;
  for (const Mechanism& mechanism : mechanisms()) {
    if (!mechanism.model_attention) continue;
    const ModelOptions options = with_attention(file, mechanism.name);
    if (options.attention[0].whole_prompt) continue;
    Model whole(file, options), cut(file, options);
    const Rows expected = all_logits(whole, tokens);
    EXPECT_LT(relative_difference(logits_in_steps(cut, tokens, 3), expected), 2e-3)
        << mechanism.name;
    ++tried;
  }
  EXPECT_GE(tried, 9);
}

TEST(LayerStates, TaylorStateIsThePolynomialOverACache) {
  const GgufFile file = stories_file();
  const std::vector<int32_t> tokens = some_tokens(80);
  Model cached(file, with_attention(file, "recurrent_softmax:order=2"));
  const Rows expected = logits_in_steps(cached, tokens, 30);
  EXPECT_GT(cached.cache_bytes(), 0u);
  EXPECT_EQ(cached.state_bytes(), 0u);
  for (const char* name : {"taylor_state:order=2", "linear:map=taylor2"}) {
    Model model(file, with_attention(file, name));
    EXPECT_LT(relative_difference(logits_in_steps(model, tokens, 30), expected), 1e-3) << name;
  }
}

// Over a cache, in float64: exp(-slope distance) (q . k) v.
ModelAttention decaying(const Tensor& slopes) {
  std::vector<double> of_head;
  for (int64_t h = 0; h < slopes.size(0); ++h) {
    of_head.push_back(static_cast<double>(slopes.as<float>()[h]));
  }
  const auto call = [of_head](const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                              const RunOptions&) {
    const int64_t rows = q.size(2), past = k.size(2) - rows, d = q.size(3);
    const int64_t group = q.size(1) / k.size(1);
    for (int64_t h = 0; h < q.size(1); ++h) {
      for (int64_t i = 0; i < rows; ++i) {
        std::vector<double> sums(static_cast<size_t>(d));
        for (int64_t j = 0; j <= past + i; ++j) {
          double weight = 0;
          for (int64_t c = 0; c < d; ++c) {
            weight += element(q, h, i, c) * element(k, h / group, j, c);
          }
          weight *= std::exp(-of_head[static_cast<size_t>(h)] * static_cast<double>(past + i - j));
          for (int64_t c = 0; c < d; ++c) {
            sums[static_cast<size_t>(c)] += weight * element(v, h / group, j, c);
          }
        }
        for (int64_t c = 0; c < d; ++c) {
          *reinterpret_cast<float*>(out.at({0, h, i, c})) =
              static_cast<float>(sums[static_cast<size_t>(c)]);
        }
      }
    }
  };
  return {.over_cache = call};
}

TEST(LayerStates, LightningHasTheSlopesOfEachLayer) {
  const GgufFile file = stories_file();
  const std::vector<int32_t> tokens = some_tokens(70);
  const ModelConfig config = read_model_config(file);
  for (const auto& [name, form, first] :
       {std::tuple("lightning", LightningSlopes::code, int64_t{0}),
        std::tuple("lightning:form=paper", LightningSlopes::paper, int64_t{1}),
        std::tuple("lightning:form=fla", LightningSlopes::fla, int64_t{0})}) {
    ModelOptions options = plain_options();
    options.attention.clear();
    for (int64_t layer = 0; layer < config.layers; ++layer) {
      options.attention.push_back(
          decaying(lightning_slopes(config.heads, layer + first, config.layers, form)));
    }
    Model reference(file, options), model(file, with_attention(file, name));
    EXPECT_LT(
        relative_difference(logits_in_steps(model, tokens, 33), all_logits(reference, tokens)),
        2e-3)
        << name;
  }
}

TEST(LayerStates, MemoryDoesNotGrowAndTheContextIsFree) {
  const GgufFile file = stories_file();
  const ModelConfig config = read_model_config(file);
  ModelOptions options = with_attention(file, "lightning");
  options.context = int64_t{1} << 40;
  Model model(file, options);
  model.reserve(options.context.value());
  const size_t expected =
      static_cast<size_t>(config.layers * config.heads * config.head_dim * config.head_dim) *
      sizeof(float);
  for (int i = 0; i < 3; ++i) {
    model.append(some_tokens(700));
    EXPECT_EQ(model.cache_bytes(), 0u);
    EXPECT_EQ(model.state_bytes(), expected);
  }
  EXPECT_EQ(model.length(), 2100);  // four times what it was trained for
  for (float logit : model.logits()) ASSERT_TRUE(std::isfinite(logit));
}

TEST(LayerStates, TruncateGoesToTheMarkOrToNothing) {
  const GgufFile file = stories_file();
  const std::vector<int32_t> tokens = some_tokens(60), others = some_tokens(20, 91);
  for (const char* pattern : {"lightning", "magnitude_aware_linear", "4xflash/lightning"}) {
    const ModelOptions options = with_attention(file, pattern);
    Model model(file, options);
    model.append(std::span(tokens).first(40));
    model.mark();
    model.append(std::span(tokens).subspan(40));
    EXPECT_EQ(model.truncate(60), 60);
    EXPECT_NO_THROW(model.logits()) << "nothing was forgotten";
    EXPECT_THROW((void)model.truncate(61), Error);
    for (int i = 0; i < 2; ++i) {  // the mark may be used again
      ASSERT_EQ(model.truncate(50), 40);
      EXPECT_EQ(model.length(), 40);
      EXPECT_THROW(model.logits(), Error);
      model.append(others);
    }
    Model fresh(file, options);
    fresh.append(std::span(tokens).first(40));
    fresh.append(others);
    const Rows found{{model.logits().begin(), model.logits().end()}};
    EXPECT_EQ(relative_difference(found, {{fresh.logits().begin(), fresh.logits().end()}}), 0)
        << pattern;

    EXPECT_EQ(model.truncate(39), 0) << "in front of the mark";
    const Rows again = all_logits(model, std::span(tokens).first(45));
    Model anew(file, options);
    EXPECT_EQ(relative_difference(again, all_logits(anew, std::span(tokens).first(45))), 0)
        << pattern;
    EXPECT_EQ(model.truncate(44), 0) << "the mark was of tokens that are forgotten";
  }
}

TEST(LayerStates, AnErrorInALayerLeavesNoHalfOfAToken) {
  const GgufFile file = stories_file();
  const std::vector<int32_t> tokens = some_tokens(30);
  ModelOptions options = with_attention(file, "4xlightning/flash");
  Model fresh(file, options);
  const Rows expected = all_logits(fresh, tokens);
  bool fails = true;
  const auto call = options.attention[4].over_cache;
  options.attention[4].over_cache = [&](const Tensor& q, const Tensor& k, const Tensor& v,
                                        const Tensor& out, const RunOptions& run) {
    if (fails) throw Error("not now");
    call(q, k, v, out, run);
  };
  Model model(file, options);
  EXPECT_THROW(model.append(tokens), Error);
  EXPECT_EQ(model.length(), 0);
  fails = false;
  EXPECT_EQ(relative_difference(all_logits(model, tokens), expected), 0);
  model.mark();
  fails = true;
  EXPECT_THROW(model.append(tokens), Error);
  EXPECT_EQ(model.length(), 30) << "the mark is here";
}

TEST(LayerStates, PromptsThatPartInTheAnswerAreReadFromTheirEnd) {
  const GgufFile file = stories_file();
  const ModelOptions options = with_attention(file, "4xflash/taylor_state");
  Model model(file, options), fresh_model(file, options);
  Generator generator(model);
  GenerateOptions generate;
  generate.max_tokens = 10;
  const std::vector<int32_t> prompt = some_tokens(25);
  const std::vector<int32_t> answer = generator.generate(prompt, generate).tokens;
  std::vector<int32_t> next = prompt;
  next.insert(next.end(), answer.begin(), answer.begin() + 4);
  next.push_back(answer[4] == 7 ? 8 : 7);
  for (int32_t id : some_tokens(12, 53)) next.push_back(id);
  const GenerateResult second = generator.generate(next, generate);
  EXPECT_EQ(second.reused_tokens, 25);
  EXPECT_EQ(second.tokens, Generator(fresh_model).generate(next, generate).tokens);
  // One that goes on from the answer itself is not read again.
  std::vector<int32_t> third = next;
  third.insert(third.end(), second.tokens.begin(), second.tokens.end());
  EXPECT_EQ(generator.generate(third, generate).reused_tokens,
            static_cast<int64_t>(third.size()) - 1);
  EXPECT_EQ(generator.generate(prompt, generate).reused_tokens, 0);
}

TEST(Model, TheLastLayerKeepsWhatLaterTokensNeed) {
  // Rows without logits leave the last layer early; what follows them must not notice.
  const GgufFile file = stories_file();
  const std::vector<int32_t> tokens = some_tokens(3 * Model::kChunk + 5);
  const auto prompt = std::span(tokens).first(tokens.size() - 9), rest = std::span(tokens).last(9);
  for (const char* pattern : {"flash", "flash:window=100", "stochastic:window=64", "lightning",
                              "magnitude_aware_linear", "4xlightning/flash", "4xflash/lightning"}) {
    ModelOptions options = with_attention(file, pattern);
    options.context = static_cast<int64_t>(tokens.size());
    Model all(file, options), few(file, options);
    const Rows expected = all_logits(all, prompt);
    Rows found;
    const int64_t first = static_cast<int64_t>(prompt.size()) - 30;
    few.append(prompt, first, [&](int64_t i, std::span<const float> logits) {
      EXPECT_EQ(i, first + static_cast<int64_t>(found.size()));
      found.emplace_back(logits.begin(), logits.end());
    });
    EXPECT_LT(relative_difference(found, {expected.end() - 30, expected.end()}), 1e-5) << pattern;
    Model none(file, options);
    none.append(prompt);
    EXPECT_LT(
        relative_difference({{none.logits().begin(), none.logits().end()}}, {expected.back()}),
        1e-5)
        << pattern;
    const Rows next = all_logits(all, rest);
    EXPECT_LT(relative_difference(all_logits(few, rest), next), 1e-5) << pattern;
    EXPECT_LT(relative_difference(all_logits(none, rest), next), 1e-5) << pattern;
  }
}

TEST(Model, WholePromptsPassInOneChunk) {
  const GgufFile file = stories_file();
  ModelOptions options = plain_options();
  options.context = 2000;
  std::vector<int64_t> rows;
  options.attention[0].whole_prompt = true;
  options.attention[0].over_cache = [&](const Tensor& q, const Tensor& k, const Tensor& v,
                                        const Tensor& out, const RunOptions& run) {
    rows.push_back(q.size(2));
    plain_attention(q, k, v, out, run);
  };
  Model model(file, options);
  GenerateOptions generate;
  generate.max_tokens = 2;
  const std::vector<int32_t> prompt = some_tokens(Model::kChunk + 90);
  (void)Generator(model).generate(prompt, generate);
  const size_t layers = static_cast<size_t>(model.config().layers);
  std::vector<int64_t> expected(layers, Model::kChunk + 90);
  expected.resize(2 * layers, 1);
  EXPECT_EQ(rows, expected);
}

}  // namespace
}  // namespace heed
