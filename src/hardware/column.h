// One column of the machine, cycle by cycle: N elements of the matrix array above one element of the
// vector array, running softmax attention with the one-pass cascade of FuseMax (arXiv 2406.10491,
// cascade 5). All columns run alike; each holds one query of a query tile.
//
// Element r of the column holds key r of a key tile. Every cycle each element does one operation if
// its operands are there, else it waits; the order of operations is the schedule. Sums and maxima
// over keys go down the column, one element a cycle; what leaves it is in the vector element's
// registers one cycle later. The running maximum comes back to all elements at once.
//
// A tile of scores costs, in cycles of an element:
//   matrix   BQK E, LM 1, SLN 7 (subtraction and six multiply-adds), SLD 1, SLNV F
//   vector   RM 1, PRM 7, SPD 1, RD 1, SPNV F, RNV F; after the last key tile AV F
#pragma once
#include <cstdint>
#include <vector>

namespace heed::hardware {

enum class Schedule {
  one_tile,     // +Architecture: a tile ends before the next begins
  interleaved,  // +Binding: the matrix array is `lead` tiles ahead with its scores
};

struct ColumnCase {
  int64_t elements = 16;  // N: keys of a tile
  int64_t head_dim = 64, value_dim = 64;
  int64_t query_tiles = 4;  // that take turns; their state is in the buffer
  int64_t key_tiles = 40;
  Schedule schedule = Schedule::interleaved;
  int64_t lead = 1;  // interleaved: tiles whose scores are made ahead
  int64_t lag = 0;   // interleaved: tiles that RD and RNV stay behind
};

struct ColumnRun {
  int64_t cycles = 0;               // from the first operation to the last
  double interval = 0;              // cycles a tile in the steady state
  double util_2d = 0, util_1d = 0;  // busy elements in the steady state
  double expected_interval = 0;     // the closed form of the schedule; of one_tile for N < F
  int64_t scores_held = 0;          // tiles of scores an element holds at once: registers it needs
  int64_t link_depth = 0;           // values waiting between two elements
  int64_t exit_depth = 0;           // values waiting between the column and the vector element
  int64_t products_held = 0;        // SPNV values waiting for RNV
  std::vector<double> result;       // AV[query tile][f]
};

/// q [query_tiles, head_dim], k [key_tiles * elements, head_dim], v [key_tiles * elements, value_dim],
/// row-major. Throws heed::Error where sizes are impossible or the run would take minutes.
ColumnRun run_column(const ColumnCase& column, const std::vector<double>& q,
                     const std::vector<double>& k, const std::vector<double>& v);

/// The smallest lead, then lag, that reaches the closed form; the best one found if none does.
ColumnCase with_best_lead(ColumnCase column, const std::vector<double>& q,
                          const std::vector<double>& k, const std::vector<double>& v);

}  // namespace heed::hardware
