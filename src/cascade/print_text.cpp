// The text of a program: one form for every program, which parses back to the same.
#include <algorithm>

#include "cascade/cascade.h"
#include "cascade/lowered.h"
#include "cascade/print.h"

namespace heed::cascade {
namespace {

class TextNotation : public Notation {
 public:
  std::string name(const std::string& n) const override { return n; }
  std::string number(double value) const override { return number_text(value); }
  std::string function(const std::string& n) const override { return n; }
  std::string indexed(const std::string& n, const std::string& indices) const override {
    return n + "[" + indices + "]";
  }
  std::string index_call(const std::string& n, const std::string& args) const override {
    return n + "(" + args + ")";
  }
  std::string comma() const override { return ","; }
  std::string sign(char op) const override { return op == ' ' ? " " : std::string(" ") + op + " "; }
  std::string index_sign(char op) const override { return std::string(1, op); }
  std::string compare(Compare how) const override {
    static constexpr const char* kSigns[] = {" < ", " <= ", " > ", " >= ", " == ", " != "};
    return kSigns[static_cast<int>(how)];
  }
  std::string brackets(const std::string& inside) const override { return "(" + inside + ")"; }
  std::string fraction(const std::string& above, const std::string& below) const override {
    return above + " / " + below;
  }
  bool fraction_brackets() const override { return true; }
  std::string power(const std::string& base, const std::string& exponent) const override {
    return base + "^" + exponent;
  }
  bool power_brackets() const override { return true; }
  std::string reduction(Reduce reduce, const std::string&) const override {
    switch (reduce) {
      case Reduce::sum:
        return "sum ";
      case Reduce::max:
        return "max ";
      case Reduce::min:
        return "min ";
      default:
        return "";
    }
  }
};

class TextPrinter {
 public:
  explicit TextPrinter(const Ast& ast) : ast_(ast), writer_(ast, notation_) {}

  std::string one(const Line& l) const { return line(l); }

  std::string run() {
    comments(ast_.header);
    finish("cascade " + ast_.name, ast_.header_after);
    bool declarations = true;
    for (const Line& line : ast_.lines) {
      const bool statement = line.kind == Line::Kind::statement;
      if (statement && declarations) text_ += "\n";
      declarations = !statement;
      comments(line.before);
      finish(this->line(line), line.after);
    }
    comments(ast_.footer);
    return std::move(text_);
  }

 private:
  void comments(const std::vector<std::string>& lines) {
    for (const std::string& c : lines) text_ += c.empty() ? "#\n" : "# " + c + "\n";
  }
  void finish(const std::string& body, const std::string& comment) {
    text_ += body;
    if (!comment.empty()) text_ += "  # " + comment;
    text_ += "\n";
  }

  template <class T, class F>
  std::string list(const Line& line, const char* word, const std::vector<T>& all, F each) const {
    std::string text = word;
    for (int i = line.first; i < line.first + line.count; ++i) {
      text += " " + each(all[static_cast<size_t>(i)]);
    }
    return text;
  }

  std::string line(const Line& line) const {
    const size_t first = static_cast<size_t>(line.first);
    switch (line.kind) {
      case Line::Kind::batch:
      case Line::Kind::rank:
        return ranks(line);
      case Line::Kind::size:
        return list(line, "size", ast_.sizes, [](const SizeDeclaration& s) { return s.name; });
      case Line::Kind::split:
        return split(ast_.splits[first]);
      case Line::Kind::input:
        return inputs(line);
      case Line::Kind::predicate:
        return predicates(line);
      case Line::Kind::function:
        return function(ast_.functions[first]);
      case Line::Kind::statement:
        break;
    }
    return statement(line.first);
  }

  std::string ranks(const Line& line) const {
    const char* word = line.kind == Line::Kind::batch ? "batch" : "rank";
    return list(line, word, ast_.ranks, [&](const RankDeclaration& r) {
      return r.size < 0 ? r.name : r.name + " = " + writer_.index(r.size);
    });
  }

  static std::string split(const SplitDeclaration& s) {
    const std::string block = s.block.empty() ? std::to_string(s.block_number) : s.block;
    return "split " + s.parent + " = " + s.outer + " * " + block + " + " + s.inner;
  }

  std::string inputs(const Line& line) const {
    return list(line, "in", ast_.inputs, [&](const InputDeclaration& in) {
      return writer_.input(in) + (in.has_default ? " = " + number_text(in.fallback) : "");
    });
  }

  std::string predicates(const Line& line) const {
    return list(line, "where", ast_.predicates, [](const PredicateDeclaration& p) {
      std::string args;
      for (const std::string& r : p.ranks) args += (args.empty() ? "" : ",") + r;
      return p.name + "(" + args + ")";
    });
  }

  std::string function(const FunctionDeclaration& f) const {
    std::string args;
    for (const std::string& p : f.parameters) args += (args.empty() ? "" : ",") + p;
    return "let " + f.name + "(" + args + ") = " + writer_.sum(f.body);
  }

  std::string equation(int s, const Equation& e, bool initial) const {
    std::string right = writer_.right_side(e, reduced_ranks(ast_, s, initial));
    std::string text = writer_.left_side(e) + " = " + right;
    for (size_t i = 0; i < e.filters.size(); ++i) {
      text += (i == 0 ? " : " : ", ") + writer_.filter(e.filters[i]);
    }
    return text;
  }

  std::string statement(int s) const {
    const Statement& st = ast_.statements[static_cast<size_t>(s)];
    std::string text = (st.output ? "out " : "") + equation(s, st.main, false);
    if (st.has_initial) text += " ; " + equation(s, st.initial, true);
    return text;
  }

  const Ast& ast_;
  TextNotation notation_;
  Writer writer_;
  std::string text_;
};

}  // namespace

std::string line_text(const Ast& ast, const Line& line) { return TextPrinter(ast).one(line); }

std::string to_text(const Program& program) { return TextPrinter(program.ast()).run(); }

}  // namespace heed::cascade
