#include "cli/terminal.h"

#include <fmt/format.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <cstdlib>
#include <stdexcept>

namespace heed::cli {
namespace {

std::string painted(std::string_view text, int code) {
  if (!coloured(stdout)) return std::string(text);
  return fmt::format("\x1b[{}m{}\x1b[0m", code, text);
}

constexpr std::string_view kClearLine = "\r\x1b[K";

int columns_of(std::FILE* stream) {
  constexpr int kUnknown = 80;
  winsize size{};
  return ioctl(fileno(stream), TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : kUnknown;
}

// What a terminal shows of a text in UTF-8 within this many columns.
std::string_view cut(std::string_view text, int columns) {
  size_t end = 0;
  for (int shown = 0; end < text.size(); ++end) {
    const bool continues = (static_cast<unsigned char>(text[end]) & 0xC0U) == 0x80U;
    if (!continues && ++shown > columns) break;
  }
  return text.substr(0, end);
}

// Before Ctrl-C ends the program. SA_RESETHAND: the second signal is the last.
extern "C" void clear_and_end(int signal) {
  [[maybe_unused]] const auto written = write(STDERR_FILENO, kClearLine.data(), kClearLine.size());
  std::raise(signal);
}

// Only where Ctrl-C would end the program without a word: other handlers stop what draws.
void replace_interrupt(void (*old_handler)(int), void (*new_handler)(int), int flags) {
  struct sigaction action{};
  sigaction(SIGINT, nullptr, &action);
  if (action.sa_handler != old_handler) return;
  action.sa_handler = new_handler;
  action.sa_flags = flags;
  sigaction(SIGINT, &action, nullptr);
}

}  // namespace

void flush_output() {
  if (std::fflush(stdout) != 0 || std::ferror(stdout) != 0) {
    throw std::runtime_error("cannot write to standard output");
  }
}

bool is_terminal(std::FILE* stream) { return isatty(fileno(stream)) == 1; }

bool draws_on(std::FILE* stream) {
  const char* terminal = std::getenv("TERM");
  return is_terminal(stream) && !(terminal != nullptr && std::string_view(terminal) == "dumb");
}

bool coloured(std::FILE* stream) {
  const char* no_colour = std::getenv("NO_COLOR");
  return (no_colour == nullptr || *no_colour == '\0') && draws_on(stream);
}

std::string bold(std::string_view text) { return painted(text, 1); }
std::string green(std::string_view text) { return painted(text, 32); }
std::string red(std::string_view text) { return painted(text, 31); }

void print_json(const Json& json) {
  fmt::print("{}\n", json.dump(2, ' ', false, Json::error_handler_t::replace));
}

Json finite_or_null(double value) { return std::isfinite(value) ? Json(value) : Json(nullptr); }

std::string short_number(double value, int digits) { return fmt::format("{:.{}g}", value, digits); }

std::string bytes_text(int64_t bytes) {
  if (bytes <= 0) return "unknown";
  if (bytes % (1 << 20) == 0) return fmt::format("{} MiB", bytes >> 20);
  if (bytes % (1 << 10) == 0) return fmt::format("{} KiB", bytes >> 10);
  return fmt::format("{} B", bytes);
}

void Table::add(std::vector<std::string> cells) {
  cells.resize(columns_.size());
  rows_.push_back(std::move(cells));
}

void Table::print(int indent) const {
  std::vector<size_t> widths;
  for (size_t c = 0; c < columns_.size(); ++c) {
    size_t width = columns_[c].header.size();
    for (const auto& row : rows_) width = std::max(width, row[c].size());
    widths.push_back(width);
  }
  const auto line = [&](const auto& cell_of) {
    std::string text(static_cast<size_t>(indent), ' ');
    for (size_t c = 0; c < columns_.size(); ++c) {
      if (c > 0) text += "  ";
      const bool right = columns_[c].align == Align::right;
      text += right ? fmt::format("{:>{}}", cell_of(c), widths[c])
                    : fmt::format("{:<{}}", cell_of(c), widths[c]);
    }
    text.erase(text.find_last_not_of(' ') + 1);
    return text;
  };
  fmt::print("{}\n", bold(line([&](size_t c) { return columns_[c].header; })));
  for (const auto& row : rows_) fmt::print("{}\n", line([&](size_t c) { return row[c]; }));
}

Progress::Progress(std::string label) : label_(std::move(label)), active_(draws_on(stderr)) {}

Progress::~Progress() { clear(); }

void Progress::show(int64_t done, int64_t total, std::string_view note) {
  if (!active_ || total <= 0) return;
  const auto now = std::chrono::steady_clock::now();
  if (drawn_ && done < total && now - last_ < std::chrono::milliseconds(100)) return;
  last_ = now;
  drawn_ = true;
  replace_interrupt(SIG_DFL, clear_and_end, static_cast<int>(SA_RESETHAND | SA_NODEFER));
  // A full last column would wrap.
  say("{}{}", kClearLine, line(done, total, note, columns_of(stderr) - 1));
  std::fflush(stderr);
}

std::string Progress::line(int64_t done, int64_t total, std::string_view note, int columns) const {
  constexpr int kWidest = 30;
  const std::string text = fmt::format("{:3d} %  {}", done * 100 / total, note);
  const int room = columns - static_cast<int>(label_.size() + text.size()) - 4;  // of " [] "
  std::string bar;
  if (room > 0) {
    const int width = std::min(kWidest, room);
    const auto filled = static_cast<int>(std::clamp<int64_t>(done * width / total, 0, width));
    bar = fmt::format("[{:#<{}}{:.<{}}] ", "", filled, "", width - filled);
  }
  return std::string(cut(fmt::format("{} {}{}", label_, bar, text), columns));
}

void Progress::clear() {
  if (!drawn_) return;
  say("{}", kClearLine);
  std::fflush(stderr);
  replace_interrupt(clear_and_end, SIG_DFL, 0);
  drawn_ = false;
}

}  // namespace heed::cli
