"""Softmax attention cut off at a Taylor polynomial, as a recurrence."""

from typing import Literal, overload

import torch
from torch import Tensor

from heed._autocast import autocast
from heed._numbers import number
from heed._overrides import overridable
from heed._states import parts_of

TaylorState = tuple[Tensor, Tensor]


@overload
def taylor_state_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    order: int = ...,
    scale: float | None = ...,
    initial_state: TaylorState | None = ...,
    return_state: Literal[False] = ...,
) -> Tensor: ...
@overload
def taylor_state_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    order: int = ...,
    scale: float | None = ...,
    initial_state: TaylorState | None = ...,
    return_state: Literal[True],
) -> tuple[Tensor, TaylorState]: ...
@overridable
def taylor_state_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    order: int = 2,
    scale: float | None = None,
    initial_state: TaylorState | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, TaylorState]:
    """Causal softmax attention with ``sum of x**n / n! for n <= order`` in the place of ``exp(x)``.

    ``out_i = sum_j T(x_ij) v_j / d_i`` with ``x_ij = scale q_i . k_j`` and ``d_i = sum_j T(x_ij)``
    over ``j <= i + Lk - Lq``: the numbers of ``recurrent_softmax_attention(order=order)``, computed
    with a state whose size does not depend on the number of tokens. An even order that starts from
    no state takes the products of all pairs while these are fewer.

    Args:
        q: ``[B, H, Lq, D]``; shapes, types and strides as in :func:`heed.flash_attention`.
        k: ``[B, Hkv, Lk, D]``.
        v: ``[B, Hkv, Lk, Dv]``, any ``Dv``.
        order: degree of the polynomial, 0 to 3. An odd order may have denominators near 0: one below
            1e-12 in size counts as that, with its sign.
        scale: factor of the scores; ``None`` is ``1 / sqrt(D)``.
        initial_state: what ``return_state`` gave for the tokens before these; ``None`` is zero.
            Needs ``Lq <= Lk``.
        return_state: also return the state after the last token.

    Returns:
        ``out [B, H, Lq, Dv]`` of q's type, 0 for a query that sees no key; with ``return_state``,
        ``(out, state)`` with ``state = (S [B, H, n, Dv], z [B, H, n])`` float32 (float64 for
        float64). It sums over keys the ``n = binomial(D + order, order)`` products of up to
        ``order`` elements of the key, each unordered choice once, by degree and in lexical order,
        times the value (``S``) and alone (``z``). It is the same for every scale.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`heed.flash_attention`.

    Differentiable in q, k, v and initial_state, through ``out`` and the state.

    Source: On the Expressiveness of Softmax Attention: A Recurrent Neural Network Perspective
    (arXiv 2507.23632).
    """
    op = "taylor_state_attention"
    q, k, v = autocast(q, k, v)
    s, z = parts_of(op, initial_state, ("S", "z"))
    out, s, z = torch.ops.heed.taylor_state_attention(
        q,
        k,
        v,
        number(op, "order", order),
        number(op, "scale", scale),
        s,
        z,
        return_state,
    )
    return (out, (s, z)) if return_state else out
