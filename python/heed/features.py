"""Feature maps of linear attention."""

from typing import Literal

import torch
from torch import Tensor

from heed._autocast import autocast
from heed._overrides import overridable

FeatureKind = Literal[
    "elu1",
    "relu",
    "exp",
    "hedgehog_exp",
    "hedgehog_softmax",
    "hedgehog_exp_max",
    "hedgehog_joint",
    "taylor2",
    "performer",
]


@overridable
def feature_map(
    x: Tensor, kind: FeatureKind, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Features ``phi(x)`` whose products ``phi(q) . phi(k)`` stand for ``exp(q . k)``.

    With ``z = x weight[h] + bias[h]`` of width ``D'`` (``z = x`` without a weight):

    ====================  ============================================================  ==============
    kind                  ``phi``                                                       ``F``
    ====================  ============================================================  ==============
    ``elu1``              ``z + 1`` where ``z > 0``, else ``exp(z)``                    ``D'``
    ``relu``              ``max(z, 0)``                                                 ``D'``
    ``exp``               ``exp(z)``                                                    ``D'``
    ``hedgehog_exp``      ``[exp(z), exp(-z)]``                                         ``2 D'``
    ``hedgehog_softmax``  ``[softmax(z), softmax(-z)]``                                 ``2 D'``
    ``hedgehog_exp_max``  ``[exp(z - max z), exp(min z - z)]``                          ``2 D'``
    ``hedgehog_joint``    ``softmax([2 z, -2 z])``                                      ``2 D'``
    ``taylor2``           ``[1, y, y y^T / sqrt(2)]``, ``y = z / D'**0.25``             ``1 + D' + D'^2``
    ``performer``         ``exp(w_r . y - |y|^2 / 2) / sqrt(M)``, ``y = x / D**0.25``   ``M``
    ====================  ============================================================  ==============

    The four Hedgehog kinds are different functions: a model trained with one is wrong with another.
    ``exp``, ``hedgehog_exp`` and ``performer`` overflow where their exponent does (88; float16: 11);
    the other Hedgehog kinds never do, and are at least 1e-12 (float16: 6e-8). In float16 the
    gradients that return to features so small may overflow: train with float32 or bfloat16.

    Args:
        x: ``[B, H, L, D]``; types and strides as in :func:`heed.flash_attention`.
        kind: one of the names above.
        weight: ``[H, D, D']`` of any floating type; ``None`` is the identity. For ``performer`` the
            directions ``[H, M, D]``, which it needs (:func:`heed.nn.random_projection`).
        bias: ``[H, D']`` of any floating type; none for ``performer``.

    Returns:
        ``[B, H, L, F]`` of x's type, computed in float32 (float64 for float64).

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`heed.flash_attention`.

    Differentiable in x, weight and bias.

    Source: The Hedgehog & the Porcupine (arXiv 2402.04347), Transformers are RNNs (arXiv
    2006.16236), Rethinking Attention with Performers (arXiv 2009.14794), On the Expressiveness of
    Softmax Attention (arXiv 2507.23632).
    """
    (x,) = autocast(x)
    return torch.ops.heed.feature_map(x, kind, weight, bias)
