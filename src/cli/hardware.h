// heed hardware: models of accelerators, tile plans and this machine; one file per command.
#pragma once
#include <CLI/CLI.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "cli/commands.h"
#include "hardware/einsum.h"
#include "mechanisms/registry.h"

namespace heed::cli {

void add_hardware_passes(CLI::App& hardware);
void add_hardware_fusemax(CLI::App& hardware);
void add_hardware_place(CLI::App& hardware);
void add_hardware_tiles(CLI::App& hardware);
void add_hardware_simulate(CLI::App& hardware);
void add_hardware_touches(CLI::App& hardware);
void add_hardware_cpu(CLI::App& hardware);
void add_hardware_files(CLI::App& hardware);

/// Whether a name on the command line is that of a cascade file instead of a mechanism.
bool is_cascade_file(const std::string& name);
/// The mechanism of a name that is none; throws Error that speaks of both.
const Mechanism& mechanism_instead_of_file(const std::string& name);
/// "30,48,80"; throws Error naming `option`.
std::vector<int64_t> parse_numbers(std::string_view option, std::string_view text);

/// One number for each axis; a single one stands for all of them.
std::vector<int64_t> per_axis(std::string_view option, std::vector<int64_t> numbers, size_t axes);

/// "p=4096,m=4096"; throws Error naming --sizes.
hardware::Sizes parse_sizes(const std::string& text);
/// The ranks and constants of a cascade that take a size of their own.
std::vector<std::string> sized_ranks(const cascade::Program& program);
/// Throws Error naming --sizes where one is given for another rank than these.
void require_known_ranks(const hardware::Sizes& sizes, const std::vector<std::string>& ranks);
/// Throws Error naming --sizes where one of these ranks has none.
void require_sizes(const hardware::Sizes& sizes, const std::vector<std::string>& ranks);

}  // namespace heed::cli
