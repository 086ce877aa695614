#include "cascade/functions.h"

namespace heed::cascade {

const Function* find_function(std::string_view name) {
  static constexpr Function kFunctions[] = {
      {"max", Op::max, 2},   {"min", Op::min, 2},       {"exp", Op::exp, 1},
      {"log", Op::log, 1},   {"tanh", Op::tanh, 1},     {"sigmoid", Op::sigmoid, 1},
      {"sqrt", Op::sqrt, 1}, {"cos", Op::cos, 1},       {"sin", Op::sin, 1},
      {"relu", Op::relu, 1}, {"gelu", Op::gelu, 1},     {"abs", Op::abs, 1},
      {"pow", Op::power, 2}, {"select", Op::select, 3},
  };
  for (const Function& f : kFunctions) {
    if (f.name == name) return &f;
  }
  return nullptr;
}

}  // namespace heed::cascade
