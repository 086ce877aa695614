// The functions of the language.
#pragma once
#include <string_view>

namespace heed::cascade {

enum class Op {
  constant,
  load,   // an element of a tensor
  index,  // an integer expression as a value
  negate,
  add,
  subtract,
  multiply,
  divide,
  power,
  max,
  min,
  exp,
  log,
  tanh,
  sigmoid,
  sqrt,
  cos,
  sin,
  relu,
  gelu,
  abs,
  select,  // (left, right, yes, no) with a comparison
};

struct Function {
  std::string_view name;
  Op op;
  int arity;
};

/// The built-in function of this name, or nullptr.
const Function* find_function(std::string_view name);

}  // namespace heed::cascade
