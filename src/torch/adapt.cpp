#include "torch/adapt.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <string>

#include "base/huge_pages.h"
#include "torch/types.h"

namespace heed::ops {
namespace {

bool is_float_type(at::ScalarType type) {
  const std::optional<DType> dtype = heed_type(type);
  return dtype && is_floating(*dtype);
}

const char* type_name(at::ScalarType type) {
  const std::optional<DType> dtype = heed_type(type);
  return dtype ? name_of(*dtype) : c10::toString(type);
}

bool holds_nothing(const Array& array) {
  return array.shape().rank() == 0 && array.view().data() == nullptr;
}

}  // namespace

void check_given(const Arg& arg) {
  TORCH_CHECK_TYPE(arg.tensor.defined(), arg.op, ": ", arg.name, " is None, needed is a tensor");
}

void check_tensor(const Arg& arg, int64_t rank, c10::Device device) {
  check_tensor(arg, rank, rank, device);
}

void check_tensor(const Arg& arg, int64_t least, int64_t most, c10::Device device) {
  check_given(arg);
  const at::Tensor& t = arg.tensor;
  TORCH_CHECK(t.layout() == at::kStrided, arg.op, ": ", arg.name, " has layout ", t.layout(),
              ", needed is a dense (strided) tensor");
  TORCH_CHECK(t.device() == device, arg.op, ": ", arg.name, " is on ", t.device(),
              " but the first argument is on ", device, ", needed is one device");
  TORCH_CHECK_VALUE(t.dim() >= least && t.dim() <= most, arg.op, ": ", arg.name, " has ", t.dim(),
                    " dimensions ", t.sym_sizes(), ", needed are ", least,
                    least == most ? "" : " to " + std::to_string(most));
  TORCH_CHECK_TYPE(heed_type(t.scalar_type()), arg.op, ": ", arg.name, " has type ",
                   type_name(t.scalar_type()), ", which heed computes nothing with");
}

void check_optional(const char* op, const char* name, const std::optional<at::Tensor>& given,
                    int64_t rank, c10::Device device) {
  if (given && given->defined()) check_tensor({op, name, *given}, rank, device);
}

void check_floating(const Arg& arg, int64_t rank, c10::Device device, at::ScalarType dtype) {
  check_tensor(arg, rank, device);
  const at::ScalarType found = arg.tensor.scalar_type();
  TORCH_CHECK_TYPE(is_float_type(found), arg.op, ": ", arg.name, " has type ", type_name(found),
                   ", needed is float64, float32, bfloat16 or float16");
  TORCH_CHECK_TYPE(found == dtype, arg.op, ": ", arg.name, " has type ", type_name(found),
                   ", needed is ", type_name(dtype), " as in the first argument");
}

void check_qkv(const Arg& q, const Arg& k, const Arg& v) {
  check_given(q);
  for (const Arg* arg : {&q, &k, &v}) {
    check_floating(*arg, 4, q.tensor.device(), q.tensor.scalar_type());
  }
}

void check_qkv_shapes(const Arg& q, const Arg& k, const Arg& v) {
  const auto same = [&](const Arg& a, int64_t a_axis, const Arg& b, int64_t b_axis,
                        const char* what) {
    TORCH_CHECK_VALUE(a.tensor.sym_size(a_axis) == b.tensor.sym_size(b_axis), a.op, ": ", a.name,
                      " has ", what, " ", a.tensor.sym_size(a_axis), " but ", b.name, " has ",
                      b.tensor.sym_size(b_axis));
  };
  same(k, 0, q, 0, "batch size");
  same(v, 0, q, 0, "batch size");
  same(k, 3, q, 3, "head dim");
  same(v, 1, k, 1, "head count");
  same(v, 2, k, 2, "length");
  const c10::SymInt heads = q.tensor.sym_size(1);
  const c10::SymInt kv_heads = k.tensor.sym_size(1);
  TORCH_CHECK_VALUE(kv_heads > 0 ? heads % kv_heads == 0 : heads == 0, q.op, ": ", q.name, " has ",
                    heads, " heads, needed is a multiple of the ", kv_heads, " heads of ", k.name);
}

Tensor view(const at::Tensor& tensor) {
  const std::optional<DType> dtype = heed_type(tensor.scalar_type());
  if (!dtype) throw Error(std::string("no view of type ") + type_name(tensor.scalar_type()));
  const Dims shape({tensor.sizes().data(), tensor.sizes().size()});
  Dims strides({tensor.strides().data(), tensor.strides().size()});
  // PyTorch leaves strides that reach no second element to chance.
  if (shape.rank() > 0 && (shape.back() <= 1 || tensor.numel() == 0)) strides[shape.rank() - 1] = 1;
  return Tensor(tensor.const_data_ptr(), *dtype, shape, strides);
}

Tensor view(const std::optional<at::Tensor>& tensor) {
  return tensor && tensor->defined() ? view(*tensor) : Tensor();
}

at::Tensor take(Array array, const at::Tensor& like) {
  if (holds_nothing(array)) {
    return at::empty({0}, like.options());
  }
  const Dims shape = array.shape();
  const auto type = c10::scalarTypeToTypeMeta(torch_type(array.dtype()));
  void* data = array.view().data();
  const size_t bytes = static_cast<size_t>(array.count()) * size_of(array.dtype());
  at::DataPtr memory(
      data, new Array(std::move(array)), [](void* kept) { delete static_cast<Array*>(kept); },
      at::kCPU);
  // With an allocator, for those who resize storages.
  c10::Storage storage(c10::Storage::use_byte_size_t(), bytes, std::move(memory),
                       at::getCPUAllocator(), true);
  at::Tensor tensor = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), type);
  tensor.unsafeGetTensorImpl()->set_sizes_contiguous({shape.span().data(), shape.span().size()});
  return tensor;
}

std::optional<at::Tensor> held_input(const char* op, const char* name,
                                     const std::optional<at::Tensor>& given, int64_t rank,
                                     c10::Device device, std::optional<at::ScalarType> at_least) {
  if (!given || !given->defined()) return std::nullopt;
  if (rank >= 0) check_tensor({op, name, *given}, rank, device);
  return small_input(*given, at_least);
}

std::optional<at::Tensor> held_per_head(const char* op, const char* name,
                                        const std::optional<at::Tensor>& given,
                                        const at::Tensor& q) {
  return held_input(op, name, given, 1, q.device(), statistics_type(q.scalar_type()));
}

void check_slopes(const char* op, const std::optional<at::Tensor>& given, c10::Device device) {
  const bool per_entry = given && given->defined() && given->dim() == 2;
  check_optional(op, "alibi_slopes", given, per_entry ? 2 : 1, device);
}

std::optional<at::Tensor> held_slopes(const char* op, const std::optional<at::Tensor>& given,
                                      const at::Tensor& q) {
  if (!given || !given->defined()) return std::nullopt;
  check_slopes(op, given, q.device());
  return small_input(*given, statistics_type(q.scalar_type()));
}

at::Tensor gradient_input(const at::Tensor& gradient) {
  return gradient.dim() == 0 || gradient.size(-1) <= 1 || gradient.stride(-1) == 1
             ? gradient
             : gradient.contiguous();
}

std::optional<at::Tensor> gradient_input(const std::optional<at::Tensor>& gradient) {
  if (!gradient || !gradient->defined()) return std::nullopt;
  return gradient->contiguous();
}

at::Tensor out_gradient(const std::optional<at::Tensor>& gradient, const at::Tensor& q,
                        const at::Tensor& v) {
  if (gradient && gradient->defined()) return gradient_input(*gradient);
  return at::zeros({q.size(0), q.size(1), q.size(2), v.size(3)}, q.options());
}

at::Tensor take_wanted(Array gradient, bool wanted, const at::Tensor& like) {
  return take(wanted ? std::move(gradient) : Array(), like);
}

at::Tensor take_gradient(Array gradient, const std::optional<at::Tensor>& input,
                         const at::Tensor& like) {
  if (!input || !input->defined() || holds_nothing(gradient)) return take({}, like);
  return take(std::move(gradient), *input).to(input->scalar_type());
}

at::Tensor small_input(const at::Tensor& tensor, std::optional<at::ScalarType> at_least) {
  const at::ScalarType type = tensor.scalar_type();
  if (at_least && is_float_type(type) && at::elementSize(type) < at::elementSize(*at_least)) {
    return tensor.to(*at_least).contiguous();
  }
  return tensor.contiguous();
}

at::Tensor parameter_input(const at::Tensor& given, const at::Tensor& q) {
  const at::ScalarType type = given.scalar_type(), wide = statistics_type(q.scalar_type());
  const bool read = type == q.scalar_type() || type == wide || !is_float_type(type);
  return read ? given : given.to(wide);
}

std::optional<at::Tensor> parameter_input(const std::optional<at::Tensor>& given,
                                          const at::Tensor& q) {
  if (!given || !given->defined()) return std::nullopt;
  return parameter_input(*given, q);
}

std::optional<int64_t> window_side(const char* op, const char* side, int64_t value) {
  TORCH_CHECK_VALUE(value >= -1, op, ": ", side, " is ", value,
                    ", needed is a number of keys or -1 for an open side");
  return value == -1 ? std::nullopt : std::optional<int64_t>(value);
}

HeldMasks::HeldMasks(const char* op, bool causal, int64_t window_left, int64_t window_right,
                     const std::optional<at::Tensor>& given, c10::Device device) {
  masks.causal = causal;
  masks.window.left = window_side(op, "window[0]", window_left);
  masks.window.right = window_side(op, "window[1]", window_right);
  check_optional(op, "lengths", given, 1, device);
  if (given && given->defined()) {
    lengths = small_input(*given);
    masks.lengths = view(lengths);
  }
}

at::Tensor empty_result(c10::SymIntArrayRef shape, const at::Tensor& like, at::ScalarType type) {
  const auto sizes = c10::asIntArrayRefSlowOpt(shape);
  const std::optional<DType> dtype = heed_type(type);
  if (!sizes || !dtype || !like.device().is_cpu() ||
      c10::multiply_integers(*sizes) * static_cast<int64_t>(size_of(*dtype)) <
          static_cast<int64_t>(kHugePage)) {
    return at::empty_symint(shape, like.options().dtype(type));
  }
  return take(Array(*dtype, Dims({sizes->data(), sizes->size()})), like);
}

at::Tensor empty_out(const at::Tensor& q, const at::Tensor& v) {
  const c10::SymInt shape[] = {q.sym_size(0), q.sym_size(1), q.sym_size(2), v.sym_size(3)};
  return empty_result(shape, q, q.scalar_type());
}

std::pair<at::Tensor, at::Tensor> empty_results(const at::Tensor& q, const at::Tensor& v,
                                                bool lse) {
  const c10::SymInt rows[] = {q.sym_size(0), q.sym_size(1), q.sym_size(2)};
  return {empty_out(q, v), empty_statistic(q, rows, lse)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> empty_wide_results(const at::Tensor& q,
                                                                  const at::Tensor& v,
                                                                  bool statistics) {
  auto [out, statistic] = empty_results(q, v, statistics);
  return {out, empty_statistic(q, out.sym_sizes(), statistics), statistic};
}

at::Tensor empty_statistic(const at::Tensor& q, c10::SymIntArrayRef shape, bool wanted) {
  const at::ScalarType type = statistics_type(q.scalar_type());
  return wanted ? empty_result(shape, q, type) : at::empty({0}, q.options().dtype(type));
}

Tensor view_wanted(const std::optional<at::Tensor>& tensor, bool wanted) {
  return wanted ? view(tensor) : Tensor();
}

void check_cpu(const char* op, std::optional<c10::Device> device) {
  TORCH_CHECK(!device || device->is_cpu(), op, ": device is ", *device, ", needed is cpu");
}

at::Tensor empty_parameter(c10::SymIntArrayRef shape, at::ScalarType dtype) {
  return at::empty_symint(shape, at::TensorOptions().dtype(dtype).device(at::kMeta));
}

std::array<c10::SymInt, 4> state_shape(const at::Tensor& q, const c10::SymInt& features,
                                       const at::Tensor& v) {
  return {q.sym_size(0), q.sym_size(1), features, v.sym_size(3)};
}

RunOptions run_options() {
  RunOptions run;
  run.threads = at::get_num_threads();
  return run;
}

}  // namespace heed::ops
