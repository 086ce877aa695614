#include "cascade/run.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>
#include <numeric>

#include "cascade/kernels.h"
#include "heed/error.h"

namespace heed::cascade {
namespace {

constexpr int64_t kMaxElements = int64_t{1} << 30;

template <class Map>
auto require(const Map& map, const std::string& name, const Lowered& lowered, const char* what) {
  const auto it = map.find(name);
  if (it == map.end()) {
    throw Error(fmt::format("cascade {}: {} {} is not bound", lowered.name, what, name));
  }
  return it;
}

}  // namespace

double identity(Reduce reduce) {
  constexpr double kInf = std::numeric_limits<double>::infinity();
  return reduce == Reduce::max ? -kInf : reduce == Reduce::min ? kInf : 0.0;
}

size_t axis_of(const TensorInfo& info, int rank) {
  size_t axis = 0;
  while (info.axes[axis].rank != rank) ++axis;
  return axis;
}

void set_shape(const Lowered& lowered, const std::string& name, std::vector<int64_t> shape,
               TensorData& data) {
  int64_t count = 1;
  data.strides.assign(shape.size(), 1);
  for (size_t a = shape.size(); a-- > 0;) {
    data.strides[a] = count;
    if (shape[a] < 0) {
      throw Error(fmt::format("cascade {}: axis {} of {} has {} elements, expected 0 or more",
                              lowered.name, a, name, shape[a]));
    }
    if (__builtin_mul_overflow(count, std::max<int64_t>(shape[a], 1), &count) ||
        count > kMaxElements) {
      throw Error(
          fmt::format("cascade {}: tensor {} has more than 2^30 elements", lowered.name, name));
    }
  }
  data.shape = std::move(shape);
}

Run::Run(const Program& program, const Bindings& bindings) : lowered_(*program.ast().lowered) {
  frame_.lowered = &lowered_;
  frame_.sizes = bind_sizes(lowered_, bindings);
  frame_.tensors.resize(lowered_.tensors.size());
  bind_callables(bindings);
  bind_inputs(bindings);
  shape_defined();
}

void Run::bind_callables(const Bindings& bindings) {
  for (const Callable& p : lowered_.predicates) {
    const auto it = require(bindings.predicates, p.name, lowered_, "predicate");
    if (!it->second)
      throw Error(fmt::format("cascade {}: predicate {} is empty", lowered_.name, p.name));
    frame_.predicates.push_back(&it->second);
  }
  for (const Callable& f : lowered_.functions) {
    const auto it = require(bindings.indices, f.name, lowered_, "index function");
    if (!it->second) {
      throw Error(fmt::format("cascade {}: index function {} is empty", lowered_.name, f.name));
    }
    frame_.functions.push_back(&it->second);
  }
}

void Run::bind_inputs(const Bindings& bindings) {
  for (size_t i = 0; i < lowered_.tensors.size(); ++i) {
    const TensorInfo& info = lowered_.tensors[i];
    TensorData& data = frame_.tensors[i];
    if (!info.input) continue;
    if (info.scalar) {
      set_shape(lowered_, info.name, {}, data);
      const auto it = bindings.scalars.find(info.name);
      if (it == bindings.scalars.end() && !info.has_default) {
        require(bindings.scalars, info.name, lowered_, "scalar");
      }
      data.values = {it == bindings.scalars.end() ? info.fallback : it->second};
      continue;
    }
    const auto it = bindings.tensors.find(info.name);
    if (it == bindings.tensors.end()) {
      if (!info.has_default) require(bindings.tensors, info.name, lowered_, "tensor");
      std::vector<int64_t> shape;
      for (const Axis& axis : info.axes) {
        if (axis.rank < 0) require(bindings.tensors, info.name, lowered_, "tensor");
        shape.push_back(size(axis.rank));
      }
      set_shape(lowered_, info.name, shape, data);
      const auto count =
          std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
      data.values.assign(static_cast<size_t>(count), info.fallback);
      continue;
    }
    set_shape(lowered_, info.name, it->second.shape, data);
    int64_t count = 1;
    for (int64_t extent : data.shape) count *= extent;
    if (static_cast<int64_t>(it->second.values.size()) != count) {
      throw Error(fmt::format("cascade {}: tensor {} has {} values, expected {} for its shape",
                              lowered_.name, info.name, it->second.values.size(), count));
    }
    data.values = it->second.values;
  }
}

void Run::shape_defined() {
  int64_t total = 0;
  for (size_t i = 0; i < lowered_.tensors.size(); ++i) {
    const TensorInfo& info = lowered_.tensors[i];
    if (info.input) continue;
    std::vector<int64_t> shape;
    int64_t count = 1;
    for (const Axis& axis : info.axes) shape.push_back(size(axis.rank) + (axis.running ? 1 : 0));
    set_shape(lowered_, info.name, shape, frame_.tensors[i]);
    for (int64_t extent : shape) count *= extent;
    total += count;
    if (total > kMaxElements) {
      throw Error(fmt::format("cascade {}: its tensors have more than 2^30 elements together",
                              lowered_.name));
    }
  }
}

std::vector<bool> Run::in_step(const Group& group) const {
  std::vector<bool> result(lowered_.tensors.size());
  if (group.rank < 0) return result;
  for (int s = group.first; s <= group.last; ++s) {
    result[static_cast<size_t>(lowered_.statements[static_cast<size_t>(s)].main.tensor)] = true;
  }
  return result;
}

void Run::forward() {
  for (const Group& g : lowered_.groups) group(g);
}

Run::Compiled Run::compile(const LoweredEquation& equation, int running,
                           const std::vector<bool>& in_step) {
  Compiled result;
  result.equation = &equation;
  for (const LoweredTerm& term : equation.terms) {
    result.nests.push_back(std::make_unique<Nest>(frame_, equation, term, running, in_step));
    result.may_be_absent |= result.nests.back()->may_be_absent();
  }
  return result;
}

void Run::group(const Group& g) {
  const std::vector<bool> together = in_step(g);
  std::vector<Compiled> starts, mains;
  for (int s = g.first; s <= g.last; ++s) {
    const LoweredStatement& statement = lowered_.statements[static_cast<size_t>(s)];
    TensorData& data = frame_.tensors[static_cast<size_t>(statement.main.tensor)];
    const auto count =
        std::accumulate(data.shape.begin(), data.shape.end(), int64_t{1}, std::multiplies<>());
    data.values.assign(static_cast<size_t>(count), 0.0);
    mains.push_back(compile(statement.main, g.rank, together));
    bool track = mains.back().may_be_absent;
    if (statement.initial) {
      starts.push_back(compile(*statement.initial, -1, together));
      track |= starts.back().may_be_absent;
    }
    if (track) data.present.assign(static_cast<size_t>(count), 0);
    if (track && statement.running >= 0) data.carried.assign(static_cast<size_t>(count), 0);
  }
  for (Compiled& start : starts) {
    run(start);
    settle(start);
  }
  if (g.rank < 0) {
    run(mains[0]);
    settle(mains[0]);
    return;
  }
  for (int64_t i = 0; i < size(g.rank); ++i) {
    for (Compiled& main : mains) {
      for (const auto& nest : main.nests) nest->set_step(i);
      run(main);
      settle_step(main, g.rank, i);
    }
  }
}

void Run::run(Compiled& compiled) {
  TensorData& out = frame_.tensors[static_cast<size_t>(compiled.equation->tensor)];
  for (size_t t = 0; t < compiled.nests.size(); ++t) {
    run_term(*compiled.nests[t], out, t == 0, !out.present.empty());
  }
}

namespace {

/// The reduction of one term over one block of elements.
struct Accumulator {
  double values[kLanes];
  uint8_t absent[kLanes];  // as an element

  void start(double identity, int lanes, std::span<const uint8_t> from) {
    std::fill(values, values + lanes, identity);
    std::fill(absent, absent + lanes, uint8_t{0});
    std::copy(from.begin(), from.end(), absent);
  }

  /// Four partial reductions, so that one does not wait for the other; lanes is at least 1.
  template <class Combine>
  static double reduced(const double* found, int lanes, Combine combine) {
    if (lanes < 8) {
      double total = found[0];
      for (int l = 1; l < lanes; ++l) total = combine(total, found[l]);
      return total;
    }
    double part[4] = {found[0], found[1], found[2], found[3]};
    int l = 4;
    for (; l + 4 <= lanes; l += 4) {
      for (int k = 0; k < 4; ++k) part[k] = combine(part[k], found[l + k]);
    }
    for (; l < lanes; ++l) part[0] = combine(part[0], found[l]);
    return combine(combine(part[0], part[1]), combine(part[2], part[3]));
  }

  template <class Combine>
  void add(const Nest& nest, int lanes, Combine combine) {
    const std::span<const uint8_t> gone = nest.absent();
    const double* found = nest.root().data;
    const bool plain = gone.empty() && !nest.root().uniform;
    if (plain && nest.vector_left()) {
      for (int l = 0; l < lanes; ++l) values[l] = combine(values[l], found[l]);
      return;
    }
    if (plain) {
      values[0] = combine(values[0], reduced(found, lanes, combine));
      return;
    }
    for (int l = 0; l < lanes; ++l) {
      const size_t i = static_cast<size_t>(l);
      const size_t to = nest.vector_left() ? i : 0;
      if (!gone.empty() && gone[i] != 0) {
        if ((gone[i] & kAbsentElement) != 0) absent[to] = 1;
        continue;
      }
      values[to] = combine(values[to], nest.value(l));
    }
  }
};

void add_point(Nest& nest, int lanes, Accumulator& acc) {
  if (!nest.compute(lanes)) {
    if ((nest.all_absent() & kAbsentElement) != 0) {
      std::fill(acc.absent, acc.absent + (nest.vector_left() ? lanes : 1), uint8_t{1});
    }
    return;
  }
  switch (nest.term().reduce) {
    case Reduce::max:
      return acc.add(nest, lanes, maximum);
    case Reduce::min:
      return acc.add(nest, lanes, minimum);
    default:
      return acc.add(nest, lanes, [](double a, double b) { return a + b; });
  }
}

}  // namespace

void Run::run_term(Nest& nest, TensorData& out, bool first, bool track) {
  Accumulator acc;
  const LoweredTerm& term = nest.term();
  nest.elements([&](const Nest::Block& block) {
    acc.start(identity(term.reduce), block.lanes, nest.block_absent());
    nest.points([&](int lanes, int64_t) { add_point(nest, lanes, acc); });
    for (int l = 0; l < block.lanes; ++l) {
      if (acc.absent[l] != 0) continue;
      const uint64_t at =
          block.offset + static_cast<uint64_t>(l) * static_cast<uint64_t>(block.stride);
      double& value = out.values[at];
      const double term_value = acc.values[l];
      value = first ? (term.minus ? -term_value : term_value)
                    : (term.minus ? subtract(value, term_value) : value + term_value);
      if (track) ++out.present[at];
    }
  });
}

/// Elements that every term reached are present; the others become the identity.
void Run::settle(const Compiled& compiled) {
  TensorData& data = frame_.tensors[static_cast<size_t>(compiled.equation->tensor)];
  if (data.present.empty()) return;
  const auto terms = static_cast<uint8_t>(compiled.nests.size());
  const double fill = identity(compiled.equation->terms[0].reduce);
  bool all = true;
  for (size_t i = 0; i < data.present.size(); ++i) {
    data.present[i] = data.present[i] == terms ? 1 : 0;
    if (data.present[i] == 0) data.values[i] = fill;
    all &= data.present[i] != 0;
  }
  const bool running = lowered_.tensor(compiled.equation->tensor).running >= 0;
  if (all && !running) data.present.clear();
}

/// The same for one step of a running rank, where an absent element keeps the state before it.
void Run::settle_step(const Compiled& compiled, int rank, int64_t step) {
  const int tensor = compiled.equation->tensor;
  TensorData& data = frame_.tensors[static_cast<size_t>(tensor)];
  if (data.present.empty()) return;
  const TensorInfo& info = lowered_.tensor(tensor);
  const auto terms = static_cast<uint8_t>(compiled.nests.size());
  const double fill = identity(compiled.equation->terms[0].reduce);
  const bool runs = info.running >= 0;
  const size_t axis = axis_of(info, rank);
  const auto inner = static_cast<size_t>(data.strides[axis]);
  const size_t block = inner * static_cast<size_t>(data.shape[axis]);
  const size_t at = inner * static_cast<size_t>(runs ? step + 1 : step);
  for (size_t outer = 0; block > 0 && outer < data.values.size(); outer += block) {
    for (size_t i = outer + at; i < outer + at + inner; ++i) {
      data.present[i] = data.present[i] == terms ? 1 : 0;
      if (data.present[i] != 0) continue;
      if (runs) {
        data.values[i] = data.values[i - inner];
        data.present[i] = data.present[i - inner];
        data.carried[i] = 1;
      } else {
        data.values[i] = fill;
      }
    }
  }
}

NdArray Run::array(int tensor) const {
  const TensorData& data = frame_.tensors[static_cast<size_t>(tensor)];
  return {data.shape, data.values};
}

}  // namespace heed::cascade
