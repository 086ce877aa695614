#include <fmt/format.h>

#include "cascade/run.h"
#include "heed/error.h"

namespace heed::cascade {

Values evaluate(const Program& program, const Bindings& bindings,
                std::span<const std::string> also) {
  Run run(program, bindings);
  run.forward();
  Values values;
  const Lowered& lowered = run.lowered();
  for (size_t i = 0; i < lowered.tensors.size(); ++i) {
    if (lowered.tensors[i].output) values[lowered.tensors[i].name] = run.array(static_cast<int>(i));
  }
  for (const std::string& name : also) {
    const int tensor = lowered.find_tensor(name);
    if (tensor < 0) {
      throw Error(fmt::format("cascade {}: found no tensor {}, expected one of its lines",
                              lowered.name, name));
    }
    values[name] = run.array(tensor);
  }
  return values;
}

std::map<std::string, int64_t> sizes(const Program& program, const Bindings& bindings) {
  const Lowered& lowered = *program.ast().lowered;
  const std::vector<int64_t> values = bind_sizes(lowered, bindings);
  std::map<std::string, int64_t> result;
  for (size_t i = 0; i < values.size(); ++i) {
    const size_t n = lowered.ranks.size();
    result[i < n ? lowered.ranks[i].name : lowered.constants[i - n]] = values[i];
  }
  return result;
}

}  // namespace heed::cascade
