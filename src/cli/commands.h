// One function per command; each lies in the file of its name and adds the command to the program.
#pragma once
#include <CLI/CLI.hpp>

namespace heed::cli {

inline constexpr int kOk = 0;
inline constexpr int kFailureFound = 1;  // heed check, heed bench: a kernel disagrees
inline constexpr int kUsageError = 2;    // arguments, input, or output that cannot be written
inline constexpr int kInternalError = 3;

/// Where a command leaves its exit code.
struct Outcome {
  int exit_code = kOk;
};

void add_run(CLI::App& app, Outcome& outcome);
void add_eval(CLI::App& app, Outcome& outcome);
void add_list(CLI::App& app, Outcome& outcome);
void add_show(CLI::App& app, Outcome& outcome);
void add_check(CLI::App& app, Outcome& outcome);
void add_bench(CLI::App& app, Outcome& outcome);
void add_explain(CLI::App& app, Outcome& outcome);
void add_cpu(CLI::App& app, Outcome& outcome);
void add_hardware(CLI::App& app, Outcome& outcome);

}  // namespace heed::cli
