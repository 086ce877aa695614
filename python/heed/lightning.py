"""Lightning attention: causal linear attention with exponential decay."""

from typing import Literal, overload

import torch
from torch import Tensor

from heed._autocast import autocast
from heed._numbers import number
from heed._overrides import overridable
from heed._states import whole_of

SlopesForm = Literal["code", "paper", "fla"]


@overload
def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor | None = ...,
    *,
    initial_state: Tensor | None = ...,
    return_state: Literal[False] = ...,
) -> Tensor: ...
@overload
def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor | None = ...,
    *,
    initial_state: Tensor | None = ...,
    return_state: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overridable
def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention without a softmax: a sum over the past that fades by ``exp(-slope)`` a token.

    ``S_t = exp(-slopes[h]) S_{t-1} + k_t^T v_t`` and ``out_t = q_t S_t``, which is ``sum over s <= t
    of exp(-slopes[h] (t - s)) (q_t . k_s) v_s``: no scale, no denominator, no feature map. Time and
    memory are linear in the number of tokens.

    Args:
        q: ``[B, H, Lq, D]``; types and strides as in :func:`heed.flash_attention`, any ``D``.
        k: ``[B, Hkv, Lk, D]``, same type; ``H`` is a multiple of ``Hkv``. Query ``i`` sees keys
            ``j <= i + Lk - Lq``.
        v: ``[B, Hkv, Lk, Dv]``, same type, any ``Dv``.
        slopes: ``[H]``, any floating type, not negative; ``None`` is no decay.
            :func:`heed.lightning_slopes` gives those of published models.
        initial_state: ``[B, H, D, Dv]`` float32 (float64 beside float64), the state after the
            token before these; ``None`` is zero. Needs ``Lq <= Lk``.
        return_state: also return the state after the last token.

    Returns:
        ``out [B, H, Lq, Dv]`` of q's type; with ``return_state``, ``(out, state)`` with ``state
        [B, H, D, Dv]``, the ``initial_state`` of the tokens that follow.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`heed.flash_attention`.

    On processors with bfloat16 products, bfloat16 calls of 32 keys and more round the float32 state,
    and what keys and queries of a chunk make of each other, where products read them: results are
    about ``2e-3 |q| |S|`` off, which shows where they cancel.

    Differentiable in q, k, v, slopes and initial_state, through ``out`` and ``state``.

    Source: Lightning Attention-2 (arXiv 2401.04658), Various Lengths, Constant Speed: Efficient
    Language Modeling with Lightning Attention (arXiv 2405.17381), TransNormerLLM (arXiv
    2307.14995).
    """
    q, k, v = autocast(q, k, v)
    out, state = torch.ops.heed.lightning_attention(
        q,
        k,
        v,
        slopes,
        whole_of("lightning_attention", initial_state),
        return_state,
    )
    return (out, state) if return_state else out


def lightning_slopes(
    num_heads: int,
    layer: int | None = None,
    num_layers: int | None = None,
    form: SlopesForm = "code",
) -> Tensor:
    """Slopes of the heads of one layer, float32 ``[num_heads]``, for :func:`lightning_attention`.

    Args:
        num_heads: heads of the layer, 1 to 1048576.
        layer, num_layers: which layer of how many; give both or neither. Later layers decay less.
            Without them the factor of the layer is 1.
        form: with ``H = num_heads``, ``l = layer`` and ``L = num_layers``,

            ``"code"``
                the published models: ALiBi slopes (``2**(-8 h / H)`` for a power of two ``H``)
                times ``1 - l / (L - 1) + 1e-5``; ``l`` from 0, ``L >= 2``
            ``"paper"``
                ``(8 h / H) (1 - l / L)``, ``h`` and ``l`` from 1 (arXiv 2405.17381, eq. 10)
            ``"fla"``
                the same with ``h`` and ``l`` from 0 (flash-linear-attention)

    Raises:
        ValueError: for an unknown form and for numbers out of range.
    """
    op = "lightning_slopes"
    return torch.ops.heed.lightning_slopes(
        number(op, "num_heads", num_heads),
        number(op, "layer", layer),
        number(op, "num_layers", num_layers),
        form,
    )
