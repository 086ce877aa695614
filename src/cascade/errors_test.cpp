// Broken texts: where the error stands and what it says was expected.
#include "cascade/ast.h"
#include "cascade/test_support.h"
#include "heed/error.h"

namespace heed::cascade {
namespace {

struct Broken {
  const char* text;
  const char* where;  // "line:column"
  const char* says;
};

std::string error_of(const std::string& text) {
  try {
    parse(text, "x.cascade");
  } catch (const Error& e) {
    return e.what();
  }
  return "no error";
}

void expect_errors(const std::string& head, const std::vector<Broken>& table) {
  for (const Broken& broken : table) {
    const std::string found = error_of(head + broken.text);
    const std::string where = std::string("x.cascade:") + broken.where + ": found ";
    EXPECT_EQ(found.substr(0, where.size()), where) << broken.text << "\n" << found;
    EXPECT_NE(found.find(broken.says), std::string::npos) << broken.text << "\n" << found;
    EXPECT_NE(found.find("expected"), std::string::npos) << broken.text << "\n" << found;
  }
}

TEST(Errors, Texts) {
  expect_errors(
      "", {
              {"", "1:1", "found the end of the text, expected 'cascade'"},
              {"rank p", "1:1", "found 'rank', expected 'cascade'"},
              {"cascade", "1:8", "found the end of the line, expected the name of the cascade"},
              {"cascade 7", "1:9", "found '7', expected the name"},
              {"cascade t x", "1:11", "found 'x', expected the end of the line"},
              {"cascade t\nrank p\n", "3:1", "expected a statement"},
              {"cascade t\n  @", "2:3", "found '@', expected a name"},
              {"cascade t\n\n\xc3", "3:1", "found '\\xc3'"},
              {"cascade t\nrank 3p", "2:6", "found '3p', expected a number or a name"},
              {"cascade t\nrank\n", "2:5", "found the end of the line, expected a name"},
              {"cascade t\nrank sum", "2:6", "found 'sum', a word of the language"},
              {"cascade t\nrank log", "2:6", "found 'log', a word of the language"},
              {"cascade t\n+ 3", "2:1", "found '+', expected a declaration or a statement"},
          });
}

TEST(Errors, Declarations) {
  expect_errors(
      "cascade t\n",
      {
          {"rank p p\nout X[p] = p", "2:8", "found 'p', already the name of a rank"},
          {"rank p\nin p[p]\nout X[p] = p", "3:4", "already the name of a rank"},
          {"rank p\nin A[q]\nout X[p] = A[p]", "3:6", "found 'q', expected a rank (p)"},
          {"rank p\nin A[p+1]\nout X[p] = A[p]", "3:7", "expected a rank or an index function"},
          {"rank p\nin A[p", "3:7", "expected ',' or ']'"},
          {"rank p\nin A[p] = x", "3:11", "found 'x', expected a number"},
          {"rank p\nin A[p] = 1e999", "3:11", "expected a number that float64 can hold"},
          {"rank p = q\nout X[p] = p", "2:10", "found 'q', expected a rank"},
          {"rank q p = q\nout X[p] = p", "2:12", "found a rank in the size of a rank"},
          {"rank p\nsplit q = a * B + c\nout X[p] = p", "3:7",
           "found 'q', expected a rank to split: p"},
          {"rank p\nsplit p = a + c", "3:13", "found '+', expected '*'"},
          {"rank p\nsplit p = a * 0 + c\nout X[p] = p", "3:15",
           "found 0, expected a block of at least 1"},
          {"rank p\nsplit p = a * B + p\nout X[p] = p", "3:19",
           "found 'p', already the name of a rank"},
          {"rank p\nsplit p = a * B + c\nsplit p = a * C + d\nout X[p] = p", "4:15",
           "found another block"},
          {"rank p\nwhere keep(q)\nout X[p] = p", "3:12", "found 'q', expected a rank: p"},
          {"rank p\nwhere keep()", "3:12", "found ')', expected a rank"},
          {"rank p = 99999999999", "2:10", "a whole number up to"},
      });
}

TEST(Errors, Statements) {
  expect_errors(
      "cascade t\nrank p m\nsplit m = m1 * M0 + m0\nin A[p,m] B[p] s\nwhere keep(p,m)\n"
      "let f(x) = x + s\n",
      {
          {"X[p] = B[p]", "7:1", "found no output, expected 'out'"},
          {"out X[p] = B[q]", "7:14", "found 'q', expected a rank (p, m, m1, m0)"},
          {"out X[q] = B[p]", "7:7", "found 'q', expected a rank"},
          {"out X[p] = C[p]", "7:12", "expected a tensor: no line defines 'C'"},
          {"out X[p] = c", "7:12", "found 'c', expected a tensor, a scalar, a rank"},
          {"out X[p] = A[p]", "7:12", "found 1 indices of 'A', expected [p,m]"},
          {"out X[p] = B", "7:12", "found 0 indices of 'B', expected [p]"},
          {"out X[p] = s[p]", "7:12", "found 1 indices of 's', expected []"},
          {"out X[p,m] = B[p]", "7:9",
           "found rank 'm' on the left, which nothing on the right binds"},
          {"out X[m1,m0] = A[0,m]", "7:7", "found rank 'm1' on the left"},
          {"out X[p,p] = A[p,p]", "7:9", "found a rank twice on the left side"},
          {"out X[2*p] = B[p]", "7:8", "found an expression on the left side"},
          {"out X[p] = sum B[p]", "7:12", "found a reduction over nothing"},
          {"out X[p] = exp(sum A[p,m])", "7:16", "found the reduction 'sum' inside an expression"},
          {"out X[p] = B[p*p]", "7:15", "found a product of two ranks or index functions"},
          {"out X[p] = B[g(0)*p]", "7:18", "found a product of two ranks or index functions"},
          {"out X = B[g(0)*(1+g(1))]", "7:15", "found a product of two ranks or index functions"},
          {"out X[p] = B[p] B[p]", "7:17", "found 'B', expected the end of the line"},
          {"out X[p] = (B[p]", "7:17", "expected ')'"},
          {"out X[p] = B[p] *", "7:18", "expected a value"},
          {"out X[p] = ", "7:12", "expected a value"},
          {"out X[p] B[p]", "7:10", "found 'B', expected '='"},
          {"out X[p] = exp(B[p], s)", "7:12", "found 2 arguments of 'exp', expected 1"},
          {"out X[p] = f(B[p], s)", "7:12", "found 2 arguments of 'f', expected 1"},
          {"out X[p] = h(B[p])", "7:12", "found 'h(', expected a function"},
          {"out X[p] = B[g(p)] + B[g(p,p)]", "7:24", "found 2 arguments of the index function 'g'"},
          {"out X[p] = select(B[p] > 0, B[p])", "7:12",
           "found 2 arguments of 'select', expected 3"},
          {"out X[p] = abs(B[p] > 0)", "7:21", "found '>', expected ')'"},
          {"out X[p] = B[p] : seen", "7:19", "found 'seen', expected a predicate"},
          {"out X[p] = B[p] : keep", "7:19", "found a filter on 'm', which no term"},
          {"out X[p] = B[p] : keep(p)", "7:19", "found 1 arguments of 'keep', expected 2"},
          {"out X[p] = B[p] : p + 1", "7:24", "expected one of < <= > >= == !="},
          {"out X[p] = B[p]\nX[p] = B[p]", "8:1", "found 'X', already the name of a tensor"},
          {"out X[p] = Y[p]\nY[p] = B[p]", "7:12",
           "found 'Y' before its definition in line 8, expected"},
          {"out X[p] = Y[p]\nY[p] = X[p]", "7:12", "before its definition in line 8, a cycle"},
          {"out X[p] = X[p]", "7:12", "found 'X' in its own definition, a cycle"},
          {"out R[p+1] = R[p] + B[p]", "7:5", "found the running tensor 'R' without a start"},
          {"out R[p] = B[p] ; R[0] = 0", "7:19", "found a start of 'R'"},
          {"out R[p+1] = R[p] + B[p] ; R[1] = 0", "7:30", "found another index, expected 0"},
          {"out R[m+1,p] = R[m,p] + A[p,m] ; R[0,m1*M0+m0] = A[0,m]", "7:43",
           "found another index, expected p"},
          {"out R[p+1] = R[p] + B[p] ; Q[0] = 0", "7:28", "found 'Q', expected the start of 'R'"},
          {"out R[p+1] = R[p] + B[p] ; R = 0", "7:28", "found 0 indices, expected 1"},
          {"out R[p+1] = R[p+1] + B[p] ; R[0] = 0", "7:14", "found 'R' ahead of its running rank"},
          {"out R[p+1] = R[P] + B[p] ; R[0] = 0", "7:14", "found 'R' ahead of its running rank"},
          {"out R[p+1,m+1] = R[p,m] + A[p,m] ; R[0,0] = 0", "7:12", "found a second running rank"},
          {"out R[p+2] = R[p] + B[p] ; R[0] = 0", "7:8", "found an expression on the left side"},
          {"out R[p+1] = R[p] ; R[0] = R[1]", "7:28", "in its own definition, a cycle"},
      });
}

TEST(Errors, ParametersOfFunctions) {
  expect_errors("cascade t\nrank p m\nin A[p,m]\n",
                {
                    {"let f(x,y) = 2 * x\nout X[p] = f(A[p,0], A[p,m])", "4:9",
                     "found the parameter 'y', which 'f' does not use"},
                    {"let f(x,x) = 2 * x\nout X[p] = f(A[p,0], A[p,m])", "4:9",
                     "found the parameter 'x' twice"},
                });
}

TEST(Errors, LinesThatRunTogether) {
  expect_errors(
      "cascade t\nrank p m\nin A[p,m] B[p]\n",
      {
          {"Y[p] = R[p] * 2\nZ[m] = sum A[p,m]\nR[p+1] = R[p] + Y[p] ; R[0] = 0\nout X = R[P]",
           "5:1", "found 'Z' between lines that run together along 'p'"},
          {"Y[p] = R[p] * 2\nZ[p] = Y[p+1]\nR[p+1] = R[p] + Z[p] ; R[0] = 0\nout X = R[P]", "5:8",
           "found 'Y' read at another place of 'p'"},
          {"Y[p] = R[p] * 2\nR[p+1] = R[p] + Y[p] ; R[0] = Y[0]\nout X = R[P]", "5:31",
           "found 'Y' in a start"},
          {"Y[p] = R[p+1] * 2\nR[p+1] = R[p] + Y[p] ; R[0] = 0\nout X = R[P]", "4:8",
           "found 'R' ahead of its running rank"},
      });
}

TEST(Errors, BatchRanks) {
  expect_errors(
      "cascade t\nbatch b h\nrank p\nin A[b,h,p] W[h]\n",
      {
          {"out X[h,p] = A[p]", "5:5", "without the batch rank 'b'"},
          {"out X[p] = A[p] * W[h]", "5:5",
           "found the batch rank 'h' written in one place and left out"},
          {"out X[p] = A[h,p]", "5:12", "expected [b,h,p] with all batch ranks or with none"},
      });
}

TEST(Errors, HostileTextsEndInAnError) {
  const auto repeat = [](const std::string& text, int n) {
    std::string result;
    for (int i = 0; i < n; ++i) result += text;
    return result;
  };
  const std::string head = "cascade t\nrank p\nin A[p]\n";
  for (const std::string& text : {
           head + "out X[p] = " + repeat("(", 100000) + "A[p]" + repeat(")", 100000),
           head + "out X[p] = " + repeat("-", 100000) + "A[p]",
           head + "out X[p] = A[p]" + repeat("^A[p]", 50000),
           head + "out X[p] = A[p]" + repeat("*A[p]", 50000),
           head + "out X[p] = A[p]" + repeat("+A[p]", 50000),
           head + "out X[p] = (A[p]" + repeat("+A[p]", 50000) + ")",
           head + "out X[p] = " + repeat("log ", 100000) + "A[p]",
           head + "out X[p] = A[" + repeat("(", 100000) + "p" + repeat(")", 100000) + "]",
           head + "out X[p] = A[" + repeat("g(", 100000) + "p" + repeat(")", 100000) + "]",
           head + "out X[p] = A[p" + repeat("+p", 50000) + "]",
           head + "out X[p" + repeat(",p", 50000) + "] = A[p]",
           head + repeat("X", 100) + "[p] = A[p]",
           head + "let f(x) = f(x)\nout X[p] = f(A[p])",
           head + "let f(x) = g(x)\nlet g(x) = f(x)\nout X[p] = f(A[p])",
           std::string(1 << 21, ' '),
       }) {
    const std::string found = error_of(text);
    EXPECT_NE(found, "no error") << text.substr(0, 60);
    EXPECT_NE(found.find("expected"), std::string::npos) << found;
  }
  // Functions that double twenty times, with and without operations of their own.
  for (const char* body : {"(f%(x) + f%(x))", "f%(f%(x))"}) {
    std::string text = head + "let f0(x) = x\n";
    for (int i = 1; i <= 24; ++i) {
      std::string line = body;
      for (size_t at; (at = line.find('%')) != std::string::npos;) {
        line.replace(at, 1, std::to_string(i - 1));
      }
      text += "let f" + std::to_string(i) + "(x) = " + line + "\n";
    }
    EXPECT_NE(error_of(text + "out X[p] = f24(A[p])").find("operations once its functions"),
              std::string::npos);
  }
  std::string many = head;
  for (int i = 0; i < 2000; ++i) many += "out X" + std::to_string(i) + "[p] = A[p]\n";
  EXPECT_NE(error_of(many).find("found statement 1001"), std::string::npos);
  // Many parts that are small one by one.
  std::string doubled = head + "let f0(x) = x + x\n";
  for (int i = 1; i < 12; ++i) {
    const std::string f = "f" + std::to_string(i - 1);
    doubled += "let f" + std::to_string(i) + "(x) = " + f + "(x) + " + f + "(x)\n";
  }
  for (int i = 0; i < 900; ++i) doubled += "out X" + std::to_string(i) + "[p] = f11(A[p])\n";
  EXPECT_NE(error_of(doubled).find("operations and filters in all"), std::string::npos);
  EXPECT_NE(error_of(head + "out X[p] = A[p] : " + repeat("0 < 1, ", 100) + "0 < 1")
                .find("found '0', expected at most 100 filters"),
            std::string::npos);
  const std::string terms =
      "[p] = A[p]" + repeat("+A[p]", 99) + " : p < 1" + repeat(",0<1", 99) + "\n";
  std::string filtered = head;
  for (int i = 0; i < 20; ++i) filtered += "out X" + std::to_string(i) + terms;
  EXPECT_NE(error_of(filtered).find("operations and filters in all"), std::string::npos);
  std::string predicates = head + "where", functions = head, indices = head;
  for (int i = 0; i < 1001; ++i) {
    const std::string n = std::to_string(i);
    predicates += " k" + n + "(p)";
    functions += "let f" + n + "(x) = x\n";
    indices += (i % 50 == 0 ? "\nout X" + n + "[p] = A[g" : " + A[g") + n + "(p)]";
  }
  EXPECT_NE(error_of(predicates).find("found predicate 1001"), std::string::npos);
  EXPECT_NE(error_of(functions).find("found function 1001"), std::string::npos);
  EXPECT_NE(error_of(indices).find("found index function 1001"), std::string::npos);
  std::string ranks = "cascade t\nrank";
  for (int i = 0; i < 65; ++i) ranks += " r" + std::to_string(i);
  EXPECT_NE(error_of(ranks + "\nout X = r0").find("found rank 65"), std::string::npos);
}

}  // namespace
}  // namespace heed::cascade
