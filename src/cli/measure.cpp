#include "cli/measure.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <random>

#include "cascade/ast.h"
#include "cli/arguments.h"
#include "heed/error.h"

namespace heed::cli {
namespace {

using Sizes = std::map<std::string, int64_t>;

// The share of index tuples for which a predicate of the case holds. Of long cases some rows of the last
// rank are counted: one drawn from each of equal stretches, lest they fall in step with a mask's period.
double kept_share(const cascade::PredicateDeclaration& declared, const Sizes& sizes,
                  const std::function<bool(std::span<const int64_t>)>& predicate) {
  constexpr int64_t kMostTuples = int64_t{1} << 26;
  const size_t last = declared.ranks.size() - 1;
  const int64_t length = sizes.at(declared.ranks[last]);
  int64_t rows = 1;
  for (size_t axis = 0; axis < last; ++axis) rows *= sizes.at(declared.ranks[axis]);
  if (rows * length == 0) return 0;
  const int64_t counted = std::clamp<int64_t>(kMostTuples / length, 1, rows);
  std::mt19937 random(1);
  std::vector<int64_t> index(last + 1, 0);
  int64_t kept = 0;
  for (int64_t stretch = 0; stretch < counted; ++stretch) {
    const int64_t begin = stretch * rows / counted, end = (stretch + 1) * rows / counted;
    int64_t row = begin + static_cast<int64_t>(random() % static_cast<uint64_t>(end - begin));
    for (size_t axis = last; axis > 0; --axis) {
      const int64_t extent = sizes.at(declared.ranks[axis - 1]);
      index[axis - 1] = row % extent;
      row /= extent;
    }
    for (index[last] = 0; index[last] < length; ++index[last]) kept += predicate(index) ? 1 : 0;
  }
  return static_cast<double>(kept) / static_cast<double>(counted * length);
}

bool is_batch(const cascade::Ast& ast, const std::string& rank) {
  return std::any_of(ast.ranks.begin(), ast.ranks.end(),
                     [&](const auto& declared) { return declared.batch && declared.name == rank; });
}

// Whether a term runs over everything that the mask distinguishes, batch ranks apart.
bool runs_over(const cascade::Ast& ast, const std::vector<std::string>& term,
               const std::vector<std::string>& mask) {
  return std::all_of(mask.begin(), mask.end(), [&](const std::string& rank) {
    return is_batch(ast, rank) || std::find(term.begin(), term.end(), rank) != term.end();
  });
}

constexpr double kMostPairs = 1 << 24;

double largest_mask(const cascade::Program& program, const Sizes& sizes) {
  double most = 0;
  for (const auto& declared : program.ast().predicates) {
    double tuples = 1;
    for (const std::string& rank : declared.ranks) tuples *= static_cast<double>(sizes.at(rank));
    most = std::max(most, tuples);
  }
  return most;
}

/// 2 x multiply-adds of the needed part of each rank; terms over the ranks of a mask only for the pairs
/// that the mask keeps.
double operations_of(const cascade::Program& program, const cascade::Bindings& bindings,
                     const Sizes& sizes, const Sizes& needed) {
  const cascade::Ast& ast = program.ast();
  std::map<std::string, double> shares;
  for (const auto& declared : ast.predicates) {
    const auto predicate = bindings.predicates.find(declared.name);
    if (predicate == bindings.predicates.end()) continue;
    shares[declared.name] = kept_share(declared, sizes, predicate->second);
  }
  double operations = 0;
  for (const cascade::StatementCount& row : cascade::count(program)) {
    for (const auto& [ranks, factor] : row.multiply_adds.terms) {
      double term = 2 * factor;
      for (const std::string& rank : ranks) term *= static_cast<double>(needed.at(rank));
      for (const auto& declared : ast.predicates) {
        const auto share = shares.find(declared.name);
        if (share != shares.end() && runs_over(ast, ranks, declared.ranks)) term *= share->second;
      }
      operations += term;
    }
  }
  return operations;
}

int64_t group_size(const Dims* q, const Dims* k) {
  return q != nullptr && k != nullptr && (*k)[1] > 0 ? std::max<int64_t>(1, (*q)[1] / (*k)[1]) : 1;
}

}  // namespace

std::vector<Samples> time_calls(const std::vector<std::function<void()>>& calls, double seconds) {
  using Clock = std::chrono::steady_clock;
  constexpr size_t kFewest = 5, kMost = 10000;
  for (const auto& call : calls) call();
  std::vector<Samples> samples(calls.size());
  const auto begin = Clock::now();
  while (samples[0].size() < kMost) {
    const std::chrono::duration<double> gone = Clock::now() - begin;
    if (samples[0].size() >= kFewest && gone.count() >= seconds) break;
    for (size_t i = 0; i < calls.size(); ++i) {
      const auto start = Clock::now();
      calls[i]();
      samples[i].push_back(std::chrono::duration<double, std::milli>(Clock::now() - start).count());
    }
  }
  return samples;
}

double quantile(Samples samples, double fraction) {
  if (samples.empty()) return std::numeric_limits<double>::quiet_NaN();
  std::sort(samples.begin(), samples.end());
  const double place = fraction * static_cast<double>(samples.size() - 1);
  const auto below = static_cast<size_t>(place);
  const size_t above = std::min(below + 1, samples.size() - 1);
  const double part = place - static_cast<double>(below);
  return samples[below] * (1 - part) + samples[above] * part;
}

std::string compiler_name() {
#if defined(__clang__)
  return "clang++ " + std::to_string(__clang_major__) + "." + std::to_string(__clang_minor__) +
         "." + std::to_string(__clang_patchlevel__);
#else
  return "g++ " + std::to_string(__GNUC__) + "." + std::to_string(__GNUC_MINOR__) + "." +
         std::to_string(__GNUC_PATCHLEVEL__);
#endif
}

double visible_operations(const Mechanism& mechanism, const NamedTensors& in, const Spec& options) {
  cascade::Bindings bindings = mechanism.bind(in, options);
  // The longest tiles of the engine: what is done once a tile is next to nothing.
  constexpr int64_t kTileKeys = 512;
  if (const auto tile = bindings.sizes.find("M0"); tile != bindings.sizes.end()) {
    tile->second = kTileKeys;
  }
  const Sizes less = mechanism.needed_sizes ? mechanism.needed_sizes(in) : Sizes();
  double least = 0;
  bool first = true;
  for (const CascadeText* text : cascades_for(mechanism, options)) {
    if (!first && defines_further_options(mechanism, *text)) continue;
    const cascade::Program program = cascade::parse(text->text, text->name);
    const Sizes sizes = cascade::sizes(program, bindings);
    // A form with a mask over many pairs does no less than the definition, and takes long to count.
    if (!first && largest_mask(program, sizes) > kMostPairs) continue;
    Sizes needed = less;
    needed.insert(sizes.begin(), sizes.end());
    const double operations = operations_of(program, bindings, sizes, needed);
    least = first ? operations : std::min(least, operations);
    first = false;
  }
  return least;
}
const Dims* input_shape(const ExampleCase& example, std::initializer_list<const char*> names) {
  for (const char* name : names) {
    for (const auto& [input, shape] : example.inputs) {
      if (input == name) return &shape;
    }
  }
  return nullptr;
}

ExampleCase twin_of(const Mechanism& mechanism, const ExampleCase& example) {
  if (mechanism.shrink) return mechanism.shrink(example);
  constexpr int64_t kQueries = 64;
  ShapeArguments shapes;
  if (const Dims* x = input_shape(example, {"x"}); x != nullptr && x->rank() == 4) {
    shapes.q = Dims{(*x)[0], (*x)[1], std::min((*x)[2], kQueries), (*x)[3]};
    return with_shapes(example, shapes);
  }
  const Dims* q = input_shape(example, {"q", "out_a"});
  if (q == nullptr || q->rank() != 4) return example;
  const Dims* k = input_shape(example, {"k", "k_cache"});
  const Dims* v = input_shape(example, {"v", "v_cache"});
  // Some mechanisms have inputs that need as many keys as queries.
  const int64_t keys = k != nullptr && (*k)[2] == (*q)[2] ? kQueries : kQueries + kQueries / 2;
  shapes.q = Dims{1, group_size(q, k), std::min((*q)[2], kQueries), (*q)[3]};
  if (k != nullptr) shapes.k = Dims{1, 1, std::min((*k)[2], keys), (*k)[3]};
  if (v != nullptr) shapes.v = Dims{1, 1, std::min((*v)[2], keys), (*v)[3]};
  return with_shapes(example, shapes);
}

}  // namespace heed::cli
