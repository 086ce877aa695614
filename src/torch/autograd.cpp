// Gradients of all operators by one rule, and what other devices get: a clear error.
//
// The gradient of operator X is the operator X_backward. Its arguments are found by name:
//   grad_<result>  gradient of a result of X (None where nothing arrives; a result without such an
//                  argument is not differentiable)
//   <result>       what X returned
//   <argument>     what X was called with
//   output_mask    which of its results somebody wants
// Its results are named grad_<argument>; the gradient of an argument that was not given, or is not
// wanted, is an empty tensor.
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include <algorithm>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace {

using c10::IValue;
using c10::OperatorHandle;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using torch::jit::Stack;

constexpr const char* kForwardOnly[] = {"decode_attention"};
constexpr const char* kDifferentiable[] = {"affine_scaled_attention",
                                           "attention_distillation_loss",
                                           "depthwise_causal_conv",
                                           "feature_map",
                                           "flash_attention",
                                           "flash_attention_varlen",
                                           "head_gated_attention",
                                           "kernelized_rpe_attention",
                                           "lightning_attention",
                                           "linear_attention",
                                           "local_linear_attention",
                                           "magnitude_aware_linear_attention",
                                           "merge_attention",
                                           "moh_router",
                                           "na1d",
                                           "na2d",
                                           "na3d",
                                           "parallax_attention",
                                           "recurrent_softmax_attention",
                                           "relative_attention",
                                           "relu_linear_attention",
                                           "sigmoid_attention",
                                           "stochastic_attention",
                                           "taylor_state_attention"};

bool is_tensor(const IValue& value) { return value.isTensor() && value.toTensor().defined(); }

// Position of a name, or -1.
int64_t find(const std::vector<c10::Argument>& arguments, const std::string& name) {
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (arguments[i].name() == name) return static_cast<int64_t>(i);
  }
  return -1;
}

std::string without_grad(const std::string& name) { return name.substr(5); }

bool is_optional(const c10::Argument& argument) {
  return argument.type()->kind() == c10::TypeKind::OptionalType;
}

constexpr const char* kMask = "output_mask";

// The names of an operator and its backward, looked up once.
struct Rule {
  // Where an argument of the backward comes from.
  enum class From { gradient, needed_gradient, result, argument, mask };
  struct Source {
    From from;
    size_t index;  // of the result or the argument
  };

  explicit Rule(const OperatorHandle& op)
      : backward_op(c10::Dispatcher::singleton().findSchemaOrThrow(
            (op.schema().name() + "_backward").c_str(), "")),
        differentiable(op.schema().returns().size()),
        kept(op.schema().returns().size()),
        needed(op.schema().returns().size()) {
    const auto& arguments = op.schema().arguments();
    const auto& results = op.schema().returns();
    for (const c10::Argument& argument : arguments) {
      takes_tensor.push_back(argument.type()->isSubtypeOf(*c10::OptionalType::ofTensor()));
    }
    for (const c10::Argument& wanted : backward_op.schema().arguments()) {
      const std::string& name = wanted.name();
      if (name.starts_with("grad_")) {
        const auto i = static_cast<size_t>(find(results, without_grad(name)));
        differentiable[i] = true;
        needed[i] = !is_optional(wanted);
        sources.push_back({is_optional(wanted) ? From::gradient : From::needed_gradient, i});
      } else if (name == kMask) {
        sources.push_back({From::mask, 0});
      } else if (const int64_t result = find(results, name); result >= 0) {
        kept[static_cast<size_t>(result)] = true;
        sources.push_back({From::result, static_cast<size_t>(result)});
      } else {
        sources.push_back({From::argument, static_cast<size_t>(find(arguments, name))});
      }
    }
    for (const c10::Argument& gradient : backward_op.schema().returns()) {
      gradient_of.push_back(static_cast<size_t>(find(arguments, without_grad(gradient.name()))));
    }
  }

  OperatorHandle backward_op;
  std::vector<bool> takes_tensor;   // by argument of the operator
  std::vector<Source> sources;      // of each argument of the backward
  std::vector<size_t> gradient_of;  // the argument, for each result of the backward
  // By result of the operator: whether the backward reads it, and needs a gradient of it.
  std::vector<bool> differentiable, kept, needed;
};

const Rule& rule_of(const OperatorHandle& op) {
  static std::mutex mutex;
  static std::unordered_map<const c10::FunctionSchema*, Rule> rules;
  const std::lock_guard lock(mutex);
  return rules.try_emplace(&op.schema(), op).first->second;
}

constexpr const char *kOp = "op", *kArguments = "arguments";

struct Differentiable : torch::autograd::Function<Differentiable> {
  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const Rule& rule = rule_of(c10::Dispatcher::singleton().findSchemaOrThrow(
        ctx->saved_data[kOp].toStringRef().c_str(), ""));
    const variable_list saved = ctx->get_saved_variables();
    const size_t tensors = saved.size() - rule.kept.size();
    const c10::List<IValue> arguments = ctx->saved_data[kArguments].toList();
    std::vector<int64_t> tensor_of(arguments.size(), -1);
    int64_t next = 0;
    for (size_t i = 0; i < arguments.size(); ++i) {
      if (rule.takes_tensor[i] && arguments.get(i).isBool()) tensor_of[i] = next++;
    }
    c10::List<bool> mask;
    for (size_t argument : rule.gradient_of) {
      const int64_t tensor = tensor_of[argument];
      mask.push_back(tensor >= 0 && ctx->needs_input_grad(static_cast<size_t>(tensor)));
    }
    Stack stack;
    stack.reserve(rule.sources.size());
    for (const auto [from, i] : rule.sources) {
      if (from == Rule::From::mask) {
        stack.emplace_back(mask);
      } else if (from == Rule::From::result) {
        stack.emplace_back(saved[tensors + i]);
      } else if (from == Rule::From::argument) {
        stack.push_back(tensor_of[i] < 0 ? arguments.get(i)
                                         : IValue(saved[static_cast<size_t>(tensor_of[i])]));
      } else if (gradients[i].defined()) {
        stack.emplace_back(gradients[i]);
      } else if (from == Rule::From::needed_gradient) {
        stack.emplace_back(at::zeros_like(saved[tensors + i]));
      } else {
        stack.emplace_back();
      }
    }
    rule.backward_op.callBoxed(stack);
    variable_list found(tensors);
    for (size_t i = 0; i < stack.size(); ++i) {
      if (!mask.get(i)) continue;
      found[static_cast<size_t>(tensor_of[rule.gradient_of[i]])] = stack[i].toTensor();
    }
    return found;
  }
};

// A number in all places, without memory for them.
at::Tensor zeros_of(const at::Tensor& like) {
  return at::zeros({}, like.options()).expand_symint(like.sym_sizes());
}

// What the backward finds again: tensors in order, then the results that it reads, or zeros where it may only need
// them instead of a gradient; and the arguments, with `true` in the place of each tensor that was given.
void save(AutogradContext& ctx, const OperatorHandle& op, const Rule& rule, Stack arguments,
          variable_list tensors, at::ArrayRef<IValue> results) {
  for (size_t i = 0; i < results.size(); ++i) {
    const bool zeros = rule.needed[i] && !rule.kept[i];
    tensors.push_back(rule.kept[i] ? results[i].toTensor()
                      : zeros      ? zeros_of(results[i].toTensor())
                                   : at::Tensor());
  }
  ctx.save_for_backward(std::move(tensors));
  ctx.set_materialize_grads(false);
  c10::List<IValue> kept(c10::AnyType::get());
  kept.reserve(arguments.size());
  for (IValue& argument : arguments) {
    kept.push_back(is_tensor(argument) ? IValue(true) : std::move(argument));
  }
  ctx.saved_data[kOp] = op.schema().name();
  ctx.saved_data[kArguments] = kept;
}

struct BackwardNode : torch::autograd::CppNode<Differentiable> {
  explicit BackwardNode(std::string name) : name_(std::move(name)) {}
  std::string name() const override { return name_; }

 private:
  const std::string name_;  // for messages and profiles
};

// The call as a node of the graph. Function::apply would make the same one, but refuses torch.func: as
// it runs forward without gradients, the levels of torch.func below this one would lose theirs.
void record(const OperatorHandle& op, Stack arguments, const variable_list& tensors,
            at::ArrayRef<IValue> results) {
  const Rule& rule = rule_of(op);
  const auto node = c10::make_intrusive<BackwardNode>(rule.backward_op.schema().name());
  node->set_ctx_grad_fn(node);
  node->set_next_edges(torch::autograd::collect_next_edges(tensors));
  node->is_variable_input_.assign(tensors.size(), true);
  for (const at::Tensor& tensor : tensors) node->input_info_.emplace_back(tensor);
  for (size_t i = 0; i < results.size(); ++i) {
    const at::Tensor& result = results[i].toTensor();
    if (rule.differentiable[i]) {
      torch::autograd::set_history(result, node);
    } else {
      node->add_input_metadata(torch::autograd::Node::undefined_input());
    }
    node->output_info_.emplace_back(result);
  }
  save(node->ctx_, op, rule, std::move(arguments), tensors, results);
  node->save_variables_to_ctx();
}

void differentiate(const OperatorHandle& op, Stack* stack) {
  const size_t count = op.schema().arguments().size();
  const auto first = stack->end() - static_cast<std::ptrdiff_t>(count);
  variable_list tensors;
  bool wanted = false;
  for (auto value = first; value != stack->end(); ++value) {
    if (!is_tensor(*value)) continue;
    tensors.push_back(value->toTensor());
    // Below this kernel a tangent would be lost, which says that it is zero.
    TORCH_CHECK(!torch::autograd::isFwGradDefined(tensors.back()), op.schema().name(),
                ": forward-mode derivatives are not offered; needed is a backward");
    wanted = wanted || tensors.back().requires_grad();
  }
  const bool records = wanted && at::GradMode::is_enabled();
  Stack arguments = records ? Stack(first, stack->end()) : Stack();
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    op.callBoxed(stack);
  }
  if (!records) return;
  record(op, std::move(arguments), tensors, torch::jit::last(*stack, op.schema().returns().size()));
}

// Gradients look like what they are gradients of.
void fake_backward(const OperatorHandle& op, Stack* stack) {
  const auto& arguments = op.schema().arguments();
  const size_t first = stack->size() - arguments.size();
  const int64_t mask = find(arguments, kMask);
  Stack results;
  for (const c10::Argument& result : op.schema().returns()) {
    const auto at = static_cast<size_t>(find(arguments, without_grad(result.name())));
    const IValue& like = (*stack)[first + at];
    const bool wanted =
        mask < 0 || (*stack)[first + static_cast<size_t>(mask)].toBoolList().get(results.size());
    if (wanted && is_tensor(like)) {
      const at::Tensor& tensor = like.toTensor();
      results.emplace_back(at::empty_symint(tensor.sym_sizes(), tensor.options()));
    } else {
      // Not a gradient: it may be of another type than the inputs.
      const auto input =
          std::find_if(arguments.begin(), arguments.end(), [](const c10::Argument& argument) {
            return argument.type()->kind() == c10::TypeKind::TensorType &&
                   !argument.name().starts_with("grad_");
          });
      const at::Tensor& any =
          (*stack)[first + static_cast<size_t>(input - arguments.begin())].toTensor();
      results.emplace_back(at::empty({0}, any.options()));
    }
  }
  stack->resize(first);
  for (IValue& value : results) stack->push_back(std::move(value));
}

void refuse_device(const OperatorHandle& op, Stack* stack) {
  const auto& arguments = op.schema().arguments();
  const size_t first = stack->size() - arguments.size();
  for (size_t i = 0; i < arguments.size(); ++i) {
    const IValue& value = (*stack)[first + i];
    TORCH_CHECK_TYPE(!value.isTensor() || value.toTensor().defined() || is_optional(arguments[i]),
                     op.schema().name(), ": ", arguments[i].name(), " is None, needed is a tensor");
    if (!is_tensor(value)) continue;
    const at::Tensor& tensor = value.toTensor();
    const bool plain = tensor.device().is_cpu() && tensor.layout() == at::kStrided;
    TORCH_CHECK(plain && !tensor.is_quantized(), op.schema().name(), ": ", arguments[i].name(),
                " is a ", tensor.is_quantized() ? "quantized " : "", tensor.layout(), " tensor on ",
                tensor.device(), ", needed is a dense (strided) tensor on cpu");
  }
  TORCH_CHECK(false, op.schema().name(), ": needed are plain dense tensors on cpu");
}

std::string backward_name(const char* op) { return std::string(op) + "_backward"; }

}  // namespace

TORCH_LIBRARY_IMPL(heed, Autograd, m) {
  for (const char* op : kForwardOnly) m.impl(op, torch::autograd::autogradNotImplementedFallback());
  for (const char* op : kDifferentiable) {
    m.impl(op, torch::CppFunction::makeFromBoxedFunction<&differentiate>());
    // Second derivatives are refused: without a kernel here they would be silently zero.
    m.impl(backward_name(op).c_str(), torch::autograd::autogradNotImplementedFallback());
  }
}

TORCH_LIBRARY_IMPL(heed, Meta, m) {
  for (const char* op : kDifferentiable) {
    m.impl(backward_name(op).c_str(), torch::CppFunction::makeFromBoxedFunction<&fake_backward>());
  }
}

TORCH_LIBRARY_IMPL(heed, CompositeExplicitAutograd, m) {
  const auto refuse = [] { return torch::CppFunction::makeFromBoxedFunction<&refuse_device>(); };
  for (const char* op : kForwardOnly) m.impl(op, refuse());
  for (const char* op : kDifferentiable) {
    m.impl(op, refuse());
    m.impl(backward_name(op).c_str(), refuse());
  }
}
