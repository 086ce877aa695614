// A spatial accelerator: a matrix array, a vector array, a buffer and DRAM; and the layer it runs.
// Read from JSON files with units in the keys; docs/hardware.md describes them.
// Source of the built-in ones: FuseMax, arXiv 2406.10491, and its artifact.
#pragma once
#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "hardware/fields.h"

namespace heed::hardware {

/// Kinds of operations that a cascade's counts tell apart.
enum class Operation { multiply_add, addition, maximum, exponential, division, other };
inline constexpr int kOperations = 6;
const char* name_of(Operation operation);
using PerOperation = std::array<double, kOperations>;

/// Rows x columns of processing elements; the vector array has one row.
struct ProcessingArray {
  int64_t rows = 1, columns = 1;
  PerOperation cycles{};  // per operation of one element; 0: it cannot do it
  double elements() const { return static_cast<double>(rows) * static_cast<double>(columns); }
  bool can(Operation operation) const { return cycles[static_cast<size_t>(operation)] > 0; }
};

struct EnergyTable {
  PerOperation operation_pj{};
  double dram_word_pj = 0, buffer_word_read_pj = 0, buffer_word_write_pj = 0;
};

struct AreaTable {
  double element_2d_um2 = 0, element_1d_um2 = 0, buffer_byte_um2 = 0;
};

struct Machine {
  std::string name, title;
  double clock_hz = 0;
  int64_t word_bytes = 2;
  ProcessingArray matrix, vector;
  double buffer_bytes = 0;
  double dram_bytes_per_second = 0;
  EnergyTable energy;
  std::optional<AreaTable> area;
};

/// `file` names the text in errors. Throws heed::Error.
Machine parse_machine(std::string_view text, const std::string& file);
/// "baseline" or "fusemax".
const Machine& builtin_machine(const std::string& name);

/// One encoder layer: attention of `heads` heads and the six products around it.
struct Workload {
  std::string name, title;
  int64_t batch = 1, heads = 1, head_dim = 1, value_dim = 1, queries = 1, keys = 1;
  std::optional<int64_t> model_dim, ffn_dim;  // without them there is no end to end
  bool causal = false;                        // aligned to the end of the keys
};

Workload parse_workload(std::string_view text, const std::string& file);
/// "bert", "trxl", "t5", "xlm" at 1,024 tokens.
const Workload& builtin_workload(const std::string& name);
const std::vector<std::string>& builtin_workloads();
/// The same layer with another number of queries and keys. Throws heed::Error.
Workload with_length(Workload workload, int64_t length);
/// Throws heed::Error where the layer's operations do not fit 63 bits.
void check_size(const Workload& workload);

/// A text of this folder: "cascades/one_pass.cascade". Throws std::logic_error.
std::string_view data_file(std::string_view name);
std::vector<std::string_view> data_files();  // all of them

}  // namespace heed::hardware
