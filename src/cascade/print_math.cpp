// Programs for people: LaTeX (an aligned environment) and HTML (a table that needs no style sheet).
#include <cctype>
#include <cmath>

#include "cascade/cascade.h"
#include "cascade/functions.h"
#include "cascade/lowered.h"
#include "cascade/print.h"

namespace heed::cascade {
namespace {

/// "m1" is m with subscript 1: the letters and the digits at the end of a name.
std::pair<std::string, std::string> stem_and_digits(const std::string& name) {
  size_t n = name.size();
  while (n > 0 && std::isdigit(static_cast<unsigned char>(name[n - 1])) != 0) --n;
  return {name.substr(0, n), name.substr(n)};
}

std::string replaced(const std::string& text,
                     std::initializer_list<std::pair<char, const char*>> table) {
  std::string result;
  for (char c : text) {
    const char* with = nullptr;
    for (const auto& [from, to] : table) {
      if (c == from) with = to;
    }
    if (with != nullptr) {
      result += with;
    } else {
      result += c;
    }
  }
  return result;
}

std::string latex_text(const std::string& text) {
  return replaced(text, {{'\\', "\\textbackslash{}"},
                         {'_', "\\_"},
                         {'&', "\\&"},
                         {'%', "\\%"},
                         {'#', "\\#"},
                         {'$', "\\$"},
                         {'{', "\\{"},
                         {'}', "\\}"},
                         {'^', "\\textasciicircum{}"},
                         {'~', "\\textasciitilde{}"}});
}

std::string html_text(const std::string& text) {
  return replaced(text, {{'&', "&amp;"}, {'<', "&lt;"}, {'>', "&gt;"}, {'"', "&quot;"}});
}

class LatexNotation : public Notation {
 public:
  std::string name(const std::string& n) const override {
    if (n == "inf") return "\\infty ";
    if (n == "pi") return "\\pi ";
    const auto [stem, digits] = stem_and_digits(n);
    std::string text = stem.size() == 1 ? stem : "\\mathrm{" + latex_text(stem) + "}";
    if (stem == "_") text = "\\_";
    return digits.empty() ? text : text + "_{" + digits + "}";
  }
  std::string number(double value) const override { return number_text(value); }
  std::string function(const std::string& n) const override {
    if (n == "exp" || n == "log" || n == "max" || n == "min" || n == "cos" || n == "sin" ||
        n == "tanh") {
      return "\\" + n;
    }
    return "\\operatorname{" + latex_text(n) + "}";
  }
  std::string indexed(const std::string& n, const std::string& indices) const override {
    return "{" + name(n) + "}_{" + indices + "}";
  }
  std::string index_call(const std::string& n, const std::string& args) const override {
    return "\\operatorname{" + latex_text(n) + "}(" + args + ")";
  }
  std::string comma() const override { return ","; }
  std::string sign(char op) const override {
    if (op == ' ') return "\\,";
    return op == '*' ? "\\," : std::string(" ") + op + " ";
  }
  std::string index_sign(char op) const override { return op == '*' ? "\\," : std::string(1, op); }
  std::string compare(Compare how) const override {
    static constexpr const char* kSigns[] = {" < ", " \\le ", " > ", " \\ge ", " = ", " \\ne "};
    return kSigns[static_cast<int>(how)];
  }
  std::string brackets(const std::string& inside) const override {
    return "\\left(" + inside + "\\right)";
  }
  std::string fraction(const std::string& above, const std::string& below) const override {
    return "\\frac{" + above + "}{" + below + "}";
  }
  bool fraction_brackets() const override { return false; }
  std::string power(const std::string& base, const std::string& exponent) const override {
    return "{" + base + "}^{" + exponent + "}";
  }
  bool power_brackets() const override { return false; }
  std::string reduction(Reduce reduce, const std::string& ranks) const override {
    if (ranks.empty()) return "";
    std::string list;
    for (size_t at = 0; at <= ranks.size();) {
      const size_t end = std::min(ranks.find(',', at), ranks.size());
      list += (at > 0 ? "," : "") + name(ranks.substr(at, end - at));
      at = end + 1;
    }
    const char* symbol = reduce == Reduce::max   ? "\\max"
                         : reduce == Reduce::min ? "\\min"
                                                 : "\\sum";
    return std::string(symbol) + "_{" + list + "} ";
  }
};

class HtmlNotation : public Notation {
 public:
  std::string name(const std::string& n) const override {
    if (n == "inf") return "∞";
    if (n == "pi") return "π";
    const auto [stem, digits] = stem_and_digits(n);
    const std::string text = "<i>" + stem + "</i>";
    return digits.empty() || stem.empty() ? text : text + "<sub>" + digits + "</sub>";
  }
  std::string number(double value) const override { return number_text(value); }
  std::string function(const std::string& n) const override { return html_text(n); }
  std::string indexed(const std::string& n, const std::string& indices) const override {
    return "<b>" + n + "</b><sub>" + indices + "</sub>";
  }
  std::string index_call(const std::string& n, const std::string& args) const override {
    return n + "(" + args + ")";
  }
  std::string comma() const override { return ","; }
  std::string sign(char op) const override {
    if (op == ' ') return " ";
    return op == '*' ? " · " : op == '-' ? " − " : std::string(" ") + op + " ";
  }
  std::string index_sign(char op) const override {
    return op == '*' ? "·" : op == '-' ? "−" : std::string(1, op);
  }
  std::string compare(Compare how) const override {
    static constexpr const char* kSigns[] = {" &lt; ", " ≤ ", " &gt; ", " ≥ ", " = ", " ≠ "};
    return kSigns[static_cast<int>(how)];
  }
  std::string brackets(const std::string& inside) const override { return "(" + inside + ")"; }
  std::string fraction(const std::string& above, const std::string& below) const override {
    return above + " / " + below;
  }
  bool fraction_brackets() const override { return true; }
  std::string power(const std::string& base, const std::string& exponent) const override {
    return base + "<sup>" + exponent + "</sup>";
  }
  bool power_brackets() const override { return false; }
  std::string reduction(Reduce reduce, const std::string& ranks) const override {
    if (ranks.empty()) return "";
    std::string list;
    for (size_t at = 0; at <= ranks.size();) {
      const size_t end = std::min(ranks.find(',', at), ranks.size());
      list += (at > 0 ? "," : "") + ranks.substr(at, end - at);
      at = end + 1;
    }
    const char* symbol = reduce == Reduce::max ? "max" : reduce == Reduce::min ? "min" : "Σ";
    return std::string(symbol) + "<sub>" + list + "</sub> ";
  }
};

std::string filters(const Equation& e, const Writer& writer) {
  std::string text;
  for (const Filter& f : e.filters) text += (text.empty() ? "" : ", ") + writer.filter(f);
  return text;
}

std::string latex_equation(const Ast& ast, int s, const Equation& e, bool initial,
                           const Writer& writer, const char* align) {
  std::string text = writer.left_side(e) + " " + align + "= " +
                     writer.right_side(e, reduced_ranks(ast, s, initial));
  const std::string kept = filters(e, writer);
  if (!kept.empty()) text += " \\quad\\text{where } " + kept;
  return text;
}

std::string declared(const Ast& ast, const Line& line, const Writer& writer) {
  std::string text;
  for (int i = line.first; i < line.first + line.count; ++i) {
    text += (text.empty() ? "" : "  ") + writer.input(ast.inputs[static_cast<size_t>(i)]);
  }
  return text;
}

}  // namespace

std::string to_latex(const Program& program) {
  const Ast& ast = program.ast();
  const LatexNotation notation;
  const Writer writer(ast, notation);
  std::string text = "\\begin{aligned}\n";
  bool first = true;
  for (const Line& line : ast.lines) {
    if (line.kind != Line::Kind::statement) continue;
    const Statement& s = ast.statements[static_cast<size_t>(line.first)];
    if (!first) text += " \\\\\n";
    first = false;
    text += latex_equation(ast, line.first, s.main, false, writer, "&");
    if (s.has_initial) {
      text += ", \\quad " + latex_equation(ast, line.first, s.initial, true, writer, "");
    }
    if (!line.after.empty()) text += " &&\\text{" + latex_text(line.after) + "}";
  }
  return text + "\n\\end{aligned}\n";
}

std::string to_html(const Program& program) {
  const Ast& ast = program.ast();
  const HtmlNotation notation;
  const Writer writer(ast, notation);
  std::string text = "<table class=\"cascade\">\n<caption>" + html_text(ast.name);
  for (const std::string& c : ast.header) text += "<br>" + html_text(c);
  text += "</caption>\n";
  const auto row = [&](const std::string& left, const std::string& right,
                       const std::string& comment) {
    text += "<tr><td style=\"text-align:right\">" + left + "</td><td>" + right + "</td><td>" +
            html_text(comment) + "</td></tr>\n";
  };
  const auto equation = [&](const Equation& e, int s, bool initial) {
    std::string right = "= " + writer.right_side(e, reduced_ranks(ast, s, initial));
    const std::string kept = filters(e, writer);
    return kept.empty() ? right : right + " where " + kept;
  };
  for (const Line& line : ast.lines) {
    if (line.kind == Line::Kind::input) {
      row("in", declared(ast, line, writer), line.after);
      continue;
    }
    if (line.kind != Line::Kind::statement) {
      const std::string declaration = line_text(ast, line);
      const size_t space = declaration.find(' ');
      row(declaration.substr(0, space), html_text(declaration.substr(space + 1)), line.after);
      continue;
    }
    const Statement& s = ast.statements[static_cast<size_t>(line.first)];
    std::string right = equation(s.main, line.first, false);
    if (s.has_initial) {
      right += "; " + writer.left_side(s.initial) + " " + equation(s.initial, line.first, true);
    }
    row((s.output ? "out " : "") + writer.left_side(s.main), right, line.after);
  }
  return text + "</table>\n";
}

}  // namespace heed::cascade
