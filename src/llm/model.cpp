#include "llm/model.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <string>
#include <utility>

#include "base/round_up.h"
#include "heed/error.h"
#include "kernels/float_rows.h"
#include "kernels/transformer_rows.h"
#include "llm/gguf.h"

namespace heed {

namespace {

// Adds the time until it goes out of scope.
class Stopwatch {
 public:
  explicit Stopwatch(double& seconds) : seconds_(seconds) {}
  ~Stopwatch() {
    seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }
  Stopwatch(const Stopwatch&) = delete;

 private:
  double& seconds_;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

// Up to so many tokens at a time activations have 16 bits: 8 would save a tenth of a second at most, and answers
// to short questions can hang on a digit.
constexpr int64_t kShortPrompt = 63;
// Rows of logits formed at once when every row's are wanted: 12 MB for a vocabulary of 50,000. Of 16 bits.
constexpr int64_t kLogitRows = kShortPrompt;
// Tokens read in all from which unpacked weights gain what unpacking takes: about 90 are as quick without.
constexpr int64_t kWorthUnpacking = 64;

std::vector<ModelAttention> per_layer(std::vector<ModelAttention> attention, int64_t layers) {
  if (attention.size() == 1) attention.resize(static_cast<size_t>(layers), attention[0]);
  if (attention.size() != static_cast<size_t>(layers)) {
    throw Error("attention: " + std::to_string(attention.size()) +
                " are given, 1 or one for each of " + std::to_string(layers) + " layers is needed");
  }
  return attention;
}

int64_t layers_with_cache(const std::vector<ModelAttention>& attention) {
  return std::count_if(attention.begin(), attention.end(),
                       [](const ModelAttention& a) { return a.over_cache != nullptr; });
}

int64_t chunk_for(const std::vector<ModelAttention>& attention, int64_t context) {
  const bool whole = std::any_of(attention.begin(), attention.end(),
                                 [](const ModelAttention& a) { return a.whole_prompt; });
  return whole ? std::max(context, Model::kChunk) : Model::kChunk;
}

DType cache_dtype(ModelDtype dtype) { return dtype == ModelDtype::f32 ? DType::f32 : DType::bf16; }

// Columns [begin, begin + count) of a matrix.
Tensor columns_of(const Tensor& x, int64_t begin, int64_t count) {
  return x.slice(1, begin, begin + count);
}

// A matrix [rows, heads * head_dim] as [1, heads, rows, head_dim].
Tensor as_heads(const Tensor& x, int64_t head_dim) {
  return Tensor(x.data(), x.dtype(), {1, x.size(1) / head_dim, x.size(0), head_dim},
                {x.size(0) * x.stride(0), head_dim, x.stride(0), 1});
}

}  // namespace

Model::Model(const GgufFile& file, ModelOptions options)
    : config_(read_model_config(file)),
      dtype_(options.dtype.value_or(default_model_dtype(file))),
      weights_(load_weights(file, config_, dtype_, options.run)),
      attention_(per_layer(std::move(options.attention), config_.layers)),
      cache_(layers_with_cache(attention_), config_.kv_heads, config_.head_dim, cache_dtype(dtype_),
             options.context.value_or(config_.context)),
      states_(attention_),
      chunk_(chunk_for(attention_, context())),
      run_(options.run) {
  int64_t cached = 0;
  for (const ModelAttention& attention : attention_) {
    cache_layer_.push_back(attention.over_cache ? cached++ : -1);
  }
}

void Model::check_tokens(std::span<const int32_t> tokens) const {
  for (int32_t token : tokens) {
    if (token < 0 || token >= config_.vocab) {
      throw Error("tokens: id " + std::to_string(token) + " is given, 0 to " +
                  std::to_string(config_.vocab - 1) + " is needed");
    }
  }
  if (length() + static_cast<int64_t>(tokens.size()) > context()) {
    throw Error("tokens: " + std::to_string(tokens.size()) + " more are given after " +
                std::to_string(length()) + ", the context holds " + std::to_string(context()));
  }
}

void Model::make_room(int64_t rows) {
  if (rows <= capacity_rows_) return;
  capacity_rows_ = rows;
  // float32 is the widest type that passes through any of them.
  const auto make = [&](int64_t columns) { return Array(DType::f32, {rows, columns}); };
  const int64_t head_columns = config_.heads * config_.head_dim;
  stream_ = make(config_.width);
  // Or rows of int8 in blocks, which are more bytes where a matrix has few columns.
  const int64_t columns = std::max({config_.width, head_columns, config_.hidden});
  const int64_t bytes = std::max(rows * columns * static_cast<int64_t>(sizeof(float)),
                                 int8_rows_bytes(rows, columns, 2));
  input_ = Array(DType::f32, {ceil_div(bytes, static_cast<int64_t>(sizeof(float)))});
  sum_ = make(config_.width);
  qkv_ = make(config_.qkv_rows());
  heads_ = make(head_columns);
  attended_ = make(head_columns);
  gate_up_ = make(2 * config_.hidden);
  const int64_t stride = rotation_stride(static_cast<int64_t>(config_.rotary_frequencies.size()));
  cos_ = Array::zeros(DType::f32, {rows, stride});
  sin_ = Array::zeros(DType::f32, {rows, stride});
}

void Model::make_rotation_table(int64_t first, int64_t rows) {
  for (int64_t m = 0; m < rows; ++m) {
    float* cos = reinterpret_cast<float*>(cos_.view().at({m}));
    float* sin = reinterpret_cast<float*>(sin_.view().at({m}));
    const double position = static_cast<double>(first + m);
    for (size_t i = 0; i < config_.rotary_frequencies.size(); ++i) {
      const double angle = position * config_.rotary_frequencies[i];
      cos[i] = static_cast<float>(config_.rotary_magnitude * std::cos(angle));
      sin[i] = static_cast<float>(config_.rotary_magnitude * std::sin(angle));
    }
  }
}

Tensor Model::buffer(Array& memory, DType type, int64_t rows, int64_t columns) const {
  return Tensor(memory.as<void>(), type, {rows, columns});
}

// Biases, head norms and positions of queries and keys, in place.
void Model::prepare_heads(const LayerWeights& w, const Tensor& qkv) {
  if (w.qkv_bias.view().defined()) add_bias(w.qkv_bias, qkv, run_);
  const int64_t d = config_.head_dim;
  const Tensor queries_keys = columns_of(qkv, 0, (config_.heads + config_.kv_heads) * d);
  if (config_.qk_norm) {
    rms_norm_heads(queries_keys, {{config_.heads, w.q_norm}, {config_.kv_heads, w.k_norm}},
                   config_.norm_eps, run_);
  }
  rotate(queries_keys,
         {.head_dim = d,
          .pairs = static_cast<int64_t>(config_.rotary_frequencies.size()),
          .interleaved = config_.rotary_interleaved,
          .cos = cos_.as<float>(),
          .sin = sin_.as<float>(),
          .table_stride = cos_.view().stride(0)},
         run_);
}

// Keys and values of the next tokens, behind those that the cache holds.
void Model::store(int64_t layer, const Tensor& qkv) {
  const int64_t d = config_.head_dim, rows = qkv.size(0), past = length();
  const int64_t place = cache_layer_[static_cast<size_t>(layer)];
  const Tensor k = cache_.keys(place, past + rows), v = cache_.values(place, past + rows);
  for (int64_t h = 0; h < config_.kv_heads; ++h) {
    const auto store_head = [&](int64_t head, const Tensor& cache) {
      convert_rows(columns_of(qkv, head * d, d),
                   cache.select(0, 0).select(0, h).slice(0, past, past + rows), run_);
    };
    store_head(config_.heads + h, k);
    store_head(config_.heads + config_.kv_heads + h, v);
  }
}

// Attention of the last `wanted` rows of qkv; the cache and the states know all rows afterwards. Valid
// until the next call.
Tensor Model::attend(int64_t layer, const Tensor& qkv, int64_t wanted) {
  const ModelAttention& attention = attention_[static_cast<size_t>(layer)];
  const int64_t d = config_.head_dim, queries = config_.heads * d, keys = config_.kv_heads * d;
  const int64_t rows = qkv.size(0);
  if (attention.over_state) {
    Stopwatch watch(attention_seconds_);
    const auto part = [&](int64_t begin, int64_t columns) {
      return as_heads(columns_of(qkv, begin, columns), d);
    };
    const Tensor out = buffer(attended_, qkv.dtype(), rows, queries);
    attention.over_state(part(0, queries), part(queries, keys), part(queries + keys, keys),
                         as_heads(out, d), states_.of(layer), run_);
    return out.slice(0, rows - wanted, rows);
  }
  store(layer, qkv);
  const int64_t run_rows = attention.whole_prompt ? rows : wanted;
  const Tensor out = buffer(attended_, cache_.dtype(), run_rows, queries);
  if (run_rows == 0) return out;
  Tensor q = columns_of(qkv, 0, queries).slice(0, rows - run_rows, rows);
  if (q.dtype() != cache_.dtype()) {
    const Tensor converted = buffer(heads_, cache_.dtype(), run_rows, queries);
    convert_rows(q, converted, run_);
    q = converted;
  }
  Stopwatch watch(attention_seconds_);
  const int64_t place = cache_layer_[static_cast<size_t>(layer)], length = this->length() + rows;
  attention.over_cache(as_heads(q, d), cache_.keys(place, length), cache_.values(place, length),
                       as_heads(out, d), run_);
  return out.slice(0, run_rows - wanted, run_rows);
}

DType Model::activation_type(int64_t rows) const {
  return weights_.are_many(rows) ? weights_.many_type : DType::f32;
}

// y = W x, or y += W x where y is the stream, for the x that make(x) makes: a matrix of the type that
// so many rows have, or one rounded to int8.
template <class Make>
void Model::multiply(const WeightMatrix& w, const Make& make, const Tensor& y, bool add) {
  const int64_t rows = y.size(0);
  const bool many = weights_.are_many(rows);
  if (many && w.many == ManyRows::int8) {
    const Int8Rows x{input_.as<std::byte>(), rows, w.columns, rows <= kShortPrompt ? 2 : 1};
    make(x);
    int8_product(x, w.parts, y, add, run_);
    return;
  }
  const bool bf16 = many && w.many == ManyRows::bf16;
  const DType type = bf16 ? DType::bf16 : DType::f32;
  const Tensor x = buffer(input_, type, rows, w.columns);
  make(x);
  if (many && !bf16) return float_product(x, w.parts, y, add, run_);
  const Tensor product = add ? buffer(sum_, type, rows, w.rows) : y;
  if (bf16) {
    w.multiply_bf16(x, product, run_);
  } else {
    w.multiply(x, product, run_);
  }
  if (add) add_rows(product, y, run_);
}

void Model::attention_block(int64_t layer, const Tensor& stream, int64_t wanted) {
  const LayerWeights& w = weights_.layers[static_cast<size_t>(layer)];
  const int64_t rows = stream.size(0);
  const Tensor qkv = buffer(qkv_, activation_type(rows), rows, config_.qkv_rows());
  const auto norm = [&](const auto& x) {
    rms_norm(stream, w.attention_norm, config_.norm_eps, x, run_);
  };
  multiply(w.qkv, norm, qkv, false);
  prepare_heads(w, qkv);
  const Tensor attended = attend(layer, qkv, wanted);
  if (wanted == 0) return;
  const Tensor to = stream.slice(0, rows - wanted, rows);
  multiply(w.out, [&](const auto& x) { convert_rows(attended, x, run_); }, to, true);
  if (w.out_bias.view().defined()) add_bias(w.out_bias, to, run_);
}

void Model::feed_forward_block(const LayerWeights& w, const Tensor& stream) {
  const int64_t rows = stream.size(0);
  const Tensor gate_up = buffer(gate_up_, activation_type(rows), rows, 2 * config_.hidden);
  const auto norm = [&](const auto& x) {
    rms_norm(stream, w.hidden_norm, config_.norm_eps, x, run_);
  };
  multiply(w.gate_up, norm, gate_up, false);
  multiply(w.down, [&](const auto& x) { swiglu(gate_up, x, run_); }, stream, true);
}

// The stream of the last `wanted` rows; of the others the layers keep what later tokens need.
void Model::run_layers(std::span<const int32_t> tokens, int64_t wanted) {
  const int64_t rows = static_cast<int64_t>(tokens.size());
  make_room(rows);
  make_rotation_table(length(), rows);
  const Tensor stream = buffer(stream_, DType::f32, rows, config_.width);
  for (int64_t m = 0; m < rows; ++m) {
    weights_.embed(tokens[static_cast<size_t>(m)], reinterpret_cast<float*>(stream.at({m})), run_);
  }
  for (int64_t layer = 0; layer < config_.layers; ++layer) {
    const int64_t outputs = layer == config_.layers - 1 ? wanted : rows;
    attention_block(layer, stream, outputs);
    if (outputs == 0) return;
    feed_forward_block(weights_.layers[static_cast<size_t>(layer)],
                       stream.slice(0, rows - outputs, rows));
  }
}

void Model::append_chunk(std::span<const int32_t> tokens, int64_t wanted) {
  last_row_ = -1;
  try {
    run_layers(tokens, wanted);
  } catch (...) {
    // States of the first layers know these tokens already, the others do not.
    cache_.truncate(states_.go_back(length() + 1, length()));
    throw;
  }
  cache_.advance(static_cast<int64_t>(tokens.size()));
  if (wanted > 0) last_row_ = static_cast<int64_t>(tokens.size()) - 1;
}

// Logits of rows [first, first + rows) of the stream, in logits_.
void Model::make_logits(int64_t first, int64_t rows) {
  if (logits_.count() < rows * config_.vocab) logits_ = Array(DType::f32, {rows, config_.vocab});
  const Tensor stream = buffer(stream_, DType::f32, capacity_rows_, config_.width);
  const auto norm = [&](const auto& x) {
    rms_norm(stream.slice(0, first, first + rows), weights_.output_norm, config_.norm_eps, x, run_);
  };
  multiply(weights_.head, norm, buffer(logits_, DType::f32, rows, config_.vocab), false);
}

void Model::prepare(int64_t tokens) {
  if (tokens <= weights_.few_rows) return;
  if (read_tokens_ + tokens >= kWorthUnpacking) weights_.unpack(run_);
  const int64_t length = std::min(context(), this->length() + tokens);
  cache_.reserve(length);
  cache_.populate(length, run_);
}

void Model::append(std::span<const int32_t> tokens) {
  append(tokens, static_cast<int64_t>(tokens.size()), [](int64_t, std::span<const float>) {});
}

void Model::append(std::span<const int32_t> tokens, int64_t first,
                   const std::function<void(int64_t i, std::span<const float> logits)>& row) {
  check_tokens(tokens);
  ++changes_;
  const int64_t count = static_cast<int64_t>(tokens.size());
  cache_.reserve(length() + count);
  if (count > weights_.few_rows) {
    prepare(count);
    read_tokens_ += count;
  }
  // Chunks of nearly equal size: no last chunk of a few rows.
  const int64_t chunks = count / chunk() + (count % chunk() == 0 ? 0 : 1);
  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t begin = count * c / chunks, end = count * (c + 1) / chunks;
    // logits() may ask for the last token's.
    const int64_t wanted = end - std::clamp(first, begin, c == chunks - 1 ? end - 1 : end);
    {
      Stopwatch watch(total_seconds_);
      append_chunk(tokens.subspan(static_cast<size_t>(begin), static_cast<size_t>(end - begin)),
                   wanted);
    }
    for (int64_t i = std::max(first, begin); i < end; i += kLogitRows) {
      const int64_t rows = std::min(kLogitRows, end - i);
      {
        Stopwatch watch(total_seconds_);
        make_logits(i - begin, rows);
      }
      for (int64_t m = 0; m < rows; ++m) {
        row(i + m, {logits_.as<float>() + m * config_.vocab, static_cast<size_t>(config_.vocab)});
      }
    }
  }
}

std::span<const float> Model::logits() {
  if (last_row_ < 0) throw Error("logits: no token was appended, at least one is needed");
  Stopwatch watch(total_seconds_);
  make_logits(last_row_, 1);
  return {logits_.as<float>(), static_cast<size_t>(config_.vocab)};
}

int64_t Model::truncate(int64_t length) {
  ++changes_;
  const int64_t before = this->length();
  cache_.truncate(length);
  cache_.truncate(states_.go_back(before, length));
  if (this->length() < before) last_row_ = -1;
  return this->length();
}

}  // namespace heed
