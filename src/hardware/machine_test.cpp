// Machines, layers and mappings from files: what is refused, and with which words.
#include "hardware/machine.h"

#include <gtest/gtest.h>

#include "hardware/accelerator.h"
#include "heed/error.h"

namespace heed::hardware {
namespace {

template <class Call>
std::string message(const Call& call) {
  try {
    call();
  } catch (const Error& e) {
    return e.what();
  }
  return "no error";
}

std::string replaced(std::string text, const std::string& from, const std::string& to) {
  const size_t at = text.find(from);
  if (at == std::string::npos) throw std::runtime_error("no " + from);
  return text.replace(at, from.size(), to);
}

std::string machine_error(const std::string& from, const std::string& to) {
  const std::string text(data_file("data/fusemax.machine.json"));
  return message([&] { parse_machine(replaced(text, from, to), "m.json"); });
}

std::string workload_error(const std::string& from, const std::string& to) {
  const std::string text(data_file("data/bert.workload.json"));
  return message([&] { parse_workload(replaced(text, from, to), "w.json"); });
}

std::string mapping_error(const std::string& from, const std::string& to) {
  const std::string text(data_file("data/binding.mapping.json"));
  return message([&] { parse_mapping(replaced(text, from, to), "map.json"); });
}

void expect_has(const std::string& text, std::initializer_list<const char*> parts) {
  for (const char* part : parts)
    EXPECT_NE(text.find(part), std::string::npos) << part << "\n" << text;
}

TEST(Machine, BuiltInFilesAreGood) {
  EXPECT_EQ(builtin_machine("fusemax").matrix.rows, 256);
  EXPECT_EQ(builtin_machine("fusemax").vector.rows, 1);
  EXPECT_FALSE(builtin_machine("baseline").matrix.can(Operation::exponential));
  EXPECT_EQ(builtin_workload("xlm").value_dim, 128);
  expect_has(message([] { builtin_machine("fusemaks"); }), {"did you mean 'fusemax'"});
  expect_has(message([] { builtin_workload("brt"); }), {"did you mean 'bert'"});
  expect_has(message([] { builtin_mapping("bindin"); }), {"did you mean 'binding'"});
}

TEST(Machine, BrokenFilesNameThePlace) {
  expect_has(message([] { parse_machine("", "m.json"); }), {"m.json", "no valid JSON"});
  expect_has(message([] { parse_machine("{\"a\": ", "m.json"); }), {"m.json", "line 1"});
  expect_has(message([] { parse_machine("[1]", "m.json"); }), {"m.json", "object is needed"});
  expect_has(message([] { parse_machine("{\"a\":1,\"a\":2}", "m.json"); }), {"'a' stands twice"});
  expect_has(message([] { parse_machine(std::string(3000000, '['), "m.json"); }), {"m.json"});
  expect_has(machine_error("\"clock_hz\"", "\"clock\""), {"'clock_hz'", "missing", "says no unit"});
  expect_has(machine_error("\"clock_hz\"", "\"clock_khz\""), {"'clock_hz'", "'clock_khz'"});
  expect_has(machine_error("940e6", "0"), {"clock_hz", "found 0", "above 0"});
  expect_has(machine_error("940e6", "\"940 MHz\""), {"clock_hz", "940 MHz", "number"});
  expect_has(machine_error("940e6", "1e999"), {"m.json"});
  expect_has(machine_error("\"rows\": 256", "\"rows\": -1"), {"array_2d: rows", "found -1"});
  expect_has(machine_error("\"rows\": 256", "\"rows\": 2.5"),
             {"rows", "found 2.5", "whole number"});
  expect_has(machine_error("\"rows\": 256", "\"rows\": 18446744073709551615"), {"rows", "65536"});
  expect_has(machine_error("\"buffer_bytes\": 16777216", "\"buffer_bytes\": -5"), {"buffer_bytes"});
  expect_has(machine_error("\"dram_word\": 62.4", "\"dram_word\": null"), {"energy_pj: dram_word"});
  expect_has(machine_error("\"title\"", "\"titel\""), {"unknown key 'titel'", "'title'"});
  expect_has(machine_error("\"exponential\": 6", "\"exponentiatial\": 6"),
             {"cycles_per_operation", "'exponential'"});
}

TEST(Workload, BrokenFilesNameThePlace) {
  expect_has(workload_error("\"heads\": 12", "\"heads\": 0"), {"w.json: heads", "found 0"});
  expect_has(workload_error("\"batch\": 64,", ""), {"'batch'", "missing"});
  expect_has(workload_error("\"length\": 1024", "\"queries\": 5"), {"'length'", "missing"});
  expect_has(workload_error("\"ffn_dim\": 3072,", ""), {"model_dim and ffn_dim"});
  expect_has(workload_error("\"length\": 1024", "\"length\": 1000000000"), {"63 bits"});
  expect_has(workload_error("\"length\": 1024", "\"length\": 1e30"), {"length", "1e+30"});
  expect_has(message([] { with_length(builtin_workload("bert"), 0); }), {"length", "found 0"});
  EXPECT_EQ(workload_error("\"length\": 1024", "\"queries\": 1, \"keys\": 77"), "no error");
}

TEST(Mapping, BrokenFilesNameThePlace) {
  expect_has(mapping_error("[\"BQK\", \"LM\"]", "[\"BQK\"]"), {"Einsum LM", "bound 0 times"});
  expect_has(mapping_error("[\"BQK\", \"LM\"]", "[\"BQK\", \"LM\", \"RM\"]"), {"RM", "2 times"});
  expect_has(mapping_error("\"RD\", \"RNV\"]", "\"RD\", \"RNW\"]"), {"no tensor 'RNW'", "'RNV'"});
  expect_has(mapping_error("\"streamed\"", "\"stream\""), {"memory", "between_phases"});
  expect_has(mapping_error("\"one_pass\"", "\"onepass\""), {"did you mean 'one_pass'"});
  expect_has(
      mapping_error("{\"array_1d\": [\"RM\"]}", "{\"array_1d\": [\"RM\"], \"drain\": \"LM\"}"),
      {"phases[1]", "drain"});
}

TEST(Machine, WhatDoesNotFitIsSaid) {
  Machine small = builtin_machine("fusemax");
  small.buffer_bytes = 1000;
  expect_has(
      message([&] { attention_cost(small, builtin_mapping("binding"), builtin_workload("bert")); }),
      {"buffer_bytes is 1000", "need"});
  expect_has(message([] {
               attention_cost(builtin_machine("baseline"), builtin_mapping("binding"),
                              builtin_workload("bert"));
             }),
             {"Einsum LM", "'maximum'"});
}

}  // namespace
}  // namespace heed::hardware
