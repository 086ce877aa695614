#include "hardware/accelerator.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "base/round_up.h"
#include "hardware/flat.h"
#include "heed/error.h"

namespace heed::hardware {
namespace {

const std::string kQuery = "p", kKey = "m";  // ranks that are cut into tiles

/// Sizes of the ranks: of the layer, or rounded up to whole tiles.
Sizes sizes_of(const Machine& machine, const Workload& w, bool padded) {
  const int64_t rows = machine.matrix.rows, columns = machine.matrix.columns;
  const int64_t key_tiles = ceil_div(w.keys, rows), query_tiles = ceil_div(w.queries, columns);
  return {{"b", w.batch},
          {"h", w.heads},
          {"p", padded ? query_tiles * columns : w.queries},
          {"m", padded ? key_tiles * rows : w.keys},
          {"m1", key_tiles},
          {"m0", rows},
          {"e", w.head_dim},
          {"f", w.value_dim}};
}

class Evaluation {
 public:
  Evaluation(const Machine& machine, const Mapping& mapping, const Workload& layer)
      : machine_(machine),
        mapping_(mapping),
        layer_(layer),
        cascade_(builtin_cascade(mapping.cascade)),
        sizes_(sizes_of(machine, layer, false)),
        padded_(sizes_of(machine, layer, true)),
        share_(visited_share(layer, machine.matrix.columns, machine.matrix.rows)) {}

  Cost run() {
    for (const Phase& phase : mapping_.phases) {
      for (const std::string& name : phase.matrix) add_einsum(name, true);
      for (const std::string& name : phase.vector) add_einsum(name, false);
    }
    switch (mapping_.memory) {
      case Memory::streamed:
        streamed();
        break;
      case Memory::between_phases:
        between_phases();
        break;
      case Memory::score_rows:
        moved_ = flat_movement(machine_, layer_, choose_flat(machine_, layer_));
        break;
    }
    finish();
    return std::move(cost_);
  }

 private:
  void add_einsum(const std::string& name, bool on_matrix) {
    const Einsum& einsum = cascade_.einsum(name);
    const ProcessingArray& array = on_matrix ? machine_.matrix : machine_.vector;
    const std::string what =
        fmt::format("mapping {}, machine {}: Einsum {}", mapping_.name, machine_.name, name);
    const auto seconds = [&](const PerOperation& work) {
      return element_cycles(array, work, mapping_.overlapped_operations, what) / array.elements() /
             machine_.clock_hz;
    };
    const PerOperation work = operations(cascade_, einsum, sizes_, share_);
    EinsumCost row{name, on_matrix, seconds(operations(cascade_, einsum, padded_, share_)),
                   seconds(work), 0};
    for (size_t i = 0; i < work.size(); ++i) row.pj += work[i] * machine_.energy.operation_pj[i];
    cost_.einsums.push_back(row);
  }

  const EinsumCost& cost_of(const std::string& name) const {
    return *std::find_if(cost_.einsums.begin(), cost_.einsums.end(),
                         [&](const EinsumCost& row) { return row.tensor == name; });
  }

  double phase_seconds(const Phase& phase) const {
    // The reduction moves one row a step, and each step takes as long as one row's part.
    if (!phase.drain.empty()) {
      return static_cast<double>(machine_.matrix.rows) * cost_of(phase.drain).seconds;
    }
    double matrix = 0, vector = 0;
    for (const std::string& name : phase.matrix) matrix += cost_of(name).seconds;
    for (const std::string& name : phase.vector) vector += cost_of(name).seconds;
    return std::max(matrix, vector);
  }

  double words(const std::string& tensor) const {
    return product(cascade_.tensors.at(tensor).ranks, sizes_);
  }

  /// How often an Einsum goes through a tensor that lacks the ranks of its tiles.
  double visits(const Einsum& einsum, const Ranks& ranks) const {
    const bool keys = cascade_.holds(einsum.ranks, kKey), has_key = cascade_.holds(ranks, kKey);
    const bool queries = cascade_.holds(einsum.ranks, kQuery);
    const bool has_query = cascade_.holds(ranks, kQuery);
    double times = keys && queries ? share_ : 1;
    if (keys && !has_key) times *= static_cast<double>(padded_.at("m1"));
    if (queries && !has_query) {
      times *= static_cast<double>(ceil_div(layer_.queries, machine_.matrix.columns));
    }
    return times;
  }

  /// The Einsum sums over all tiles of keys, so its result goes to and fro.
  bool has_partial_sums(const Einsum& einsum) const {
    return cascade_.holds(einsum.ranks, kKey) &&
           !cascade_.holds(cascade_.tensors.at(einsum.tensor).ranks, kKey);
  }

  void buffer_accesses(const Einsum& einsum, bool writes_to_dram) {
    for (const Operand& read : einsum.reads) {
      if (!mapping_.is_resident(read.tensor)) continue;
      if (mapping_.is_forwarded(read.tensor, einsum.tensor)) continue;
      moved_.buffer_reads += product(read.ranks, sizes_) * visits(einsum, read.ranks);
    }
    if (!mapping_.is_resident(einsum.tensor)) return;
    const double written =
        words(einsum.tensor) * visits(einsum, cascade_.tensors.at(einsum.tensor).ranks);
    if (has_partial_sums(einsum)) {
      moved_.buffer_reads += written;
      moved_.buffer_writes += written;
    } else if (!writes_to_dram) {
      moved_.buffer_writes += written;
    }
  }

  void from_dram(const std::string& tensor, double times) {
    const double count = words(tensor) * times;
    moved_.dram_words += count;
    if (mapping_.is_resident(tensor)) moved_.buffer_writes += count;
  }

  void streamed() {
    cost_.query_tiles = tiles_in_buffer();
    const int64_t tiles = ceil_div(layer_.queries, machine_.matrix.columns);
    const double groups = static_cast<double>(ceil_div(tiles, cost_.query_tiles));
    const double seen =
        visited_share(layer_, cost_.query_tiles * machine_.matrix.columns, machine_.matrix.rows);
    for (const auto& [name, facts] : cascade_.tensors) {
      const bool by_query = cascade_.holds(facts.ranks, kQuery);
      if (facts.input) from_dram(name, by_query ? 1 : groups * seen);
      if (facts.output) moved_.dram_words += words(name);
    }
    for (const Einsum& einsum : cascade_.einsums) buffer_accesses(einsum, false);
  }

  /// The largest divisor of the number of query tiles whose resident tensors fit the buffer.
  int64_t tiles_in_buffer() const {
    const double word = static_cast<double>(machine_.word_bytes);
    const double columns = static_cast<double>(machine_.matrix.columns);
    double per_query = 0, of_keys = 0;
    for (const std::string& name : mapping_.resident) {
      const Ranks& ranks = cascade_.tensors.at(name).ranks;
      double count = 1;
      for (const std::string& rank : ranks) {
        if (rank == "e" || rank == "f") count *= static_cast<double>(sizes_.at(rank));
        if (rank == kKey) count *= static_cast<double>(machine_.matrix.rows);
      }
      (cascade_.holds(ranks, kQuery) ? per_query : of_keys) += count;
    }
    const double bytes = mapping_.tiling_buffer_bytes.value_or(machine_.buffer_bytes);
    const double needed = word * (of_keys + per_query * columns);
    if (needed > bytes) {
      throw Error(
          fmt::format("mapping {}, machine {}: buffer_bytes is {:.0f}, one tile of queries "
                      "and one of keys need {:.0f}",
                      mapping_.name, machine_.name, bytes, needed));
    }
    const double fit = per_query > 0
                           ? std::floor((bytes - word * of_keys) / (word * per_query * columns))
                           : INFINITY;
    const int64_t tiles = ceil_div(layer_.queries, machine_.matrix.columns);
    int64_t most = 1;
    for (int64_t divisor = 1; divisor <= tiles / divisor; ++divisor) {
      if (tiles % divisor != 0) continue;
      for (int64_t candidate : {divisor, tiles / divisor}) {
        if (static_cast<double>(candidate) <= fit) most = std::max(most, candidate);
      }
    }
    return most;
  }

  void between_phases() {
    for (const Phase& phase : mapping_.phases) {
      std::vector<std::string> inside = phase.matrix;
      inside.insert(inside.end(), phase.vector.begin(), phase.vector.end());
      const double before = moved_.dram_words;
      std::vector<std::string> read;
      for (const std::string& name : inside) {
        const Einsum& einsum = cascade_.einsum(name);
        for (const Operand& operand : einsum.reads) {
          if (contains(inside, operand.tensor) || contains(read, operand.tensor)) continue;
          read.push_back(operand.tensor);
          from_dram(operand.tensor, 1);
        }
        const bool leaves = is_used_outside(name, inside);
        if (leaves) moved_.dram_words += words(name);
        buffer_accesses(einsum, leaves);
      }
      const double bytes = (moved_.dram_words - before) * static_cast<double>(machine_.word_bytes);
      cost_.latency_s += std::max(phase_seconds(phase), bytes / machine_.dram_bytes_per_second);
    }
  }

  bool is_used_outside(const std::string& tensor, const std::vector<std::string>& inside) const {
    if (cascade_.tensors.at(tensor).output) return true;
    return std::any_of(cascade_.einsums.begin(), cascade_.einsums.end(), [&](const Einsum& e) {
      return !contains(inside, e.tensor) &&
             std::any_of(e.reads.begin(), e.reads.end(),
                         [&](const Operand& o) { return o.tensor == tensor; });
    });
  }

  void finish() {
    for (const Phase& phase : mapping_.phases) cost_.compute_s += phase_seconds(phase);
    cost_.traffic_bytes = moved_.dram_words * static_cast<double>(machine_.word_bytes);
    cost_.memory_s = cost_.traffic_bytes / machine_.dram_bytes_per_second;
    if (mapping_.memory != Memory::between_phases) {
      cost_.latency_s = std::max(cost_.compute_s, cost_.memory_s);
    }
    for (const EinsumCost& row : cost_.einsums) {
      (row.on_matrix ? cost_.util_2d : cost_.util_1d) += row.useful_seconds / cost_.latency_s;
      (row.on_matrix ? cost_.energy.matrix_pj : cost_.energy.vector_pj) += row.pj;
    }
    const EnergyTable& table = machine_.energy;
    cost_.energy.dram_pj = moved_.dram_words * table.dram_word_pj;
    cost_.energy.buffer_pj = moved_.buffer_reads * table.buffer_word_read_pj +
                             moved_.buffer_writes * table.buffer_word_write_pj;
  }

  const Machine& machine_;
  const Mapping& mapping_;
  const Workload& layer_;
  const EinsumCascade& cascade_;
  Sizes sizes_, padded_;
  double share_;
  Movement moved_;
  Cost cost_;
};

}  // namespace

Energy& Energy::operator+=(const Energy& other) {
  matrix_pj += other.matrix_pj;
  vector_pj += other.vector_pj;
  buffer_pj += other.buffer_pj;
  dram_pj += other.dram_pj;
  return *this;
}

Cost attention_cost(const Machine& machine, const Mapping& mapping, const Workload& layer) {
  check_size(layer);
  return Evaluation(machine, mapping, layer).run();
}

Cost linear_cost(const Machine& machine, const Workload& layer) {
  Cost cost;
  if (!layer.model_dim) return cost;
  if (!machine.matrix.can(Operation::multiply_add)) {
    throw Error("machine " + machine.name + ": array_2d has no 'multiply_add'");
  }
  const double word = static_cast<double>(machine.word_bytes);
  const auto tokens = static_cast<double>(layer.batch) * static_cast<double>(layer.queries);
  // Rows of inputs stream; weights are cut to the array.
  const auto multiply = [&](int64_t inner, int64_t outer) {
    const auto in = static_cast<double>(inner), out = static_cast<double>(outer);
    const auto padded = [](int64_t x, int64_t tile) {
      return static_cast<double>(ceil_div(x, tile)) * static_cast<double>(tile);
    };
    const double macs = tokens * in * out;
    const double work = tokens * padded(inner, machine.matrix.rows) *
                        padded(outer, machine.matrix.columns) *
                        machine.matrix.cycles[static_cast<size_t>(Operation::multiply_add)];
    const double read = tokens * in + in * out, moved = read + tokens * out;
    const double compute = work / machine.matrix.elements() / machine.clock_hz;
    const double memory = moved * word / machine.dram_bytes_per_second;
    cost.compute_s += compute;
    cost.memory_s += memory;
    cost.latency_s += std::max(compute, memory);
    cost.traffic_bytes += moved * word;
    cost.util_2d += compute * (macs / work);
    const EnergyTable& table = machine.energy;
    cost.energy.matrix_pj +=
        macs * table.operation_pj[static_cast<size_t>(Operation::multiply_add)];
    cost.energy.dram_pj += moved * table.dram_word_pj;
    // Each operand is read once for a row or a column of the array.
    cost.energy.buffer_pj += macs * table.buffer_word_read_pj *
                                 (1.0 / static_cast<double>(machine.matrix.rows) +
                                  1.0 / static_cast<double>(machine.matrix.columns)) +
                             read * table.buffer_word_write_pj;
  };
  const int64_t model = *layer.model_dim, inner = layer.heads * layer.head_dim;
  multiply(model, inner);                          // Q
  multiply(model, inner);                          // K
  multiply(model, layer.heads * layer.value_dim);  // V
  multiply(layer.heads * layer.value_dim, model);  // output
  multiply(model, *layer.ffn_dim);
  multiply(*layer.ffn_dim, model);
  cost.util_2d /= cost.latency_s;
  return cost;
}

Row cost_row(const Machine& machine, const Mapping& mapping, const Workload& layer) {
  return {mapping.name, layer.name, layer.queries, attention_cost(machine, mapping, layer),
          linear_cost(machine, layer)};
}

const std::vector<int64_t>& paper_lengths() {
  static const std::vector<int64_t> lengths = {1024, 4096, 16384, 65536, 262144, 1048576};
  return lengths;
}

std::vector<Row> paper_rows() {
  std::vector<Row> rows;
  for (const std::string& config : builtin_mappings()) {
    const Mapping& mapping = builtin_mapping(config);
    for (const std::string& model : builtin_workloads()) {
      for (int64_t length : paper_lengths()) {
        rows.push_back(cost_row(builtin_machine(mapping.machine), mapping,
                                with_length(builtin_workload(model), length)));
      }
    }
  }
  return rows;
}

Means compare(const std::vector<Row>& rows, const std::string& slow, const std::string& fast) {
  Means means;
  for (const Row& a : rows) {
    if (a.config != slow) continue;
    for (const Row& b : rows) {
      if (b.config != fast || b.model != a.model || b.length != a.length) continue;
      ++means.rows;
      means.speedup += a.attention.latency_s / b.attention.latency_s;
      means.energy += b.attention.energy.total_pj() / a.attention.energy.total_pj();
      means.e2e_speedup += a.e2e_latency_s() / b.e2e_latency_s();
      means.e2e_energy += b.e2e_energy_pj() / a.e2e_energy_pj();
    }
  }
  if (means.rows == 0) return means;
  for (double* mean : {&means.speedup, &means.energy, &means.e2e_speedup, &means.e2e_energy}) {
    *mean /= means.rows;
  }
  return means;
}

Machine swept_machine(int64_t elements, int64_t head_dim) {
  constexpr int64_t kMost = 4096;
  if (elements < 1 || elements > kMost) {
    throw Error(fmt::format("pe_dim: found {}, a number of elements from 1 to {} is needed",
                            elements, kMost));
  }
  Machine machine = builtin_machine("fusemax");
  machine.matrix.rows = machine.matrix.columns = machine.vector.columns = elements;
  // Keys and values of a tile and the state of two query tiles; twice that where the array has more
  // rows than the published one. Solved from the published sweep's traffic.
  const double tiles = elements > builtin_machine("fusemax").matrix.rows ? 2 : 1;
  machine.buffer_bytes =
      16.0 * static_cast<double>(elements) * static_cast<double>(head_dim) * tiles;
  return machine;
}

double area_um2(const Machine& machine) {
  if (!machine.area) throw Error("machine " + machine.name + ": 'area_um2' is missing");
  return machine.matrix.elements() * machine.area->element_2d_um2 +
         machine.vector.elements() * machine.area->element_1d_um2 +
         machine.buffer_bytes * machine.area->buffer_byte_um2;
}

double visited_share(const Workload& layer, int64_t query_tile, int64_t key_tile) {
  if (!layer.causal) return 1;
  const int64_t key_tiles = ceil_div(layer.keys, key_tile);
  const int64_t query_tiles = ceil_div(layer.queries, query_tile);
  constexpr int64_t kMostTiles = int64_t{1} << 26;
  if (query_tiles > kMostTiles) throw Error("causal: more than 2^26 tiles of queries");
  double visited = 0;
  for (int64_t t = 0; t < query_tiles; ++t) {
    const int64_t last = std::min((t + 1) * query_tile, layer.queries) - 1;
    const int64_t keys = std::min(layer.keys, last + layer.keys - layer.queries + 1);
    if (keys > 0) visited += static_cast<double>(ceil_div(keys, key_tile));
  }
  return visited / (static_cast<double>(key_tiles) * static_cast<double>(query_tiles));
}

}  // namespace heed::hardware
