// The cascade language: a mechanism written as a sequence of extended Einsums, read by people, run
// in float64 as the reference (value and gradient), analysed for passes and counted for cost.
// Source: FuseMax, arXiv 2406.10491 (extended Einsums, passes). Grammar: docs/cascade-language.md.
#pragma once
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace heed::cascade {

/// A dense row-major float64 array of any rank.
struct NdArray {
  std::vector<int64_t> shape;
  std::vector<double> values;
};

struct Ast;  // ast.h

/// A parsed, checked cascade. Cheap to copy.
class Program {
 public:
  explicit Program(std::shared_ptr<const Ast> ast) : ast_(std::move(ast)) {}
  const Ast& ast() const { return *ast_; }
  const std::string& name() const;
  std::vector<std::string> inputs() const;   // tensors and scalars, in declaration order
  std::vector<std::string> outputs() const;  // in declaration order

 private:
  std::shared_ptr<const Ast> ast_;
};

/// Throws heed::Error "file:line:column: found ..., expected ...".
Program parse(std::string_view text, std::string_view file = "cascade");

/// What a case supplies to a program. Index tuples arrive in the order written in the text.
struct Bindings {
  std::map<std::string, int64_t> sizes;  // ranks and split constants (m, M0); ranks that an
                                         // input's shape determines may be left out
  std::map<std::string, NdArray> tensors;
  std::map<std::string, double> scalars;
  std::map<std::string, std::function<bool(std::span<const int64_t>)>> predicates;  // keep(p,m)
  std::map<std::string, std::function<int64_t(std::span<const int64_t>)>> indices;  // g(h)
};

using Values = std::map<std::string, NdArray>;

/// Runs the program and returns its outputs; `also` names intermediates to return besides.
Values evaluate(const Program& program, const Bindings& bindings,
                std::span<const std::string> also = {});

/// Sizes of all ranks and constants of this case, those of split ranks included.
std::map<std::string, int64_t> sizes(const Program& program, const Bindings& bindings);

/// Reverse mode: given d(loss)/d(output) for some outputs, returns d(loss)/d(input) for every
/// input tensor and scalar (scalars as rank-0 arrays).
Values gradient(const Program& program, const Bindings& bindings, const Values& output_gradients);

/// Passes over a rank family (FuseMax, section III): `rank` names a rank or a split rank's parent.
struct PassReport {
  struct Row {
    std::string tensor;
    int pass = 0;  // the pass it runs in (1-based); 0 = does not touch the rank
    int line = 0;
  };
  int passes = 0;
  std::vector<Row> rows;  // one per statement
};
PassReport count_passes(const Program& program, std::string_view rank);

/// A polynomial in the names of ranks, those of splits among them.
class Polynomial {
 public:
  std::map<std::vector<std::string>, double>
      terms;  // sorted rank names (repeats = powers) -> coefficient
  double at(const std::map<std::string, int64_t>& sizes) const;
  std::string text() const;  // "2*b*h*p*m*e"
};

/// Operations and traffic of one statement over its whole iteration space (masks not subtracted).
struct StatementCount {
  std::string tensor;
  int line = 0;
  Polynomial multiply_adds, exponentials, divisions, maxima, other;
  Polynomial additions;      // the multiply-adds among them that have no product
  Polynomial reads, writes;  // elements
  Polynomial live_after;     // elements alive between this statement and the next
};
std::vector<StatementCount> count(const Program& program);

std::string to_text(const Program& program);  // parses back to the same program
std::string to_latex(const Program& program);
std::string to_html(const Program& program);

}  // namespace heed::cascade
