"""Mixture-of-Head attention: the router."""

from typing import Literal

import torch
from torch import Tensor

from heed._autocast import autocast
from heed._numbers import number
from heed._overrides import overridable


@overridable
def moh_router(
    x: Tensor,
    wg: Tensor,
    wg_shared: Tensor | None = None,
    wg_group: Tensor | None = None,
    *,
    top_k: int,
    form: Literal["code", "paper"] = "code",
) -> tuple[Tensor, Tensor]:
    """Which heads each token uses, and how much.

    Shared heads are always on; of the ``E`` routed ones a token uses the ``top_k`` with the largest
    logits ``wg x`` (ties go to the lower head). The gates go to :func:`heed.head_gated_attention`.

    Args:
        x: ``[B, L, C]``, float64, float32, bfloat16 or float16.
        wg: ``[E, C]`` of any floating type, as the other weights.
        wg_shared: ``[hs, C]`` for ``hs`` shared heads; ``None`` for none, or for one.
        wg_group: ``[2, C]``, the balance between shared and routed heads; ``None`` where there is
            only one of the two kinds.
        top_k: routed heads of a token, 0 where all heads are shared.
        form: ``"code"`` (the published models: gates near 1) or ``"paper"`` (plain softmax).

    Returns:
        ``(gates [B, H, L], load_balance_loss [])`` with ``H = hs + E``, shared heads first; gates
        of x's type, the loss float32 (float64 for float64).

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`heed.flash_attention`.

    Differentiable in x and the weights, the chosen heads counting as constants.

    Source: MoH (arXiv 2410.11842).
    """
    (x,) = autocast(x)
    top_k = number("moh_router", "top_k", top_k)
    return torch.ops.heed.moh_router(x, wg, wg_shared, wg_group, top_k=top_k, form=form)
