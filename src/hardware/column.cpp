#include "hardware/column.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <deque>
#include <limits>

#include "heed/error.h"

namespace heed::hardware {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr int64_t kExponential = 7;  // cycles: a subtraction, six dependent multiply-adds

enum class Step { bqk, lm, sln, sld, slnv, rm, prm, spd, rd, spnv, rnv, av };

struct Instruction {
  Step step;
  int64_t tile;
};

void check(const ColumnCase& c, size_t q, size_t k, size_t v) {
  const auto size = [](const char* name, int64_t found, int64_t least, int64_t most) {
    if (found >= least && found <= most) return;
    throw Error(fmt::format("column: {} is {}, a number from {} to {} is needed", name, found,
                            least, most));
  };
  size("elements", c.elements, 1, 1024);
  size("head dim", c.head_dim, 1, 1024);
  size("value dim", c.value_dim, 1, 1024);
  size("query tiles", c.query_tiles, 1, 1 << 16);
  size("key tiles", c.key_tiles, 1, 1 << 16);
  size("lead", c.lead, 0, 64);
  // SPD reads what RD of the same queries wrote, so RD must not stay a whole round behind.
  size("lag", c.lag, 0, c.query_tiles - 1);
  const int64_t steps = c.query_tiles * c.key_tiles * (c.elements + 1) *
                        (c.head_dim + 2 * c.value_dim + c.elements + 20);
  size("work (element cycles)", steps, 0, int64_t{1} << 31);
  const auto count = [](const char* name, size_t found, int64_t needed) {
    if (found == static_cast<size_t>(needed)) return;
    throw Error(fmt::format("column: {} has {} values, {} are needed", name, found, needed));
  };
  count("q", q, c.query_tiles * c.head_dim);
  count("k", k, c.key_tiles * c.elements * c.head_dim);
  count("v", v, c.key_tiles * c.elements * c.value_dim);
}

class Column {
 public:
  Column(const ColumnCase& column, const std::vector<double>& q, const std::vector<double>& k,
         const std::vector<double>& v)
      : c_(column), q_(q), k_(k), v_(v), tiles_(column.query_tiles * column.key_tiles) {
    write_programs();
    const auto n = static_cast<size_t>(c_.elements);
    elements_.resize(n);
    for (Element& e : elements_) e.scores.resize(static_cast<size_t>(tiles_));
    links_.resize(n);
    const auto queries = static_cast<size_t>(c_.query_tiles);
    maximum_.assign(queries, -kInf);
    sum_.assign(queries, 0);
    numerator_.assign(queries * static_cast<size_t>(c_.value_dim), 0);
    result_.result.assign(numerator_.size(), 0);
    for (auto* of_tile : {&broadcast_, &factor_, &scaled_sum_}) {
      of_tile->assign(static_cast<size_t>(tiles_), 0);
    }
    maximum_known_.assign(static_cast<size_t>(tiles_), false);
    finished_.assign(static_cast<size_t>(tiles_), -1);
    busy_2d_.assign(1, 0);
    busy_1d_.assign(1, 0);
  }

  ColumnRun run() {
    for (now_ = 0; !done(); ++now_) {
      cycle();
      if (now_ - last_progress_ > 2) throw std::logic_error("column: the schedule is stuck");
    }
    result_.cycles = now_;
    measure();
    return std::move(result_);
  }

 private:
  struct Element {
    size_t at = 0;               // instruction
    int64_t done = 0;            // cycles of it
    std::vector<double> scores;  // by tile: a score, then its weight
    int64_t held = 0;
  };

  // --- the schedule --------------------------------------------------------------------------------

  void write_programs() {
    const auto matrix = [&](std::initializer_list<Step> steps, int64_t tile) {
      if (tile < 0 || tile >= tiles_) return;
      for (Step step : steps) matrix_.push_back({step, tile});
    };
    const auto vector = [&](std::initializer_list<Step> steps, int64_t tile) {
      if (tile < 0 || tile >= tiles_) return;
      for (Step step : steps) {
        // The result leaves after the last tile of keys.
        if (step == Step::av && tile / c_.query_tiles != c_.key_tiles - 1) continue;
        vector_.push_back({step, tile});
      }
    };
    const bool one = c_.schedule == Schedule::one_tile;
    const int64_t lead = one ? 0 : c_.lead, lag = one ? 0 : c_.lag;
    for (int64_t t = -lead; t < tiles_; ++t) {
      matrix({Step::bqk, Step::lm}, t + lead);
      matrix({Step::sln, Step::sld, Step::slnv}, t);
    }
    if (one) {
      for (int64_t t = 0; t < tiles_; ++t) {
        vector({Step::rm, Step::prm, Step::spd, Step::spnv, Step::rnv, Step::rd, Step::av}, t);
      }
      return;
    }
    for (int64_t t = 0; t <= tiles_ + lag; ++t) {
      vector({Step::rd, Step::rnv, Step::av}, t - 1 - lag);
      vector({Step::rm, Step::prm, Step::spd, Step::spnv}, t);
    }
  }

  int64_t cycles_of(Step step) const {
    switch (step) {
      case Step::bqk:
        return c_.head_dim;
      case Step::sln:
      case Step::prm:
        return kExponential;
      case Step::slnv:
      case Step::spnv:
      case Step::rnv:
      case Step::av:
        return c_.value_dim;
      default:
        return 1;
    }
  }

  // --- one cycle -----------------------------------------------------------------------------------

  bool done() const {
    return vector_at_ == vector_.size() &&
           std::all_of(elements_.begin(), elements_.end(),
                       [&](const Element& e) { return e.at == matrix_.size(); });
  }

  void cycle() {
    int64_t busy = 0;
    // Everything a cycle reads was there when it began: the vector element first, then the column
    // from below, so that no value moves twice.
    const bool vector_busy = vector_cycle();
    for (size_t r = elements_.size(); r-- > 0;) busy += matrix_cycle(r) ? 1 : 0;
    // What the column gave out is in the vector element's registers one cycle later.
    for (double value : leaving_) exits_.push_back(value);
    leaving_.clear();
    std::swap(leaving_, left_now_);
    for (const auto& [tile, value] : new_maxima_) {
      broadcast_[static_cast<size_t>(tile)] = value;
      maximum_known_[static_cast<size_t>(tile)] = true;
    }
    new_maxima_.clear();
    result_.exit_depth = std::max(result_.exit_depth, static_cast<int64_t>(exits_.size()));
    busy_2d_.push_back(busy_2d_.back() + busy);
    busy_1d_.push_back(busy_1d_.back() + (vector_busy ? 1 : 0));
    if (busy > 0 || vector_busy) last_progress_ = now_;
    if (!leaving_.empty()) last_progress_ = now_;
  }

  /// Whether an element may do the next cycle of its instruction.
  bool ready(size_t r, const Instruction& i) const {
    const bool chained = i.step == Step::lm || i.step == Step::sld || i.step == Step::slnv;
    if (chained && r > 0 && links_[r].empty()) return false;
    if (i.step == Step::sln) return maximum_known_[static_cast<size_t>(i.tile)];
    if (i.step == Step::bqk && c_.schedule == Schedule::one_tile && i.tile > 0) {
      return finished_[static_cast<size_t>(i.tile - 1)] >= 0 &&
             finished_[static_cast<size_t>(i.tile - 1)] < now_;
    }
    return true;
  }

  bool matrix_cycle(size_t r) {
    Element& e = elements_[r];
    if (e.at == matrix_.size()) return false;
    const Instruction i = matrix_[e.at];
    if (!ready(r, i)) return false;
    double& score = e.scores[static_cast<size_t>(i.tile)];
    const int64_t key = i.tile / c_.query_tiles * c_.elements + static_cast<int64_t>(r);
    const int64_t query = i.tile % c_.query_tiles;
    switch (i.step) {
      case Step::bqk:
        if (e.done == 0) result_.scores_held = std::max(result_.scores_held, ++e.held);
        score += q_[static_cast<size_t>(query * c_.head_dim + e.done)] *
                 k_[static_cast<size_t>(key * c_.head_dim + e.done)];
        break;
      case Step::lm:
        send(r, r == 0 ? score : std::max(score, take(r)));
        break;
      case Step::sln:
        if (e.done == kExponential - 1) {
          score = std::exp(score - broadcast_[static_cast<size_t>(i.tile)]);
        }
        break;
      case Step::sld:
        send(r, r == 0 ? score : score + take(r));
        break;
      case Step::slnv: {
        const double product = score * v_[static_cast<size_t>(key * c_.value_dim + e.done)];
        send(r, r == 0 ? product : product + take(r));
        if (e.done == c_.value_dim - 1) --e.held;
        break;
      }
      default:
        break;
    }
    if (++e.done == cycles_of(i.step)) {
      e.done = 0;
      ++e.at;
    }
    return true;
  }

  double take(size_t r) {
    const double value = links_[r].front();
    links_[r].pop_front();
    return value;
  }

  /// Down the column; elements below already had their turn in this cycle.
  void send(size_t r, double value) {
    if (r + 1 == elements_.size()) {
      left_now_.push_back(value);
      return;
    }
    links_[r + 1].push_back(value);
    result_.link_depth = std::max(result_.link_depth, static_cast<int64_t>(links_[r + 1].size()));
  }

  /// The order in which values leave the column is that of the matrix program; each is taken by its
  /// own reader, so maxima may overtake sums that still wait.
  bool exit_ready(Step step, int64_t tile) {
    collect_exits();
    const auto t = static_cast<size_t>(tile);
    switch (step) {
      case Step::rm:
        return maxima_.size() > t;
      case Step::rd:
        return sums_.size() > t;
      default:
        return static_cast<int64_t>(products_.size()) > tile * c_.value_dim + vector_done_;
    }
  }

  void collect_exits() {
    while (!exits_.empty()) {
      const Instruction i = matrix_[exit_at_];
      if (i.step == Step::lm) {
        maxima_.push_back(exits_.front());
      } else if (i.step == Step::sld) {
        sums_.push_back(exits_.front());
      } else if (i.step == Step::slnv) {
        products_.push_back(exits_.front());
      } else {
        ++exit_at_;
        continue;
      }
      exits_.pop_front();
      if (++exit_done_ == cycles_of(i.step)) {
        exit_done_ = 0;
        ++exit_at_;
      }
    }
    const int64_t waiting = static_cast<int64_t>(products_.size()) - products_taken_;
    result_.exit_depth = std::max(result_.exit_depth, waiting);
  }

  bool vector_cycle() {
    if (vector_at_ == vector_.size()) return false;
    const Instruction i = vector_[vector_at_];
    const bool waits = i.step == Step::rm || i.step == Step::rd || i.step == Step::rnv;
    if (waits && !exit_ready(i.step, i.tile)) return false;
    vector_step(i);
    if (++vector_done_ == cycles_of(i.step)) {
      vector_done_ = 0;
      ++vector_at_;
      if (i.step == Step::rnv) finished_[static_cast<size_t>(i.tile)] = now_;
    }
    return true;
  }

  void vector_step(const Instruction& i) {
    const auto t = static_cast<size_t>(i.tile);
    const auto query = static_cast<size_t>(i.tile % c_.query_tiles);
    const size_t at = query * static_cast<size_t>(c_.value_dim) + static_cast<size_t>(vector_done_);
    switch (i.step) {
      case Step::rm: {
        const double before = maximum_[query];
        maximum_[query] = std::max(before, maxima_[t]);
        factor_[t] = before - maximum_[query];
        new_maxima_.emplace_back(i.tile, maximum_[query]);
        break;
      }
      case Step::prm:
        if (vector_done_ == kExponential - 1) factor_[t] = std::exp(factor_[t]);
        break;
      case Step::spd:
        scaled_sum_[t] = sum_[query] * factor_[t];
        break;
      case Step::rd:
        sum_[query] = sums_[t] + scaled_sum_[t];
        break;
      case Step::spnv:
        scaled_products_.push_back(numerator_[at] * factor_[t]);
        result_.products_held =
            std::max(result_.products_held, static_cast<int64_t>(scaled_products_.size()));
        break;
      case Step::rnv:
        numerator_[at] = products_[static_cast<size_t>(i.tile * c_.value_dim + vector_done_)] +
                         scaled_products_.front();
        scaled_products_.pop_front();
        ++products_taken_;
        break;
      default:
        result_.result[at] = numerator_[at] / sum_[query];
    }
  }

  // --- what came out -------------------------------------------------------------------------------

  double expected() const {
    const auto e = static_cast<double>(c_.head_dim), f = static_cast<double>(c_.value_dim);
    const auto n = static_cast<double>(c_.elements);
    if (c_.schedule == Schedule::one_tile) return e + 1 + n + 1 + 8 + 2 * f;
    return std::max(e + f + 9, 2 * f + 10);
  }

  /// Between the ends of two tiles, away from filling and from the results of the last keys.
  void measure() {
    result_.expected_interval = expected();
    const int64_t last = tiles_ - c_.query_tiles - 1;
    const int64_t first = last - (last - 1) / 2;
    if (first < 1 || last <= first) return;
    const int64_t begin = finished_[static_cast<size_t>(first)];
    const int64_t end = finished_[static_cast<size_t>(last)];
    const auto cycles = static_cast<double>(end - begin);
    const auto between = [&](const std::vector<int64_t>& busy) {
      return static_cast<double>(busy[static_cast<size_t>(end + 1)] -
                                 busy[static_cast<size_t>(begin + 1)]);
    };
    result_.interval = cycles / static_cast<double>(last - first);
    result_.util_2d = between(busy_2d_) / cycles / static_cast<double>(c_.elements);
    result_.util_1d = between(busy_1d_) / cycles;
  }

  const ColumnCase c_;
  const std::vector<double>&q_, &k_, &v_;
  const int64_t tiles_;
  std::vector<Instruction> matrix_, vector_;

  int64_t now_ = 0, last_progress_ = 0;
  std::vector<Element> elements_;
  std::vector<std::deque<double>> links_;   // into element r from above
  std::vector<double> leaving_, left_now_;  // on their way out: last cycle's, this cycle's
  std::deque<double> exits_;
  size_t exit_at_ = 0;
  int64_t exit_done_ = 0, products_taken_ = 0;
  std::vector<double> maxima_, sums_, products_;  // by tile, by tile and f
  std::deque<double> scaled_products_;
  std::vector<std::pair<int64_t, double>> new_maxima_;
  std::vector<double> broadcast_, factor_, scaled_sum_;  // by tile
  std::vector<bool> maximum_known_;
  std::vector<int64_t> finished_;  // cycle of a tile's last RNV
  size_t vector_at_ = 0;
  int64_t vector_done_ = 0;
  std::vector<double> maximum_, sum_, numerator_;  // by query tile
  std::vector<int64_t> busy_2d_, busy_1d_;         // sums up to each cycle
  ColumnRun result_;
};

}  // namespace

ColumnRun run_column(const ColumnCase& column, const std::vector<double>& q,
                     const std::vector<double>& k, const std::vector<double>& v) {
  check(column, q.size(), k.size(), v.size());
  return Column(column, q, k, v).run();
}

ColumnCase with_best_lead(ColumnCase column, const std::vector<double>& q,
                          const std::vector<double>& k, const std::vector<double>& v) {
  constexpr int64_t kMostLead = 6;
  ColumnCase best = column;
  double least = kInf;
  for (column.lead = 0; column.lead <= kMostLead; ++column.lead) {
    for (column.lag = 0; column.lag < std::min<int64_t>(column.query_tiles, kMostLead);
         ++column.lag) {
      const ColumnRun run = run_column(column, q, k, v);
      if (run.interval <= 0) return column;  // too few tiles for a steady state
      if (run.interval >= least) continue;
      least = run.interval;
      best = column;
      if (least <= run.expected_interval) return best;
    }
  }
  return best;
}

}  // namespace heed::hardware
