#include "cli/arguments.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <charconv>

#include "heed/error.h"
#include "mechanisms/nearest.h"

namespace heed::cli {
namespace {

// Queries and keys of a call.
struct Rows {
  const Dims &q, &k;
  int64_t longest() const { return std::max(q[2], k.rank() == 4 ? k[2] : 0); }
};

// Tables by distance have twice as many entries as the longer of q and k [B,H,L,D] has tokens, less up
// to two.
std::optional<int64_t> resized_table(int64_t extent, const Rows& old, const Rows& rows) {
  const int64_t less = old.q.rank() == 4 ? 2 * old.longest() - extent : -1;
  if (less < 0 || less > 2) return {};
  return 2 * rows.longest() - less;
}

// An input other than q, k, v: its axes are some of those of q, in their order, or its own. From the last
// one on, an axis of the same extent is taken for the same; of one axis, heads come first.
Dims resized(const std::string& input, Dims shape, const Rows& old, const Rows& rows) {
  const bool of_keys = input.ends_with("_k");
  const Dims &old_q = of_keys ? old.k : old.q, &q = of_keys ? rows.k : rows.q;
  if (shape == old_q) return q;
  if (shape.rank() == 1 && (input == "lengths" || shape[0] == old_q[1])) {
    shape[0] = input == "lengths" ? q[0] : q[1];
    return shape;
  }
  int end = old_q.rank() - 1;
  for (int axis = shape.rank() - 1; axis >= 0; --axis) {
    int same = end;
    while (same >= 0 && old_q[same] != shape[axis]) --same;
    if (same < 0) {
      shape[axis] = resized_table(shape[axis], old, rows).value_or(shape[axis]);
    } else {
      shape[axis] = q[same];
      end = same;
    }
  }
  return shape;
}

// What mechanisms call their queries, keys and values.
enum class Role { queries, keys, values, other };

Role role_of(std::string_view input) {
  if (input == "q" || input == "query") return Role::queries;
  if (input == "k" || input == "k_cache" || input == "key") return Role::keys;
  if (input == "v" || input == "v_cache" || input == "value") return Role::values;
  return Role::other;
}

const Dims* shape_of(const ExampleCase& example, Role role) {
  for (const auto& [input, shape] : example.inputs) {
    if (role_of(input) == role) return &shape;
  }
  return nullptr;
}

void require_role(const ExampleCase& example, Role role, const char* option, const char* what) {
  if (shape_of(example, role) != nullptr) return;
  std::vector<std::string> names;
  for (const auto& [input, shape] : example.inputs) names.push_back(input);
  throw Error(std::string(option) + ": the call has no " + what + "; its inputs are " +
              joined(names));
}

}  // namespace

Dims parse_shape(std::string_view option, std::string_view text) {
  constexpr int64_t kMostElements = int64_t{1} << 32;
  constexpr size_t kMostAxes = 6;  // a grid of three
  std::vector<int64_t> extents;
  int64_t count = 1;
  bool good = true;
  for (size_t begin = 0; begin <= text.size() && good;) {
    const size_t comma = std::min(text.find(',', begin), text.size());
    int64_t value = 0;
    const auto [stop, error] = std::from_chars(text.data() + begin, text.data() + comma, value);
    good = error == std::errc{} && stop == text.data() + comma && value >= 1 &&
           value <= kMostElements / count;
    if (good) count *= value;
    extents.push_back(value);
    begin = comma + 1;
  }
  if (!good || extents.size() < 2 || extents.size() > kMostAxes) {
    throw Error(std::string(option) + ": found '" + std::string(text) +
                "', needed positive numbers B,H,L,D (at most 2^32 elements)");
  }
  return Dims(std::span<const int64_t>(extents));
}

DType parse_dtype(std::string_view text) {
  const std::pair<const char*, DType> names[] = {{"float64", DType::f64},   {"f64", DType::f64},
                                                 {"float32", DType::f32},   {"f32", DType::f32},
                                                 {"bfloat16", DType::bf16}, {"bf16", DType::bf16},
                                                 {"float16", DType::f16},   {"f16", DType::f16}};
  std::vector<std::string> known;
  for (const auto& [name, dtype] : names) {
    if (text == name) return dtype;
    known.emplace_back(name);
  }
  throw Error("--dtype: unknown type '" + std::string(text) + "'" + did_you_mean(text, known) +
              "; known: " + joined(known));
}

CLI::Validator whole_number(uint64_t least, uint64_t most) {
  return {[least, most](std::string& text) -> std::string {
            uint64_t value = 0;
            const auto [stop, error] =
                std::from_chars(text.data(), text.data() + text.size(), value);
            if (error == std::errc{} && stop == text.data() + text.size() && value >= least &&
                value <= most) {
              text = std::to_string(value);  // what parses it next takes 010 for eight
              return "";
            }
            const std::string up_to = most == std::numeric_limits<int64_t>::max() ? "2^63 - 1"
                                      : most == std::numeric_limits<uint64_t>::max()
                                          ? "2^64 - 1"
                                          : std::to_string(most);
            return "found '" + text + "', needed a whole number from " + std::to_string(least) +
                   " to " + up_to;
          },
          ""};
}

std::vector<Isa> isas_to_use(const std::string& text) {
  if (text.empty()) {
    const std::optional<Isa> forced = forced_isa();
    return forced ? std::vector<Isa>{*forced} : available_isas();
  }
  const Isa isa = reading("--isa", [&] { return parse_isa(text); });
  const auto& available = available_isas();
  if (std::find(available.begin(), available.end(), isa) == available.end()) {
    throw Error("--isa " + text + ": this machine cannot run it; it has up to " +
                name_of(available.back()));
  }
  return {isa};
}

void add_threads(CLI::App& command, std::optional<int>& threads, const char* help) {
  command.add_option("--threads", threads, help)
      ->transform(whole_number(1, 1024));  // what set_threads takes
}

void use_threads(const std::optional<int>& threads) {
  if (threads) set_threads(*threads);
}

std::vector<const Mechanism*> chosen_mechanisms(const std::string& name) {
  if (!name.empty()) return {&find_mechanism(name)};
  std::vector<const Mechanism*> all;
  for (const Mechanism& mechanism : mechanisms()) all.push_back(&mechanism);
  return all;
}

ExampleCase with_shapes(const ExampleCase& like, const ShapeArguments& shapes) {
  const Dims* old_q = shape_of(like, Role::queries);
  const Dims* old_k = shape_of(like, Role::keys);
  if (!shapes.q && !shapes.k && !shapes.v) return like;
  if (shapes.k) require_role(like, Role::keys, "--k", "keys");
  if (shapes.v) require_role(like, Role::values, "--v", "values");
  if (old_q == nullptr && !like.inputs.empty()) old_q = &like.inputs.front().second;
  if (old_q == nullptr) throw Error("case " + like.name + " has no inputs; --q does not apply");
  const Dims q = shapes.q.value_or(*old_q);
  if (q.rank() != old_q->rank()) {
    throw Error("--q: found " + std::to_string(q.rank()) + " numbers, needed " +
                std::to_string(old_q->rank()) + " as in the case " + like.name + ": " +
                to_string(*old_q));
  }
  const Dims k = shapes.k ? *shapes.k : shapes.q || old_k == nullptr ? q : *old_k;
  const Dims v = shapes.v.value_or(k);
  const Rows old{*old_q, old_k == nullptr ? *old_q : *old_k}, rows{q, k};
  ExampleCase out = like;
  for (auto& [input, shape] : out.inputs) {
    switch (role_of(input)) {
      case Role::queries:
        shape = q;
        break;
      case Role::keys:
        shape = k;
        break;
      case Role::values:
        shape = v;
        break;
      case Role::other:
        shape = resized(input, shape, old, rows);
    }
  }
  return out;
}

NamedTensors shapes_only(const ExampleCase& example, DType dtype) {
  alignas(64) static const std::byte kUnread[64] = {};
  NamedTensors tensors;
  for (const auto& [name, shape] : example.inputs) {
    const auto own = example.types.find(name);
    const DType type = own == example.types.end() ? dtype : own->second;
    tensors.emplace(name, Tensor(static_cast<const void*>(kUnread), type, shape));
  }
  return tensors;
}

std::string with_option(const std::string& options, const std::string& key,
                        const std::string& value) {
  if (Spec::parse_options(options).has(key)) return options;
  return options + (options.empty() ? "" : ",") + key + "=" + value;
}

}  // namespace heed::cli
