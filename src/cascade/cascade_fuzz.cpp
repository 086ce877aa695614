// Any text either parses or gives heed::Error. What parses prints to a text that reads back the
// same, can be counted, and runs forward and backward on invented bindings where the work is small.
#include <cmath>
#include <cstdlib>

#include "cascade/ast.h"
#include "cascade/cascade.h"
#include "cascade/lowered.h"
#include "heed/error.h"

namespace heed::cascade {
namespace {

Bindings invent(const Program& program) {
  Bindings bindings;
  const Lowered& lowered = *program.ast().lowered;
  for (size_t r = 0; r < lowered.ranks.size(); ++r) {
    const bool split = [&] {
      for (const Split& s : lowered.splits) {
        if (s.outer == static_cast<int>(r) || s.inner == static_cast<int>(r)) return true;
      }
      return false;
    }();
    if (lowered.ranks[r].size < 0 && !split) {
      bindings.sizes[lowered.ranks[r].name] = static_cast<int64_t>(1 + r % 3);
    }
  }
  for (const std::string& constant : lowered.constants) bindings.sizes[constant] = 2;
  for (const Callable& p : lowered.predicates) {
    bindings.predicates[p.name] = [](std::span<const int64_t> i) { return i[0] % 2 == 0; };
  }
  for (const Callable& f : lowered.functions) {
    bindings.indices[f.name] = [](std::span<const int64_t> i) { return i[0] / 2; };
  }
  const std::map<std::string, int64_t> known = sizes(program, bindings);
  for (const TensorInfo& t : lowered.tensors) {
    if (!t.input) continue;
    if (t.scalar) {
      bindings.scalars[t.name] = 0.5;
      continue;
    }
    NdArray array;
    size_t count = 1;
    for (const Axis& axis : t.axes) {
      const int64_t extent = axis.rank < 0 ? 2 : known.at(lowered.rank(axis.rank).name);
      array.shape.push_back(extent);
      count *= static_cast<size_t>(extent);
      if (count > 4096) throw Error("too large to try");
    }
    for (size_t i = 0; i < count; ++i) array.values.push_back(std::sin(static_cast<double>(i)));
    bindings.tensors[t.name] = std::move(array);
  }
  return bindings;
}

bool small(const Program& program, const std::map<std::string, int64_t>& sizes) {
  double work = 0;
  for (const LoweredStatement& s : program.ast().lowered->statements) {
    for (const LoweredTerm& t : s.main.terms) {
      double points = static_cast<double>(t.nodes.size());
      for (size_t r = 0; r < program.ast().lowered->ranks.size(); ++r) {
        if ((t.ranks & bit(static_cast<int>(r))) == 0) continue;
        points *= static_cast<double>(sizes.at(program.ast().lowered->ranks[r].name)) + 1;
      }
      work += points;
    }
  }
  return work < 20000;
}

void check(bool holds) {
  if (!holds) std::abort();
}

void try_text(std::string_view text) {
  const Program program = parse(text, "fuzz");
  const std::string printed = to_text(program);
  try {
    const Program again = parse(printed, "printed");
    check(same(program.ast(), again.ast()));
    check(to_text(again) == printed);
  } catch (const Error&) {
    std::abort();  // a printed text must parse
  }
  check(!to_latex(program).empty());
  check(!to_html(program).empty());
  check(!count(program).empty());
  for (const Rank& r : program.ast().lowered->ranks) count_passes(program, r.name);
  const Bindings bindings = invent(program);
  if (!small(program, sizes(program, bindings))) return;
  const Values outputs = evaluate(program, bindings);
  const Values gradients = gradient(program, bindings, outputs);
  check(gradients.size() == program.inputs().size());
}

}  // namespace
}  // namespace heed::cascade

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    heed::cascade::try_text({reinterpret_cast<const char*>(data), size});
  } catch (const heed::Error&) {
    // The expected answer to a wrong text.
  }
  return 0;
}
