// The program: adds the commands, turns errors into one line on standard error and an exit code.
#include <fmt/format.h>

#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <new>
#include <string_view>

#include "base/blocks.h"
#include "cli/commands.h"
#include "cli/terminal.h"
#include "cli/wait_policy.h"
#include "heed/error.h"
#include "heed/version.h"
#include "mechanisms/nearest.h"

namespace {

using namespace heed::cli;  // NOLINT: the program's own room

constexpr const char* kFooter =
    "Exit codes: 0 ok, 1 a kernel disagrees with its cascade, 2 wrong arguments or input,\n"
    "too little memory, or output that cannot be written, 3 internal error, 130 run or eval\n"
    "stopped by Ctrl-C.\n"
    "`heed COMMAND --help` explains a command.";

void add_commands(CLI::App& app, Outcome& outcome) {
  app.set_version_flag("--version", std::string("heed ") + heed::kVersion);
  app.require_subcommand(0, 1);
  app.footer(kFooter);
  add_run(app, outcome);
  add_eval(app, outcome);
  add_list(app, outcome);
  add_show(app, outcome);
  add_check(app, outcome);
  add_bench(app, outcome);
  add_explain(app, outcome);
  add_cpu(app, outcome);
  add_hardware(app, outcome);
}

// Of options that take numbers, before any range is asked; CLI11 reads nothing at all as 0.
void refuse_what_is_no_number(CLI::App& app) {
  for (CLI::Option* option : app.get_options()) {
    if (!option->get_type_name().starts_with("FLOAT")) continue;  // others are whole_number
    option->transform(CLI::Validator(
        [](const std::string& value) {
          char* end = nullptr;
          const double number = std::strtod(value.c_str(), &end);
          const bool good = !value.empty() && *end == '\0' && !std::isnan(number);
          return good ? std::string() : "found '" + value + "', needed a number";
        },
        ""));
  }
  for (CLI::App* command : app.get_subcommands([](const CLI::App*) { return true; })) {
    refuse_what_is_no_number(*command);
  }
}

std::vector<std::string> option_names(const CLI::App& command) {
  std::vector<std::string> names;
  for (const CLI::Option* option : command.get_options()) {
    for (const std::string& name : option->get_lnames()) names.push_back("--" + name);
  }
  return names;
}

std::vector<std::string> command_names(const CLI::App& app) {
  std::vector<std::string> names;
  for (const CLI::App* command : app.get_subcommands([](const CLI::App*) { return true; })) {
    names.push_back(command->get_name());
  }
  return names;
}

// What stood on the command line and belongs to nothing.
std::string leftover_message(const CLI::App& app) {
  const CLI::App* command = &app;
  std::string path;  // "hardware tiles "
  std::vector<std::string> left = app.remaining();
  for (auto parsed = app.get_subcommands(); !parsed.empty(); parsed = command->get_subcommands()) {
    command = parsed.front();
    path += command->get_name() + " ";
    if (!command->remaining().empty()) left = command->remaining();
  }
  if (left.empty()) return "an argument was not expected";
  const std::string& word = left.front();
  const std::string name = word.substr(0, word.find('='));
  const std::string owner = path.empty() ? "" : path.substr(0, path.size() - 1) + ": ";
  if (name.starts_with("-")) {
    return owner + "unknown option '" + name + "'" +
           heed::did_you_mean(name, option_names(*command)) + "; see heed " + path + "--help";
  }
  const auto names = command_names(*command);
  if (names.empty()) {
    const std::string& command_name = command->get_name();
    const char* how = command_name == "run"    ? "; a prompt is said with -p TEXT or -f FILE, "
                                                 "a model with --model FILE"
                      : command_name == "eval" ? "; a text is named with --text FILE, "
                                                 "a model with --model FILE"
                                               : "";
    return owner + "unexpected argument '" + word + "'" + how;
  }
  return owner + "unknown command '" + word + "'" + heed::did_you_mean(word, names) +
         "; known: " + heed::joined(names);
}

// The one of which CLI11 says "At Most 1 required but received 2"; null for its other complaints.
const CLI::Option* given_too_often(const CLI::App& app) {
  for (const CLI::Option* option : app.get_options()) {
    if (option->get_multi_option_policy() == CLI::MultiOptionPolicy::Throw &&
        static_cast<int>(option->count()) > option->get_items_expected_max()) {
      return option;
    }
  }
  for (const CLI::App* command : app.get_subcommands()) {
    if (const CLI::Option* option = given_too_often(*command)) return option;
  }
  return nullptr;
}

int report(const std::string& message, int exit_code) {
  std::fflush(stdout);
  say("heed: {}\n", message);
  return exit_code;
}

int parse_error(const CLI::App& app, const CLI::ParseError& error) {
  if (error.get_exit_code() == static_cast<int>(CLI::ExitCodes::Success)) return app.exit(error);
  if (dynamic_cast<const CLI::ExtrasError*>(&error) != nullptr) {
    return report(leftover_message(app), kUsageError);
  }
  if (dynamic_cast<const CLI::ArgumentMismatch*>(&error) != nullptr) {
    if (const CLI::Option* option = given_too_often(app)) {
      return report(
          fmt::format("{}: given {} times, needed once", option->get_name(), option->count()),
          kUsageError);
    }
  }
  return report(error.what(), kUsageError);
}

int run_program(int argc, char** argv) {
  CLI::App app("Attention on the CPU, proven against its equations", "heed");
  Outcome outcome;
  add_commands(app, outcome);
  refuse_what_is_no_number(app);
  try {
    app.parse(argc, argv);
    if (app.get_subcommands().empty()) {
      say("{}", app.help());
      return kUsageError;
    }
  } catch (const CLI::ParseError& error) {
    return parse_error(app, error);
  }
  return outcome.exit_code;
}

}  // namespace

int main(int argc, char** argv) {
  // `heed list | head` ends quietly, also where the parent ignores the signal.
  std::signal(SIGPIPE, SIG_DFL);
  const std::string_view command = argc > 1 ? argv[1] : "";
  if (command == "run" || command == "eval") sleep_when_idle_on_shared_cores(argv);
  int code = kInternalError;
  try {
    code = run_program(argc, argv);
  } catch (const heed::Error& error) {
    code = report(error.what(), kUsageError);
  } catch (const heed::OutOfMemory& error) {
    code = report(error.what(), kUsageError);
  } catch (const std::bad_alloc&) {
    code = report("memory: the system refuses what is needed", kUsageError);
  } catch (const std::exception& error) {
    if (std::ferror(stdout) == 0) {
      code = report(std::string("internal error: ") + error.what(), kInternalError);
    }
  }
  if (std::fflush(stdout) != 0 || std::ferror(stdout) != 0) {
    code = report("cannot write to standard output", kUsageError);
  }
  return code;
}
