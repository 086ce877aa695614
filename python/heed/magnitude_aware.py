"""MALA: linear attention that keeps the magnitude of the query."""

from typing import Literal, overload

import torch
from torch import Tensor

from heed._autocast import autocast
from heed._gradients import may_follow
from heed._numbers import number
from heed._overrides import overridable
from heed._states import parts_of

MagnitudeAwareForm = Literal["code", "paper", "consistent"]
MagnitudeAwareState = tuple[Tensor, Tensor, Tensor, Tensor]


@overload
def magnitude_aware_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = ...,
    form: MagnitudeAwareForm = ...,
    rope: tuple[int, int] | None = ...,
    scale: float | None = ...,
    eps: float = ...,
    initial_state: MagnitudeAwareState | None = ...,
    return_state: Literal[False] = ...,
) -> Tensor: ...
@overload
def magnitude_aware_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = ...,
    form: MagnitudeAwareForm = ...,
    rope: tuple[int, int] | None = ...,
    scale: float | None = ...,
    eps: float = ...,
    initial_state: MagnitudeAwareState | None = ...,
    return_state: Literal[True],
) -> tuple[Tensor, MagnitudeAwareState]: ...
@overridable
def magnitude_aware_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    form: MagnitudeAwareForm = "code",
    rope: tuple[int, int] | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
    initial_state: MagnitudeAwareState | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, MagnitudeAwareState]:
    """Linear attention whose weights sharpen with the magnitude of the query.

    With ``phi(x) = elu(x) + 1``, ``S = sum_j rot(phi(k_j))^T v_j``, ``k_sum = sum_j phi(k_j)`` and
    ``v_sum = sum_j v_j`` over the ``N`` keys that query ``i`` sees,

    ``out_i = (1 + 1 / (z_i + eps)) c rot(phi(q_i)) S - z_i v_sum / N``

    where ``z_i = (scale / N) phi(q_i) . k_sum`` and ``c = scale / N`` in the form of the published
    weights, ``"code"``, and ``z_i = phi(q_i) . k_sum`` and ``c = 1`` in the paper's. The two are
    different functions. ``"consistent"`` is ``"code"`` with ``rot(phi)`` in ``z`` and ``k_sum`` too.
    The weights of a query sum to 1 without ``rope``, and with it in the form ``"consistent"``.

    Args:
        q: ``[B, H, Lq, D]``, not activated yet; types and strides as in
            :func:`heed.flash_attention`, with ``rope`` ``D`` is a multiple of 4.
        k: ``[B, Hkv, Lk, D]``, same type; ``H`` is a multiple of ``Hkv``.
        v: ``[B, Hkv, Lk, Dv]``, same type, any ``Dv``.
        causal: query ``i`` sees the keys ``j <= i + Lk - Lq``, and ``N`` counts them; else all.
        form: ``"code"``, ``"paper"`` or ``"consistent"``.
        rope: height and width of the grid on which the tokens lie row by row: features turn by row
            and column (``rot`` above), not in ``z`` but for ``"consistent"``, where ``z`` may come
            near 0 or turn negative. Without causal it has ``Lq = Lk`` tokens.
        scale: not in the form ``"paper"``; ``None`` is ``1 / sqrt(D)``.
        eps: beside ``z``, not negative.
        initial_state: what ``return_state`` gave for the tokens before these; ``None`` is zero. Only
            with causal; needs ``Lq <= Lk``. Positions of ``rope`` go on from its count.
        return_state: also return the state after the last token; only with causal.

    Returns:
        ``out [B, H, Lq, Dv]`` of q's type, 0 where nothing is seen; with ``return_state``, ``(out,
        state)`` with ``state = (S [B, H, D, Dv], k_sum [B, H, D], v_sum [B, H, Dv], count [B])``
        float32 (float64 for float64), the count being that of the tokens so far, at most 2**24 in
        float32.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`heed.flash_attention`; a ``scale`` in the
            paper's form is a ValueError.

    Differentiable in q, k, v and the sums of initial_state, through ``out`` and the sums of the
    state.

    Source: Rectifying Magnitude Neglect in Linear Attention (arXiv 2507.00698).
    """
    op = "magnitude_aware_linear_attention"
    if return_state and not causal:
        raise ValueError(
            f"{op}: return_state without causal, needed is causal=True: only a causal call has a state"
        )
    q, k, v = autocast(q, k, v)
    # Not causal, the state spares the backward a sum over all keys.
    in_backward = not causal and may_follow(q, k, v)
    s, k_sum, v_sum, count = parts_of(op, initial_state, ("S", "k_sum", "v_sum", "count"))
    out, *state = torch.ops.heed.magnitude_aware_linear_attention(
        q,
        k,
        v,
        causal,
        form,
        rope,
        number(op, "scale", scale),
        number(op, "eps", eps),
        s,
        k_sum,
        v_sum,
        count,
        return_state or in_backward,
    )
    return (out, tuple(state)) if return_state else out
