// One evaluation of a program for one case: its tensors, filled statement by statement.
#pragma once
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "cascade/cascade.h"
#include "cascade/nest.h"

namespace heed::cascade {

class Run {
 public:
  /// Checks the bindings and takes over the inputs. Throws heed::Error.
  Run(const Program& program, const Bindings& bindings);

  void forward();

  const Lowered& lowered() const { return lowered_; }
  const Frame& frame() const { return frame_; }
  int64_t size(int rank) const { return frame_.sizes[static_cast<size_t>(rank)]; }
  /// Tensors that the statements of a group define, by tensor number.
  std::vector<bool> in_step(const Group& group) const;
  /// A copy of a tensor; absent elements are the identity of the reduction that defines it.
  NdArray array(int tensor) const;

 private:
  struct Compiled {
    const LoweredEquation* equation;
    std::vector<std::unique_ptr<Nest>> nests;  // one per term
    bool may_be_absent = false;
  };

  void bind_callables(const Bindings& bindings);
  void bind_inputs(const Bindings& bindings);
  void shape_defined();
  void group(const Group& group);
  Compiled compile(const LoweredEquation& equation, int running, const std::vector<bool>& in_step);
  void run(Compiled& compiled);
  void run_term(Nest& nest, TensorData& out, bool first, bool track);
  void settle(const Compiled& compiled);
  void settle_step(const Compiled& compiled, int rank, int64_t step);

  const Lowered& lowered_;
  Frame frame_;
};

/// Row-major shape strides; throws heed::Error if the tensor would be unreasonably large.
void set_shape(const Lowered& lowered, const std::string& name, std::vector<int64_t> shape,
               TensorData& data);

/// The axis that runs over the rank; there must be one.
size_t axis_of(const TensorInfo& info, int rank);

/// The value that reduces nothing: 0, -inf, +inf.
double identity(Reduce reduce);

}  // namespace heed::cascade
