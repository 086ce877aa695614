// From PyTorch's tensors and errors to heed's: what every operator file here shares.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <array>
#include <optional>
#include <tuple>
#include <utility>

#include "heed/error.h"
#include "heed/masks.h"
#include "heed/run.h"
#include "heed/tensor.h"

namespace heed::ops {

/// An argument under its public name, for messages.
struct Arg {
  const char* op;
  const char* name;
  const at::Tensor& tensor;
};

/// A tensor at all: PyTorch turns None into an undefined one. Else a Python TypeError.
void check_given(const Arg& arg);
/// Dense, on `device`, of rank `rank` and of a type that heed knows, else a Python RuntimeError
/// (layout, device), ValueError (rank) or TypeError.
void check_tensor(const Arg& arg, int64_t rank, c10::Device device);
/// The same with a rank from `least` to `most`.
void check_tensor(const Arg& arg, int64_t least, int64_t most, c10::Device device);
/// The above, and a floating type of `dtype`, else a Python TypeError.
void check_floating(const Arg& arg, int64_t rank, c10::Device device, at::ScalarType dtype);
/// All of q, k, v: rank 4, one floating type, one device.
void check_qkv(const Arg& q, const Arg& k, const Arg& v);
/// The relations between the shapes of q, k and v, for fake tensors that no kernel ever checks.
void check_qkv_shapes(const Arg& q, const Arg& k, const Arg& v);

/// The type of scores, statistics and parameters beside inputs of `dtype`.
inline at::ScalarType statistics_type(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

/// check_tensor where the argument is given. Fake kernels need it too: a call whose tensors are
/// partly on the meta device ends there, and must not pass as one on the CPU.
void check_optional(const char* op, const char* name, const std::optional<at::Tensor>& given,
                    int64_t rank, c10::Device device);

/// A view of the same memory with the same strides; no copy. For tensors that passed check_tensor.
Tensor view(const at::Tensor& tensor);

/// A view of an optional input; undefined where it is absent.
Tensor view(const std::optional<at::Tensor>& tensor);

/// PyTorch's tensor over an array's memory, which it keeps; [0] for an array that holds nothing.
at::Tensor take(Array array, const at::Tensor& like);

/// An optional input checked, contiguous and, where its type is floating, of at least `at_least`.
std::optional<at::Tensor> held_input(const char* op, const char* name,
                                     const std::optional<at::Tensor>& given, int64_t rank,
                                     c10::Device device,
                                     std::optional<at::ScalarType> at_least = {});

/// held_input of [H], one number per head of q, of at least the statistics type beside it.
std::optional<at::Tensor> held_per_head(const char* op, const char* name,
                                        const std::optional<at::Tensor>& given,
                                        const at::Tensor& q);

/// The same of ALiBi slopes, [H] or [B,H].
void check_slopes(const char* op, const std::optional<at::Tensor>& given, c10::Device device);
std::optional<at::Tensor> held_slopes(const char* op, const std::optional<at::Tensor>& given,
                                      const at::Tensor& q);

/// A gradient as kernels read it: a unit stride in the last dimension.
at::Tensor gradient_input(const at::Tensor& gradient);
std::optional<at::Tensor> gradient_input(const std::optional<at::Tensor>& gradient);

/// The gradient of out [B,H,Lq,Dv] as kernels read it; zeros where none arrives.
at::Tensor out_gradient(const std::optional<at::Tensor>& gradient, const at::Tensor& q,
                        const at::Tensor& v);

/// take of a gradient that is wanted, [0] of one that is not.
at::Tensor take_wanted(Array gradient, bool wanted, const at::Tensor& like);

/// take, in the type of the optional input whose gradient it is; [0] of q's type, as `like`, where that
/// was not given or its gradient not computed.
at::Tensor take_gradient(Array gradient, const std::optional<at::Tensor>& input,
                         const at::Tensor& like);

/// A small input in the form that kernels read: contiguous, floating types widened to `at_least`.
at::Tensor small_input(const at::Tensor& tensor, std::optional<at::ScalarType> at_least = {});

/// A parameter of any floating type in one that the kernels of inputs like q read: that of q or of the
/// statistics beside it, with any strides.
at::Tensor parameter_input(const at::Tensor& given, const at::Tensor& q);
std::optional<at::Tensor> parameter_input(const std::optional<at::Tensor>& given,
                                          const at::Tensor& q);

/// Masks of a call; holds what their views point to.
struct HeldMasks {
  HeldMasks(const char* op, bool causal, int64_t window_left, int64_t window_right,
            const std::optional<at::Tensor>& lengths, c10::Device device);
  at::Tensor lengths;
  Masks masks;
};

/// -1 is open; below that is a Python ValueError.
std::optional<int64_t> window_side(const char* op, const char* side, int64_t value);

/// A result of this type beside inputs like `like`; also for symbolic shapes.
at::Tensor empty_result(c10::SymIntArrayRef shape, const at::Tensor& like, at::ScalarType type);

/// A result out [B,H,Lq,Dv]; also for symbolic shapes.
at::Tensor empty_out(const at::Tensor& q, const at::Tensor& v);
/// Results of softmax attention: out [B,H,Lq,Dv], lse [B,H,Lq] or [0]; also for symbolic shapes.
std::pair<at::Tensor, at::Tensor> empty_results(const at::Tensor& q, const at::Tensor& v,
                                                bool lse = true);
/// The same with one like out in the type of statistics between them: what out is made of, unrounded.
/// Without `statistics` all but out are [0].
std::tuple<at::Tensor, at::Tensor, at::Tensor> empty_wide_results(const at::Tensor& q,
                                                                  const at::Tensor& v,
                                                                  bool statistics);

/// A result of the statistics type beside inputs like q, [0] where it is not wanted; also for symbolic
/// shapes. view_wanted is undefined there.
at::Tensor empty_statistic(const at::Tensor& q, c10::SymIntArrayRef shape, bool wanted = true);
Tensor view_wanted(const std::optional<at::Tensor>& tensor, bool wanted);

/// Whether a statistic [B,H,Lq] is [0]: the forward was not asked for what its backward reads, as below
/// the transforms of torch.func nobody knows who wants gradients.
inline bool is_left_out(const at::Tensor& statistic) { return statistic.dim() == 1; }

/// Of operators that make a tensor from numbers alone: only the CPU, else a Python RuntimeError.
void check_cpu(const char* op, std::optional<c10::Device> device);
/// Their fake results.
at::Tensor empty_parameter(c10::SymIntArrayRef shape, at::ScalarType dtype = at::kFloat);

/// The shape [B,H,F,Dv] of what a running state sums up.
std::array<c10::SymInt, 4> state_shape(const at::Tensor& q, const c10::SymInt& features,
                                       const at::Tensor& v);

/// PyTorch's thread count is the one that counts here.
RunOptions run_options();

/// heed::Error becomes c10::ValueError, ValueError in Python; the dispatcher would not map it.
template <class Call>
void guarded(const Call& call) {
  try {
    call();
  } catch (const Error& error) {
    TORCH_CHECK_VALUE(false, error.what());
  }
}

}  // namespace heed::ops
