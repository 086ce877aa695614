// What autograd and other devices get where an operator has nothing to offer them: a clear error.
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

namespace {

// Operators without a gradient. One that gains a backward leaves this list and registers a
// torch::autograd::Function for Autograd in its own file; its `..._backward` operator then comes
// onto this list, because without a kernel here second derivatives would be silently zero.
constexpr const char* kForwardOnly[] = {"flash_attention", "decode_attention", "merge_attention",
                                        "sigmoid_attention"};

constexpr const char* kOnlyCpu[] = {"flash_attention", "decode_attention", "merge_attention",
                                    "sigmoid_attention"};

void refuse_device(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& arguments = op.schema().arguments();
  const size_t first = stack->size() - arguments.size();
  for (size_t i = 0; i < arguments.size(); ++i) {
    const c10::IValue& value = (*stack)[first + i];
    if (!value.isTensor() || !value.toTensor().defined()) continue;
    const at::Tensor& tensor = value.toTensor();
    const bool dense_cpu = tensor.device().is_cpu() && tensor.layout() == at::kStrided;
    TORCH_CHECK(dense_cpu, op.schema().name(), ": ", arguments[i].name(), " is a ", tensor.layout(),
                " tensor on ", tensor.device(), ", needed is a dense (strided) tensor on cpu");
  }
  TORCH_CHECK(false, op.schema().name(), ": needed are plain dense tensors on cpu");
}

}  // namespace

TORCH_LIBRARY_IMPL(heed, Autograd, m) {
  for (const char* op : kForwardOnly) m.impl(op, torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(heed, CompositeExplicitAutograd, m) {
  for (const char* op : kOnlyCpu) {
    m.impl(op, torch::CppFunction::makeFromBoxedFunction<&refuse_device>());
  }
}
