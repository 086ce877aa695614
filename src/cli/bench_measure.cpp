// heed bench: is a kernel right, and how long does it take?
#include <fmt/format.h>

#include <algorithm>

#include "cli/bench.h"
#include "heed/error.h"
#include "libtorch/library.h"
#include "mechanisms/check.h"

namespace heed::cli {
namespace {

std::string chosen_path(const Mechanism& mechanism, const NamedTensors& in, const Spec& options,
                        const RunOptions& run) {
  for (const PathAnswer& answer : mechanism.explain(in, options, run)) {
    if (answer.can_run) return answer.path;
  }
  return "none";
}

std::string text_of(const ExampleCase& example) {
  std::string text = example.definition + "|" + example.options;
  for (const auto& [name, shape] : example.inputs) text += "|" + name + to_string(shape);
  return text;
}

/// Random gradients of the results; of "out" alone where there is one, as in training.
NamedArrays gradients_of(const NamedArrays& results, DType dtype) {
  ExampleCase gradients{.name = "gradients", .inputs = {}, .options = ""};
  for (const auto& [name, array] : results) {
    if (name != "out" && results.contains("out")) continue;
    gradients.inputs.emplace_back(name, array.shape());
    gradients.types[name] = array.dtype();
  }
  constexpr uint64_t kSeed = 2;
  return make_inputs(Mechanism{}, gradients, dtype, kSeed);
}

/// One call as it was asked for. Bad arguments are found here: with the shapes that were given, and
/// before PyTorch's composition, which may not look at them, is tried.
struct Call {
  Call(const BenchRow& row, const RunOptions& options_of_run)
      : inputs(make_inputs(*row.mechanism, row.example, row.dtype, 1)),
        in(views(inputs)),
        options(Spec::parse_options(row.example.options)),
        run(options_of_run),
        results(row.mechanism->forward(in, options, run)) {}

  const NamedArrays inputs;
  const NamedTensors in;
  const Spec options;
  const RunOptions& run;
  const NamedArrays results;
};

/// The two calls to time: heed's, and PyTorch's where it has one.
struct Calls {
  std::function<void()> heed, peer;
};

Calls forward_calls(BenchRow& row, const Call& call, const std::optional<Peer>& peer) {
  row.bytes = bytes_of(call.in) + bytes_of(call.results);
  return {[&row, &call] { row.mechanism->forward(call.in, call.options, call.run); },
          peer ? peer->compute : std::function<void()>()};
}

Calls backward_calls(BenchRow& row, const Call& call, const std::optional<Peer>& peer) {
  const auto gradients = std::make_shared<const NamedArrays>(gradients_of(call.results, row.dtype));
  NamedTensors given = views(*gradients);
  for (const auto& [name, array] : call.results) given.emplace(name, Tensor());  // undefined: zero
  const BackwardCall backward = prepare_backward(*row.mechanism, call.in, call.options, call.run);
  row.operations *= 2;  // each product has two gradients
  row.bytes = bytes_of(call.in) + bytes_of(given) + bytes_of(backward(given));
  if (peer) peer->prepare_backward(given.at(composed_result(*row.mechanism)));
  return {[backward, given, gradients] { backward(given); },
          peer ? peer->backward : std::function<void()>()};
}

void time_row(BenchRow& row, const Call& call, const BenchArguments& arguments,
              Rooflines& rooflines) {
  row.path = chosen_path(*row.mechanism, call.in, call.options, call.run);
  row.operations = visible_operations(*row.mechanism, call.in, call.options);
  std::optional<Peer> peer;
  if (!arguments.versus.empty()) {
    peer =
        torch_library()->make_peer(row.mechanism->name, call.in, call.options, default_threads());
  }
  const auto make = row.pass == Pass::forward ? forward_calls : backward_calls;
  const Calls calls = make(row, call, peer);
  row.roof = rooflines.roof(row.dtype, row.operations, row.bytes);
  if (!peer) {
    row.heed = time_calls({calls.heed}, arguments.seconds)[0];
    return;
  }
  row.peer_title = peer->title;
  const auto samples = time_calls({calls.heed, calls.peer}, 2 * arguments.seconds);
  row.heed = samples[0];
  row.peer = samples[1];
  for (size_t i = 0; i < row.heed.size(); ++i) row.ratio.push_back(row.peer[i] / row.heed[i]);
}

void note_missing_backward(const std::vector<BenchRow>& rows) {
  const Mechanism* last = nullptr;
  for (const BenchRow& row : rows) {
    if (row.mechanism == last || row.mechanism->backward) continue;
    last = row.mechanism;
    say("heed: --backward: {} has none, only its forward was timed\n", last->name);
  }
}

}  // namespace

void QuickChecks::check(BenchRow& row) {
  const ExampleCase small = twin_of(*row.mechanism, row.example);
  const std::string key = row.mechanism->name + "|" + name_of(row.dtype) + "|" + text_of(small);
  auto place = found_.find(key);
  if (place == found_.end()) {
    Found found;  // kept only if nothing throws: what could not be checked is not right
    const Reference reference = make_reference(*row.mechanism, small, row.dtype, 1, gradients_);
    for (const CheckRow& checked : check_kernel(reference, isa_, Layout::contiguous)) {
      found.error_over_bound = std::max(found.error_over_bound, checked.difference.ratio);
      if (checked.ok() || !found.wrong.empty()) continue;
      if (!checked.failure.empty()) throw Error(checked.failure);
      found.wrong = checked.result + ": " + checked.difference.where;
    }
    place = found_.emplace(key, std::move(found)).first;
  }
  row.error_over_bound = place->second.error_over_bound;
  row.wrong = place->second.wrong;
}

void report_wrong(const BenchRow& row) {
  say("heed: {} {} {}: not measured, it disagrees with its cascade: {}\n", row.mechanism->name,
      row.example.options, heed::name_of(row.dtype), row.wrong);
}

int measure(std::vector<BenchRow>& rows, const BenchArguments& arguments, Rooflines& rooflines) {
  const RunOptions run = arguments.run();
  QuickChecks checks(chosen_isa(run), arguments.backward);
  Progress progress("measuring");
  int wrong = 0;
  int64_t done = 0;
  const auto count = static_cast<int64_t>(rows.size());
  std::erase_if(rows, [&](BenchRow& row) {
    progress.show(done++, count, row.mechanism->name + " " + row.example.options);
    try {
      const Call call(row, run);
      checks.check(row);
      if (row.wrong.empty()) {
        time_row(row, call, arguments, rooflines);
        return false;
      }
    } catch (const Error& error) {
      progress.clear();
      leave_out(*row.mechanism, arguments, error);
      return true;
    }
    ++wrong;
    progress.clear();
    report_wrong(row);
    return false;
  });
  progress.clear();
  if (arguments.backward) note_missing_backward(rows);
  return wrong;
}

}  // namespace heed::cli
