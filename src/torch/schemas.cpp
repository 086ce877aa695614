// Every operator that PyTorch sees, one row each. python/heed gives them the signatures of the
// documentation; here `window` is two numbers (-1 = open) and results are always complete. Options
// are passed by position: PyTorch spends 0.3 us on parsing each one that comes by name.
#include <torch/library.h>

#include <string>

#include "heed/version.h"

TORCH_LIBRARY(heed, m) {
  m.def("version", [] { return std::string(heed::kVersion); });

  // An operator with a gradient has a twin `..._backward`; src/torch/autograd.cpp says how its
  // arguments and results are found by their names.
  // `drawn_seed` stands in for `seed`: a number that PyTorch drew needs not be known where a call is traced.
#define HEED_FLASH_OPTIONS                                                                  \
  "bool causal=False, SymInt window_left=-1, SymInt window_right=-1, Tensor? lengths=None," \
  " float? scale=None, float softcap=0.0, Tensor? alibi_slopes=None, Tensor? mask=None,"    \
  " Tensor? bias=None, Tensor? sink=None, Tensor? block_mask=None, int block_rows=64,"      \
  " int block_keys=64, float dropout_p=0.0, SymInt seed=0, Tensor? drawn_seed=None,"        \
  " bool from_start=False"
  m.def("flash_attention(Tensor q, Tensor k, Tensor v, " HEED_FLASH_OPTIONS
        ") -> (Tensor out, Tensor lse)");
  m.def(
      "flash_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v,"
      " Tensor out, Tensor lse, " HEED_FLASH_OPTIONS
      ", bool[6] output_mask=[True, True, True, True, True, True]) -> (Tensor grad_q, Tensor "
      "grad_k, Tensor grad_v, Tensor grad_alibi_slopes,"
      " Tensor grad_bias, Tensor grad_sink)");
#define HEED_VARLEN_OPTIONS                                                              \
  "bool causal=False, SymInt window_left=-1, SymInt window_right=-1, float? scale=None," \
  " float softcap=0.0, Tensor? alibi_slopes=None, Tensor? sink=None,"                    \
  " float dropout_p=0.0, SymInt seed=0, Tensor? drawn_seed=None"
  m.def(
      "flash_attention_varlen(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q,"
      " Tensor cu_seqlens_k, " HEED_VARLEN_OPTIONS ") -> (Tensor out, Tensor lse)");
  m.def(
      "flash_attention_varlen_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k,"
      " Tensor v, Tensor out, Tensor lse, Tensor cu_seqlens_q, Tensor "
      "cu_seqlens_k, " HEED_VARLEN_OPTIONS
      ", bool[5] output_mask=[True, True, True, True, True]) -> (Tensor grad_q, Tensor grad_k,"
      " Tensor grad_v, Tensor grad_alibi_slopes, Tensor grad_sink)");
  m.def(
      "decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths,"
      " float? scale=None, SymInt window=-1, Tensor? sink=None, int splits=0,"
      " float softcap=0.0, Tensor? alibi_slopes=None) -> (Tensor out, Tensor lse)");
  m.def(
      "merge_attention(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b)"
      " -> (Tensor out, Tensor lse)");
  m.def(
      "merge_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor out_a, Tensor lse_a,"
      " Tensor out_b, Tensor lse_b)"
      " -> (Tensor grad_out_a, Tensor grad_lse_a, Tensor grad_out_b, Tensor grad_lse_b)");
#define HEED_MASK_OPTIONS                                                                   \
  "bool causal=False, SymInt window_left=-1, SymInt window_right=-1, Tensor? lengths=None," \
  " float? scale=None"
  // `statistics` asks for what the backward reads; without it those results are empty, and a backward
  // makes them itself.
#define HEED_STATISTICS ", bool statistics=False"
  m.def(
      "parallax_attention(Tensor q, Tensor r, Tensor k, Tensor "
      "v, " HEED_MASK_OPTIONS HEED_STATISTICS
      ") -> (Tensor out, Tensor v_mean, Tensor t_mean, Tensor lse)");
  m.def(
      "parallax_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor r, Tensor k,"
      " Tensor v, Tensor out, Tensor v_mean, Tensor t_mean, Tensor lse, " HEED_MASK_OPTIONS
      ") -> (Tensor grad_q, Tensor grad_r, Tensor grad_k, Tensor grad_v)");
  m.def(
      "relative_attention(Tensor q, Tensor k, Tensor v, Tensor rel_key, Tensor rel_bias,"
      " Tensor content_bias, bool causal=True, float? scale=None) -> (Tensor out, Tensor lse)");
  m.def(
      "relative_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v,"
      " Tensor rel_key, Tensor rel_bias, Tensor content_bias, Tensor out, Tensor lse,"
      " bool causal=True, float? scale=None) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v,"
      " Tensor grad_rel_key, Tensor grad_rel_bias, Tensor grad_content_bias)");
  m.def(
      "affine_scaled_attention(Tensor q, Tensor k, Tensor v, Tensor alpha, Tensor "
      "alpha_mean," HEED_MASK_OPTIONS HEED_STATISTICS
      ") -> (Tensor out, Tensor softmax_out, Tensor lse)");
  m.def(
      "affine_scaled_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v,"
      " Tensor alpha, Tensor alpha_mean, Tensor softmax_out, Tensor lse, " HEED_MASK_OPTIONS
      ") -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_alpha,"
      " Tensor grad_alpha_mean)");
  m.def("depthwise_causal_conv(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor out");
  m.def(
      "depthwise_causal_conv_backward(Tensor grad_out, Tensor x, Tensor weight, Tensor? bias=None)"
      " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)");
#define HEED_LOCAL_OPTIONS "float ridge=0.1, bool causal=False, float? scale=None"
  m.def("local_linear_attention(Tensor q, Tensor k, Tensor v, " HEED_LOCAL_OPTIONS
        ") -> Tensor out");
  m.def(
      "local_linear_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor "
      "v," HEED_LOCAL_OPTIONS ") -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)");
#define HEED_ROUTER_ARGUMENTS                                                              \
  "Tensor x, Tensor wg, Tensor? wg_shared=None, Tensor? wg_group=None, *, int top_k, str " \
  "form='code'"
  m.def("moh_router(" HEED_ROUTER_ARGUMENTS ") -> (Tensor gates, Tensor load_balance_loss)");
  m.def(
      "moh_router_backward(Tensor? grad_gates, Tensor? "
      "grad_load_balance_loss, " HEED_ROUTER_ARGUMENTS
      ") -> (Tensor grad_x, Tensor grad_wg, Tensor grad_wg_shared, Tensor grad_wg_group)");
  m.def(
      "head_gated_attention(Tensor q, Tensor k, Tensor v, Tensor "
      "gates, " HEED_MASK_OPTIONS HEED_STATISTICS
      ") -> (Tensor out, Tensor attention, Tensor lse)");
  m.def(
      "head_gated_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor gates,"
      " Tensor attention, Tensor lse, " HEED_MASK_OPTIONS
      ") -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_gates)");
#define HEED_GRID_OPTIONS                                                                \
  "int[] kernel_size, int[] stride, int[] dilation, int[] is_causal, float? scale=None," \
  " Tensor? additional_keys=None, Tensor? additional_values=None, Tensor? rpb=None"
  for (const std::string name : {"na1d", "na2d", "na3d"}) {
    const std::string forward = name + "(Tensor query, Tensor key, Tensor value, " HEED_GRID_OPTIONS
                                       ") -> (Tensor out, Tensor lse)";
    const std::string backward =
        name +
        "_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value,"
        " Tensor out, Tensor lse, " HEED_GRID_OPTIONS
        ") -> (Tensor grad_query, Tensor grad_key, Tensor grad_value,"
        " Tensor grad_additional_keys, Tensor grad_additional_values, Tensor grad_rpb)";
    m.def(forward.c_str());
    m.def(backward.c_str());
  }
#define HEED_STOCHASTIC_OPTIONS "SymInt window, bool causal=True, float? scale=None"
  m.def(
      "stochastic_attention(Tensor q, Tensor k, Tensor v, Tensor "
      "permutation," HEED_STOCHASTIC_OPTIONS ") -> (Tensor out, Tensor lse)");
  m.def(
      "stochastic_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k,"
      " Tensor v, Tensor permutation, Tensor out, Tensor lse, " HEED_STOCHASTIC_OPTIONS
      ") -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)");
  // Fake tensors call every operator without tensor arguments with a device.
  m.def("random_permutation(SymInt seed, SymInt[] shape, *, Device? device=None) -> Tensor");
#define HEED_SIGMOID_OPTIONS                                                             \
  "float? bias_value=None, Tensor? bias=None, bool causal=False, SymInt window_left=-1," \
  " SymInt window_right=-1, Tensor? lengths=None, float? scale=None, Tensor? alibi_slopes=None"
  m.def("sigmoid_attention(Tensor q, Tensor k, Tensor v, " HEED_SIGMOID_OPTIONS ") -> Tensor out");
  m.def(
      "sigmoid_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor "
      "v, " HEED_SIGMOID_OPTIONS
      ", bool[5] output_mask=[True, True, True, True, True]) -> (Tensor grad_q, Tensor grad_k, "
      "Tensor grad_v, Tensor grad_bias,"
      " Tensor grad_alibi_slopes)");
#define HEED_RECURRENT_OPTIONS                                                      \
  "str normalizer='softmax', int? order=None, bool causal=True, float? scale=None," \
  " Tensor? gate=None, float? score_clamp=None, float eps=1e-06"
  m.def(
      "recurrent_softmax_attention(Tensor q, Tensor k, Tensor "
      "v, " HEED_RECURRENT_OPTIONS HEED_STATISTICS
      ") -> (Tensor out, Tensor core, Tensor statistic)");
  m.def(
      "recurrent_softmax_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v,"
      " Tensor core, Tensor statistic, " HEED_RECURRENT_OPTIONS
      ") -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_gate)");
#define HEED_LIGHTNING_ARGUMENTS                                                         \
  "Tensor q, Tensor k, Tensor v, Tensor? slopes=None, Tensor? initial_state=None, bool " \
  "return_state=False"
  // A running state is empty where return_state does not ask for it.
  m.def("lightning_attention(" HEED_LIGHTNING_ARGUMENTS ") -> (Tensor out, Tensor state)");
  m.def(
      "lightning_attention_backward(Tensor? grad_out, Tensor? grad_state, " HEED_LIGHTNING_ARGUMENTS
      ", bool[5] output_mask=[True, True, True, True, True]) -> (Tensor grad_q, Tensor grad_k, "
      "Tensor grad_v, Tensor grad_slopes,"
      " Tensor grad_initial_state)");
  // PyTorch's fake tensors ask every maker of a tensor for a device; these know the CPU.
  m.def(
      "lightning_slopes(SymInt num_heads, int? layer=None, int? num_layers=None, str form='code',"
      " *, Device? device=None) -> Tensor");
#define HEED_LINEAR_OPTIONS                                                                 \
  "bool causal=False, bool normalize=True, float eps=1e-12, Tensor? lengths=None, Tensor? " \
  "initial_s=None, Tensor? initial_z=None, bool return_state=False"
  m.def("linear_attention(Tensor q, Tensor k, Tensor v, " HEED_LINEAR_OPTIONS
        ") -> (Tensor out, Tensor s, Tensor z)");
  m.def(
      "linear_attention_backward(Tensor? grad_out, Tensor? grad_s, Tensor? grad_z, Tensor? s,"
      " Tensor? z, Tensor q, Tensor k, Tensor v, " HEED_LINEAR_OPTIONS
      ") -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_initial_s,"
      " Tensor grad_initial_z)");
#define HEED_TAYLOR_OPTIONS                                                               \
  "int order=2, float? scale=None, Tensor? initial_s=None, Tensor? initial_z=None, bool " \
  "return_state=False"
  m.def("taylor_state_attention(Tensor q, Tensor k, Tensor v, " HEED_TAYLOR_OPTIONS
        ") -> (Tensor out, Tensor s, Tensor z)");
  m.def(
      "taylor_state_attention_backward(Tensor? grad_out, Tensor? grad_s, Tensor? grad_z, Tensor q,"
      " Tensor k, Tensor v, " HEED_TAYLOR_OPTIONS
      ") -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_initial_s,"
      " Tensor grad_initial_z)");
#define HEED_MAGNITUDE_AWARE_OPTIONS                                                             \
  "bool causal=False, str form='code', SymInt[]? rope=None, float? scale=None, float eps=1e-06," \
  " Tensor? initial_s=None, Tensor? initial_k_sum=None, Tensor? initial_v_sum=None,"             \
  " Tensor? initial_count=None, bool return_state=False"
  m.def(
      "magnitude_aware_linear_attention(Tensor q, Tensor k, Tensor v, " HEED_MAGNITUDE_AWARE_OPTIONS
      ") -> (Tensor out, Tensor s, Tensor k_sum, Tensor v_sum, Tensor count)");
  m.def(
      "magnitude_aware_linear_attention_backward(Tensor? grad_out, Tensor? grad_s,"
      " Tensor? grad_k_sum, Tensor? grad_v_sum, Tensor? s, Tensor? k_sum, Tensor? v_sum,"
      " Tensor q, Tensor k, Tensor v, " HEED_MAGNITUDE_AWARE_OPTIONS
      ") -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_initial_s,"
      " Tensor grad_initial_k_sum, Tensor grad_initial_v_sum)");
#define HEED_FEATURE_ARGUMENTS "Tensor x, str kind, Tensor? weight=None, Tensor? bias=None"
  m.def("feature_map(" HEED_FEATURE_ARGUMENTS ") -> Tensor out");
  m.def("feature_map_backward(Tensor grad_out, Tensor? out, " HEED_FEATURE_ARGUMENTS
        ") -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)");
  m.def(
      "hedgehog_identity(SymInt heads, SymInt dim, SymInt width, *, Device? device=None) -> "
      "Tensor");
  m.def(
      "performer_projection(SymInt heads, SymInt features, SymInt dim, SymInt seed,"
      " bool orthogonal=True, *, Device? device=None) -> Tensor");
#define HEED_DISTILLATION_ARGUMENTS                                                          \
  "Tensor q, Tensor k, Tensor feature_q, Tensor feature_k, bool causal=False, float? scale=" \
  "None"
  m.def("attention_distillation_loss(" HEED_DISTILLATION_ARGUMENTS
        ", bool gradients=False) -> (Tensor loss, Tensor unit_feature_q, Tensor unit_feature_k)");
  m.def(
      "attention_distillation_loss_backward(Tensor grad_loss, Tensor unit_feature_q,"
      " Tensor unit_feature_k, " HEED_DISTILLATION_ARGUMENTS
      ") -> (Tensor grad_feature_q, Tensor grad_feature_k)");
#define HEED_RELU_LINEAR_ARGUMENTS \
  "Tensor q, Tensor k, Tensor v, Tensor temperature, float clamp=100.0, bool return_state=False"
  m.def("relu_linear_attention(" HEED_RELU_LINEAR_ARGUMENTS
        ") -> (Tensor out, Tensor s, Tensor z)");
  m.def(
      "relu_linear_attention_backward(Tensor grad_out, Tensor s, Tensor "
      "z, " HEED_RELU_LINEAR_ARGUMENTS
      ") -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_temperature)");
#define HEED_RPE_ARGUMENTS                                                                   \
  "Tensor q, Tensor k, Tensor v, Tensor rpb, Tensor? projection, str features='nprf', bool " \
  "causal=False, SymInt[]? grid=None, str path='auto'"
  m.def("kernelized_rpe_attention(" HEED_RPE_ARGUMENTS ") -> Tensor out");
  m.def("kernelized_rpe_attention_backward(Tensor grad_out, " HEED_RPE_ARGUMENTS
        ") -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_rpb)");
}
