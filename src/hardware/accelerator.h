// What a layer costs on a machine under a mapping: closed forms of the steady state. Only compute and
// DRAM bandwidth bound the latency; the buffer's bandwidth, the network between elements, filling and
// draining are free, as in FuseMax (arXiv 2406.10491), whose 120 published rows this reproduces.
#pragma once
#include <string>
#include <vector>

#include "hardware/mapping.h"

namespace heed::hardware {

/// Where the energy goes, in picojoules.
struct Energy {
  double matrix_pj = 0, vector_pj = 0, buffer_pj = 0, dram_pj = 0;
  double total_pj() const { return matrix_pj + vector_pj + buffer_pj + dram_pj; }
  Energy& operator+=(const Energy& other);
};

/// Words that move.
struct Movement {
  double dram_words = 0, buffer_reads = 0, buffer_writes = 0;
};

/// One Einsum: time on its array with all elements busy, and the energy of its operations.
struct EinsumCost {
  std::string tensor;
  bool on_matrix = false;
  double seconds = 0;         // of padded tiles
  double useful_seconds = 0;  // without the padding of ragged tiles
  double pj = 0;
};

struct Cost {
  double latency_s = 0, compute_s = 0, memory_s = 0;
  double util_2d = 0, util_1d = 0;  // useful work over the latency, of all elements
  double traffic_bytes = 0;
  Energy energy;
  std::vector<EinsumCost> einsums;
  int64_t query_tiles =
      0;  // tiles of queries that the buffer holds at once; 0 where it does not say
};

Cost attention_cost(const Machine& machine, const Mapping& mapping, const Workload& layer);
/// The products for Q, K, V, the output and the feed-forward network, one after the other.
Cost linear_cost(const Machine& machine, const Workload& layer);

/// One line of `heed hardware fusemax`.
struct Row {
  std::string config, model;
  int64_t length = 0;
  Cost attention, linear;
  double e2e_latency_s() const { return attention.latency_s + linear.latency_s; }
  double e2e_energy_pj() const { return attention.energy.total_pj() + linear.energy.total_pj(); }
};
Row cost_row(const Machine& machine, const Mapping& mapping, const Workload& layer);

/// The paper's sweep: 5 configurations x 4 models x 6 lengths, batch 64.
const std::vector<int64_t>& paper_lengths();
std::vector<Row> paper_rows();

/// Arithmetic means, over the models and lengths that both configurations have, of a/b latency and
/// of b/a energy ("b is 6.72 times faster than a and needs 0.79 of its energy").
struct Means {
  int rows = 0;
  double speedup = 0, energy = 0, e2e_speedup = 0, e2e_energy = 0;
};
Means compare(const std::vector<Row>& rows, const std::string& slow, const std::string& fast);

/// FuseMax with an N x N array and the buffer that it needs; the area is the sum of its parts.
Machine swept_machine(int64_t elements, int64_t head_dim);
double area_um2(const Machine& machine);

/// Share of tiles that a mask leaves, tiles of these sizes; 1 without a mask.
double visited_share(const Workload& layer, int64_t query_tile, int64_t key_tile);

}  // namespace heed::hardware
