"""Parameters of attention layers as training starts from them.

Each is a float32 tensor; wrap what is trained in ``torch.nn.Parameter``. The same arguments give the
same numbers on every machine.
"""

import torch
from torch import Tensor

from heed._numbers import check_sizes
from heed._seeds import signed_seed
from heed.lightning import lightning_slopes

__all__ = ["hedgehog_identity", "lightning_slopes", "random_projection"]


def hedgehog_identity(num_heads: int, dim: int, width: int | None = None) -> Tensor:
    """The start of a Hedgehog map's ``weight``: the identity for every head.

    Args:
        num_heads: ``H``; with grouped queries those of the tensor that is mapped.
        dim: ``D``, the head dim.
        width: ``D'``, the width of the map; ``None`` is ``D``. Other widths take the identity's
            first columns, or zeros behind it.

    Returns:
        ``[H, D, D']``. The map's ``bias`` starts at ``torch.zeros(H, D')``.

    Raises:
        ValueError, TypeError: numbers that are negative or not whole.

    Keep it in float32: around 1, bfloat16 values lie 0.0078 apart and small steps vanish.

    Source: The Hedgehog & the Porcupine (arXiv 2402.04347).
    """
    width = dim if width is None else width
    check_sizes("hedgehog_identity", {"num_heads": num_heads, "dim": dim, "width": width})
    return torch.ops.heed.hedgehog_identity(num_heads, dim, width)


def random_projection(
    num_heads: int, num_features: int, dim: int, *, seed: int = 0, orthogonal: bool = True
) -> Tensor:
    """Random directions of the ``performer`` features and of ``kernelized_rpe_attention``.

    Args:
        num_heads: ``H``; each head has directions of its own.
        num_features: ``M``, directions of a head.
        dim: ``D``, the head dim.
        seed: any 64-bit number.
        orthogonal: draw blocks of ``D`` directions orthogonal to each other, with the lengths of
            independent normal vectors, which lowers the variance of the estimate; else every number
            is standard normal on its own.

    Returns:
        ``[H, M, D]``. It has no gradient; store it with the model, as new ones change its outputs.

    Raises:
        ValueError, TypeError: sizes that are negative or not whole.

    Source: Rethinking Attention with Performers (arXiv 2009.14794).
    """
    sizes = {"num_heads": num_heads, "num_features": num_features, "dim": dim}
    check_sizes("random_projection", sizes)
    return torch.ops.heed.performer_projection(
        num_heads, num_features, dim, signed_seed(seed), orthogonal
    )
