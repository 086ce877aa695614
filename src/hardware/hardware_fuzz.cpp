// Machines, layers and mappings from any bytes: parsed or refused, and costs of what was parsed.
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "hardware/accelerator.h"
#include "heed/error.h"

using namespace heed::hardware;  // NOLINT: the room under test

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  const auto attempt = [](const auto& call) {
    try {
      call();
    } catch (const heed::Error&) {
    }
  };
  const auto costs = [&](const Machine& machine, const Mapping& mapping, const Workload& layer) {
    attempt([&] { cost_row(machine, mapping, layer); });
  };
  attempt([&] {
    const Machine machine = parse_machine(text, "machine");
    for (const char* mapping : {"flat", "binding"}) {
      costs(machine, builtin_mapping(mapping), builtin_workload("bert"));
    }
  });
  attempt([&] {
    const Workload layer = parse_workload(text, "layer");
    if (layer.causal && layer.queries > (int64_t{1} << 20)) return;  // a walk over its tiles
    costs(builtin_machine("baseline"), builtin_mapping("unfused"), layer);
    costs(builtin_machine("baseline"), builtin_mapping("flat"), layer);
    costs(builtin_machine("fusemax"), builtin_mapping("binding"), layer);
  });
  attempt([&] {
    const Mapping mapping = parse_mapping(text, "mapping");
    costs(builtin_machine("fusemax"), mapping, builtin_workload("t5"));
  });
  return 0;
}
