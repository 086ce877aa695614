#include "hardware/flat.h"

#include <algorithm>
#include <cmath>

#include "heed/error.h"

namespace heed::hardware {
namespace {

double as_double(int64_t x) { return static_cast<double>(x); }
double tiles(int64_t extent, int64_t tile) {
  return std::ceil(as_double(extent) / as_double(tile));
}

/// Words of one layer's tensors.
struct Words {
  double q, k, v, out, scores;
};

Words words_of(const Workload& w) {
  const double slices = as_double(w.batch) * as_double(w.heads);
  return {slices * as_double(w.queries) * as_double(w.head_dim),
          slices * as_double(w.keys) * as_double(w.head_dim),
          slices * as_double(w.keys) * as_double(w.value_dim),
          slices * as_double(w.queries) * as_double(w.value_dim),
          slices * as_double(w.queries) * as_double(w.keys)};
}

FlatChoice parse_choice(const Json& json, const std::string& where) {
  constexpr int64_t kMost = int64_t{1} << 40;
  Fields fields(json, where);
  FlatChoice choice;
  choice.published = true;
  choice.query_rows = fields.whole("query_rows", 1, kMost, "queries in the buffer together");
  choice.weight_stationary = fields.text("stationary", "output or weight") == "weight";
  choice.spilled_share = fields.number("spilled_share", 0, 1, "share that does not fit");
  for (const char* key : {"head_dim", "length", "heads"}) fields.allow(key);
  fields.allow("score_rereads");
  if (fields.has("score_rereads")) {
    choice.score_rereads = fields.number("score_rereads", 0, 1e3, "further reads of each score");
  }
  choice.scores = false;
  for (const std::string& name : fields.texts("on_chip")) {
    choice.scores |= name == "scores";
    choice.q |= name == "Q";
    choice.k |= name == "K";
    choice.v |= name == "V";
    choice.out |= name == "AV";
  }
  fields.finish();
  return choice;
}

bool is_for(const Json& choice, const Workload& w) {
  const bool shape = choice.at("head_dim") == w.head_dim && choice.at("length") == w.queries;
  return shape && (!choice.contains("heads") || choice.at("heads") == w.heads);
}

bool is_published_machine(const Machine& m) {
  const Machine& published = builtin_machine("baseline");
  return m.matrix.rows == published.matrix.rows && m.matrix.columns == published.matrix.columns &&
         m.buffer_bytes == published.buffer_bytes && m.word_bytes == published.word_bytes;
}

/// How often the array takes in each operand, in words, and how often partial results come back.
struct ArrayTraffic {
  double q, k, v, out_writes, out_reads;
};

ArrayTraffic array_traffic(const Machine& machine, const Workload& w, const FlatChoice& choice) {
  const Words words = words_of(w);
  const double key_tiles = tiles(w.keys, machine.matrix.columns);
  const double query_tiles = tiles(w.queries, machine.matrix.rows);
  if (!choice.weight_stationary) {
    return {words.q * key_tiles, words.k * query_tiles, words.v * query_tiles, words.out, 0};
  }
  // A tile of keys stays while all queries of a row block pass; sums over keys go through the buffer.
  const double blocks = tiles(w.queries, choice.query_rows);
  return {words.q * key_tiles, words.k * blocks, words.v * blocks, words.out * key_tiles,
          words.out * key_tiles};
}

}  // namespace

Movement flat_movement(const Machine& machine, const Workload& w, const FlatChoice& choice) {
  const Words words = words_of(w);
  const ArrayTraffic array = array_traffic(machine, w, choice);
  const double kept = 1 - choice.spilled_share, spilled = choice.spilled_share;
  Movement m;
  // An operand in the buffer comes from DRAM once; its spilled part each time the array takes it.
  const auto operand = [&](bool on_chip, double size, double taken) {
    const double dram = on_chip ? size * kept + taken * spilled : taken;
    m.dram_words += dram;
    if (on_chip) {
      m.buffer_writes += dram;
      m.buffer_reads += taken;
    }
  };
  operand(choice.q, words.q, array.q);
  operand(choice.k, words.k, array.k);
  operand(choice.v, words.v, array.v);
  if (choice.out) {
    m.dram_words += words.out;
    m.buffer_writes += array.out_writes;
    m.buffer_reads += array.out_reads;
  } else {
    m.dram_words += array.out_writes + array.out_reads;
  }
  if (choice.scores) {
    // QK written, read for the maximum and the exponential; SN written, read for the division
    // (its sum takes it on the way); A written, read for the second product.
    constexpr double kReads = 4, kWrites = 3;
    m.buffer_reads += kReads * words.scores;
    m.buffer_writes += kWrites * words.scores;
    m.dram_words += (kReads + kWrites) * spilled * words.scores;
  } else {
    // QK and A go through DRAM, written and read; QK and SN lie in the buffer for a softmax row.
    m.dram_words += 4 * words.scores;
    m.buffer_reads += 3 * words.scores;
    m.buffer_writes += 2 * words.scores;
  }
  m.buffer_reads += choice.score_rereads * words.scores;
  return m;
}

FlatChoice search_flat(const Machine& machine, const Workload& w) {
  const double capacity = machine.buffer_bytes / as_double(machine.word_bytes);
  FlatChoice best;
  double least = INFINITY;
  for (int64_t rows = machine.matrix.rows;; rows *= 2) {
    rows = std::min(rows, w.queries);
    for (int mask = 0; mask < 64; ++mask) {
      FlatChoice c;
      c.query_rows = rows;
      c.scores = (mask & 1) != 0;
      c.q = (mask & 2) != 0;
      c.k = (mask & 4) != 0;
      c.v = (mask & 8) != 0;
      c.out = (mask & 16) != 0;
      c.weight_stationary = (mask & 32) != 0;
      const double need = (c.scores ? as_double(rows) * as_double(w.keys) : 0) +
                          (c.q ? as_double(rows) * as_double(w.head_dim) : 0) +
                          (c.k ? as_double(w.keys) * as_double(w.head_dim) : 0) +
                          (c.v ? as_double(w.keys) * as_double(w.value_dim) : 0) +
                          (c.out ? as_double(rows) * as_double(w.value_dim) : 0);
      c.spilled_share = need > capacity ? 1 - capacity / need : 0;
      const double moved = flat_movement(machine, w, c).dram_words;
      if (moved < least) {
        least = moved;
        best = c;
      }
    }
    if (rows == w.queries) break;
  }
  return best;
}

FlatChoice choose_flat(const Machine& machine, const Workload& w) {
  static const Json published =
      parse_json(data_file("data/flat.choices.json"), "flat.choices.json");
  if (w.queries == w.keys && w.head_dim == w.value_dim && is_published_machine(machine)) {
    for (const Json& choice : published.at("choices")) {
      if (is_for(choice, w)) return parse_choice(choice, "flat.choices.json");
    }
  }
  return search_flat(machine, w);
}

}  // namespace heed::hardware
