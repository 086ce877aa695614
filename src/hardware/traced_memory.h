// What a streamed run writes to and reads from: elements with their history, and visits of tiles.
#pragma once
#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "hardware/streaming.h"
#include "heed/error.h"

namespace heed::hardware {

/// Elements with their history. Tensors that the cascade defines are watched for their lifetime.
class Memory {
 public:
  struct Tensor {
    std::vector<int64_t> shape;
    std::vector<double> values;
    std::vector<int64_t> first, last;  // ticks of this fibre; -1: not written
    TensorTouches touches;
  };

  explicit Memory(size_t tensors) : tensors_(tensors) {}
  Tensor& tensor(int id) { return tensors_[static_cast<size_t>(id)]; }

  double read(int id, size_t at, const std::string& reader) {
    Tensor& t = tensor(id);
    ++t.touches.reads;
    if (!t.touches.input) {
      if (t.first[at] < 0) {
        throw Error(fmt::format("streaming: {} reads an element of {} that is still to come",
                                reader, t.touches.tensor));
      }
      t.last[at] = tick_++;
    }
    return t.values[at];
  }

  void write(int id, size_t at, double value) {
    Tensor& t = tensor(id);
    ++t.touches.writes;
    t.values[at] = value;
    if (t.first[at] < 0) {
      t.first[at] = tick_;
      written_.emplace_back(id, at);
    }
    t.last[at] = tick_++;
  }
  bool is_written(int id, size_t at) { return tensor(id).first[at] >= 0; }

  /// Most words live at one time since the last call; forgets the lifetimes.
  int64_t end_fibre() {
    std::vector<std::pair<int64_t, int>> changes;
    for (const auto& [id, at] : written_) {
      Tensor& t = tensor(id);
      changes.emplace_back(t.first[at], 1);
      changes.emplace_back(t.last[at] + 1, -1);
      t.first[at] = -1;
    }
    written_.clear();
    std::sort(changes.begin(), changes.end());
    int64_t live = 0, most = 0;
    for (const auto& [tick, change] : changes) most = std::max(most, live += change);
    tick_ = 0;
    return most;
  }

 private:
  std::vector<Tensor> tensors_;
  std::vector<std::pair<int, size_t>> written_;
  int64_t tick_ = 0;
};

/// How often each tile was visited with all others visited between.
class Visits {
 public:
  explicit Visits(int64_t tiles)
      : last_(static_cast<size_t>(tiles), -1), count_(static_cast<size_t>(tiles), 0) {}

  void visit(int64_t tile) {
    const auto t = static_cast<size_t>(tile);
    if (tile == current_) return;
    current_ = tile;
    const bool all_others = std::all_of(last_.begin(), last_.end(), [&](const int64_t& other) {
      return &other == &last_[t] || other > last_[t];
    });
    if (count_[t] == 0 || (all_others && last_.size() > 1)) ++count_[t];
    last_[t] = now_++;
  }
  int most() const { return *std::max_element(count_.begin(), count_.end()); }

 private:
  std::vector<int64_t> last_;
  std::vector<int> count_;
  int64_t current_ = -1, now_ = 0;
};

}  // namespace heed::hardware
