// What the commands print with: colours where a person reads, tables, numbers, a progress bar.
#pragma once
#include <fmt/format.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace heed::cli {

using Json = nlohmann::ordered_json;

/// True where a person reads the stream and has not set NO_COLOR.
bool coloured(std::FILE* stream);
bool is_terminal(std::FILE* stream);
/// True for a terminal that understands escape sequences.
bool draws_on(std::FILE* stream);

std::string bold(std::string_view text);  // for standard output
std::string green(std::string_view text);
std::string red(std::string_view text);

/// Prints on standard error; what cannot be written there is lost, and nothing else.
template <class... Args>
void say(fmt::format_string<Args...> text, Args&&... args) {
  std::fputs(fmt::format(text, std::forward<Args>(args)...).c_str(), stderr);
}
/// Hands standard output over to its reader. Throws when it cannot be written.
void flush_output();

/// Prints one JSON value and a newline; bytes that are not UTF-8 become U+FFFD.
void print_json(const Json& json);
/// The number for JSON, null where it is not finite (JSON has no infinity).
Json finite_or_null(double value);

/// "1.23e-05": `digits` significant ones.
std::string short_number(double value, int digits = 3);
std::string bytes_text(int64_t bytes);  // "32 KiB"

/// Columns as wide as their longest cell, numbers to the right.
class Table {
 public:
  enum class Align { left, right };
  struct Column {
    std::string header;
    Align align = Align::left;
  };
  explicit Table(std::vector<Column> columns) : columns_(std::move(columns)) {}
  void add(std::vector<std::string> cells);
  void print(int indent = 0) const;

 private:
  std::vector<Column> columns_;
  std::vector<std::vector<std::string>> rows_;
};

/// A bar on standard error while that draws, no wider than that; silent otherwise. Cleared at the
/// end, and where Ctrl-C ends the program.
class Progress {
 public:
  explicit Progress(std::string label);
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;
  void show(int64_t done, int64_t total, std::string_view note);
  void clear();

 private:
  std::string line(int64_t done, int64_t total, std::string_view note, int columns) const;

  std::string label_;
  bool active_;
  bool drawn_ = false;
  std::chrono::steady_clock::time_point last_;
};

}  // namespace heed::cli
