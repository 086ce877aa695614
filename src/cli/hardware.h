// heed hardware: models of accelerators, tile plans and this machine; one file per command.
#pragma once
#include <CLI/CLI.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "cli/commands.h"
#include "hardware/einsum.h"

namespace heed::cli {

void add_hardware_passes(CLI::App& hardware);
void add_hardware_fusemax(CLI::App& hardware);
void add_hardware_place(CLI::App& hardware);
void add_hardware_tiles(CLI::App& hardware);
void add_hardware_simulate(CLI::App& hardware);
void add_hardware_touches(CLI::App& hardware);
void add_hardware_cpu(CLI::App& hardware);
void add_hardware_files(CLI::App& hardware);

/// The text of a file; throws Error naming the option, the file and why.
std::string read_text(std::string_view option, const std::string& path);
/// Writes a text file; throws Error naming the option, the file and why.
void write_text(std::string_view option, const std::string& path, const std::string& text);
/// "30,48,80"; throws Error naming `option`.
std::vector<int64_t> parse_numbers(std::string_view option, std::string_view text);

/// "p=4096,m=4096"; throws Error naming --sizes.
hardware::Sizes parse_sizes(const std::string& text);

}  // namespace heed::cli
