"""One call of every attention function, for tests that go through all of them."""

import heed
import torch
from reference import random

Q = random(2, 4, 5, 8)
K = random(2, 2, 5, 8, seed=1)
V = random(2, 2, 5, 6, seed=2)
GRID = [random(1, 3, 4, 2, 8, seed=seed) for seed in range(3)]
FEATURES = [t.exp() for t in (Q, K)]

# By name: the tensors that have the type of the first, all other arguments, and the numbers.
CALLS = {
    "affine_scaled_attention": (
        {"q": Q, "k": K, "v": V},
        {"alpha": random(2, 4, 5).sigmoid(), "alpha_mean": random(4).sigmoid()},
        ["scale"],
    ),
    "attention_distillation_loss": (
        {"q": Q, "k": K, "feature_q": FEATURES[0], "feature_k": FEATURES[1]},
        {},
        ["scale"],
    ),
    "decode_attention": (
        {"q": Q, "k_cache": K, "v_cache": V},
        {"lengths": torch.tensor([5, 5])},
        ["scale", "window", "splits", "softcap"],
    ),
    "depthwise_causal_conv": ({"x": Q}, {"weight": random(8, 3), "bias": random(8)}, []),
    "feature_map": (
        {"x": Q},
        {"kind": "hedgehog_softmax", "weight": random(4, 8, 6), "bias": random(4, 6)},
        [],
    ),
    "flash_attention": (
        {"q": Q, "k": K, "v": V},
        {"causal": True, "alibi_slopes": random(4), "bias": random(5), "sink": random(4)},
        ["scale", "softcap", "dropout_p"],
    ),
    "flash_attention_varlen": (
        {"q": Q[0].transpose(0, 1), "k": K[0].transpose(0, 1), "v": V[0].transpose(0, 1)},
        {"cu_seqlens_q": torch.tensor([0, 2, 5]), "cu_seqlens_k": torch.tensor([0, 3, 5])},
        ["scale", "softcap", "dropout_p"],
    ),
    "head_gated_attention": ({"q": Q, "k": K, "v": V}, {"gates": random(2, 4, 5)}, ["scale"]),
    "kernelized_rpe_attention": (
        {"q": Q, "k": K, "v": V},
        {"rpb": random(4, 9), "projection": random(4, 7, 8)},
        [],
    ),
    "lightning_attention": ({"q": Q, "k": K, "v": V}, {"slopes": random(4).abs()}, []),
    "linear_attention": ({"q": FEATURES[0], "k": FEATURES[1], "v": V}, {}, ["eps"]),
    "local_linear_attention": ({"q": Q, "k": K, "v": V}, {}, ["ridge", "scale"]),
    "magnitude_aware_linear_attention": ({"q": Q, "k": K, "v": V}, {}, ["scale", "eps"]),
    "moh_router": (
        {"x": Q[0]},
        {"wg": random(4, 8), "wg_shared": random(2, 8), "wg_group": random(2, 8), "top_k": 2},
        ["top_k"],
    ),
    "na2d": (
        dict(zip(("query", "key", "value"), GRID))
        | {"additional_keys": random(1, 3, 2, 8), "additional_values": random(1, 3, 2, 8)},
        {"kernel_size": 3, "rpb": random(2, 5, 5)},
        ["scale"],
    ),
    "parallax_attention": (
        {"q": Q, "r": random(2, 4, 5, 8, seed=3), "k": K, "v": V},
        {},
        ["scale"],
    ),
    "recurrent_softmax_attention": (
        {"q": Q, "k": K, "v": V},
        {"gate": random(2, 4, 5)},
        ["order", "scale", "score_clamp", "eps"],
    ),
    "relative_attention": (
        {"q": Q, "k": K, "v": V},
        {
            "rel_key": random(12, 4, 8),
            "rel_bias": random(12, 4),
            "content_bias": random(4, 8),
        },
        ["scale"],
    ),
    "relu_linear_attention": (
        {"q": Q, "k": K, "v": V},
        {"temperature": random(4), "clamp": 0.5},
        ["clamp"],
    ),
    "scaled_dot_product_attention": (
        {"query": Q, "key": K, "value": V},
        {"enable_gqa": True},
        ["scale", "dropout_p"],
    ),
    "sigmoid_attention": (
        {"q": Q, "k": K, "v": V},
        {"bias": random(4), "alibi_slopes": random(4)},
        ["scale"],
    ),
    "stochastic_attention": (
        {"q": Q, "k": K, "v": V},
        {"permutation": torch.randperm(5), "window": 3},
        ["window", "scale"],
    ),
    "taylor_state_attention": ({"q": Q, "k": K, "v": V}, {}, ["order", "scale"]),
}


def call(name, tensors=None, **options):
    """`name` with its arguments, these instead of its own; a tuple of results."""
    own, others, _ = CALLS[name]
    results = getattr(heed, name)(**(own | (tensors or {}) | others | options))
    return results if isinstance(results, tuple) else (results,)
