#include "engine/candidates.h"
#include "heed/moh_router.h"
#include "mechanisms/attention_case.h"
#include "mechanisms/embedded.h"

namespace heed {

namespace {

MohRouterOptions router_options(const Spec& options) {
  options.require_known({"top_k", "form"});
  return {options.integer("top_k").value_or(1),
          parse_moh_form(options.text("form").value_or("code"))};
}

// A weight that a call leaves out is 0 in the cascades: the softmax of one head is 1, and two equal
// groups have the weight of none.
cascade::Bindings bind(const NamedTensors& in, const Spec& options) {
  const int64_t channels = in.at("x").size(2);
  const bool grouped = in.count("wg_group") > 0;
  const auto weight = [&](const char* name, int64_t rows) {
    if (const Tensor given = input_or_none(in, name); given.defined()) return to_nd(given);
    return cascade::NdArray{{rows, channels},
                            std::vector<double>(static_cast<size_t>(rows * channels))};
  };
  cascade::Bindings bindings;
  bindings.tensors = {{"X", to_nd(in.at("x"))},
                      {"WG", to_nd(in.at("wg"))},
                      {"WG_Shared", weight("wg_shared", grouped ? 1 : 0)},
                      {"WG_Group", weight("wg_group", 2)}};
  bindings.sizes["TOPK"] = router_options(options).top_k;
  return bindings;
}

struct RouterCase {
  Dims x;
  int64_t routed = 0;
  int64_t shared = 0;    // rows of wg_shared; 0: left out
  bool grouped = false;  // wg_group is given
  int64_t top_k = 0;
};

ExampleCase router_case(const std::string& name, const RouterCase& c, const std::string& form) {
  ExampleCase example{name,
                      {{"x", c.x}, {"wg", {c.routed, c.x[2]}}},
                      "form=" + form + ",top_k=" + std::to_string(c.top_k)};
  if (c.shared > 0) example.inputs.emplace_back("wg_shared", Dims{c.shared, c.x[2]});
  if (c.grouped) example.inputs.emplace_back("wg_group", Dims{2, c.x[2]});
  return example;
}

std::vector<ExampleCase> router_cases() {
  std::vector<ExampleCase> cases;
  for (const char* form : {"code", "paper"}) {
    const auto add = [&](const char* name, const RouterCase& c) {
      cases.push_back(router_case(std::string(form) + "_" + name, c, form));
    };
    add("two_stage", {{2, 9, 12}, 6, 3, true, 2});
    add("one_shared_head", {{1, 11, 7}, 5, 0, true, 3});
    add("routed_only", {{2, 5, 10}, 8, 0, false, 3});
    add("shared_only", {{2, 5, 10}, 0, 4, false, 0});
    add("all_heads_active", {{1, 20, 16}, 4, 2, true, 4});
    // In the code form one head alone has a constant gate: its definition's gradient is rounding.
    if (form == std::string("paper")) add("one_active_head", {{1, 20, 16}, 7, 2, true, 1});
    add("several_tiles", {{2, 330, 9}, 5, 2, true, 2});
    add("one_token", {{3, 1, 33}, 9, 3, true, 4});
  }
  cases.push_back(router_case("float32_weights", {{1, 12, 24}, 6, 2, true, 3}, "code"));
  cases.back().types = {{"wg", DType::f32}, {"wg_shared", DType::f32}, {"wg_group", DType::f32}};
  return cases;
}

ExampleCase random_router_case(uint64_t seed) {
  CaseRandom random(seed);
  RouterCase c;
  c.x = {random.between(1, 3), random.chance(0.1) ? random.between(60, 200) : random.between(1, 40),
         random.between(1, 50)};
  const bool code = random.chance(0.5);
  c.routed = random.chance(0.15) ? 0 : random.between(2, 12);
  c.shared = c.routed == 0 || random.chance(0.6) ? random.between(1, 6) : 0;
  c.grouped = c.routed > 0 && (c.shared > 0 || random.chance(0.5));
  // See router_cases about one head in the code form.
  c.top_k = c.routed == 0 ? 0 : random.between(code ? 2 : 1, c.routed);
  return router_case("", c, code ? "code" : "paper");
}

Mechanism router_record() {
  Mechanism m;
  m.name = "moh_router";
  m.title = "Mixture-of-Head router: gates of shared and routed heads";
  m.sheets = {17};
  m.arxiv = {"2410.11842"};
  m.engine = "none";
  m.pass_rank = "c";
  m.card = embedded("moh_router/card.md");
  m.cascades = {{"code", std::string(embedded("moh_router/code.cascade")), "form=code"},
                {"paper", std::string(embedded("moh_router/paper.cascade")), "form=paper"}};
  m.outputs = {{"gates", "G"}, {"load_balance_loss", "LB"}};
  m.cases = router_cases();
  m.bench_cases = {router_case("moh_vit_b", {{1, 1024, 384}, 12, 4, true, 8}, "code"),
                   router_case("llama3_8b", {{1, 1024, 4096}, 16, 16, true, 8}, "code")};
  m.forward = [](const NamedTensors& in, const Spec& options, const RunOptions& run) {
    MohRouting routing = moh_router(in.at("x"), in.at("wg"), input_or_none(in, "wg_shared"),
                                    input_or_none(in, "wg_group"), router_options(options), run);
    return named_arrays({"gates", "load_balance_loss"}, std::move(routing.gates),
                        std::move(routing.load_balance_loss));
  };
  m.backward = [](const NamedTensors& in, const NamedTensors& out_gradients, const Spec& options,
                  const RunOptions& run) {
    MohRouterGradients gradients =
        moh_router_backward(out_gradients.at("gates"), out_gradients.at("load_balance_loss"),
                            in.at("x"), in.at("wg"), input_or_none(in, "wg_shared"),
                            input_or_none(in, "wg_group"), router_options(options), run);
    NamedArrays arrays = named_arrays({"x", "wg"}, std::move(gradients.x), std::move(gradients.wg));
    if (in.count("wg_shared") > 0) arrays.emplace("wg_shared", std::move(gradients.wg_shared));
    if (in.count("wg_group") > 0) arrays.emplace("wg_group", std::move(gradients.wg_group));
    return arrays;
  };
  m.bind = bind;
  m.random_case = random_router_case;
  m.explain = [](const NamedTensors&, const Spec&, const RunOptions& run) {
    return explain_isas(run);
  };
  return m;
}

}  // namespace

std::vector<Mechanism> moh_router_records() { return {router_record()}; }

}  // namespace heed
