"""Exact softmax attention, of batches and of packed sequences."""

from typing import Literal, overload

import torch
from torch import Tensor

from heed._autocast import autocast
from heed._masks import Window, window_sides
from heed._numbers import number, whole_pair
from heed._overrides import overridable
from heed._seeds import dropout_seeds

_ops = torch.ops.heed


@overload
def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = ...,
    window: Window = ...,
    lengths: Tensor | None = ...,
    scale: float | None = ...,
    softcap: float = ...,
    alibi_slopes: Tensor | None = ...,
    mask: Tensor | None = ...,
    bias: Tensor | None = ...,
    sink: Tensor | None = ...,
    block_mask: Tensor | None = ...,
    block_size: tuple[int, int] = ...,
    dropout_p: float = ...,
    seed: int | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = ...,
    window: Window = ...,
    lengths: Tensor | None = ...,
    scale: float | None = ...,
    softcap: float = ...,
    alibi_slopes: Tensor | None = ...,
    mask: Tensor | None = ...,
    bias: Tensor | None = ...,
    sink: Tensor | None = ...,
    block_mask: Tensor | None = ...,
    block_size: tuple[int, int] = ...,
    dropout_p: float = ...,
    seed: int | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overridable
def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: Window = (-1, -1),
    lengths: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    sink: Tensor | None = None,
    block_mask: Tensor | None = None,
    block_size: tuple[int, int] = (64, 64),
    dropout_p: float = 0.0,
    seed: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact softmax attention in one pass over the keys, without an ``[Lq, Lk]`` buffer.

    ``out[b,h,i] = sum_j softmax_j(scale * q[b,h,i] . k[b,g,j]) v[b,g,j]`` over the keys ``j`` that
    query ``i`` sees, with the key head ``g = h // (H // Hkv)``.

    Args:
        q: ``[B, H, Lq, D]``, float64, float32, bfloat16 or float16; any ``D`` from 1.
        k: ``[B, Hkv, Lk, D]``, same type; ``H`` is a multiple of ``Hkv``.
        v: ``[B, Hkv, Lk, Dv]``, same type; any ``Dv`` from 1. The last dimension of q, k and v
            has stride 1; all other strides are free, nothing is copied. Under ``torch.autocast``
            for the CPU the three are taken in its type (float64 stays float64).
        causal: query ``i`` sees keys ``j <= i + Lk - Lq``: aligned to the end of the keys, so that
            the last query sees all of them. (PyTorch's ``is_causal`` aligns to the start.)
        window: ``(left, right)``: query ``i`` sees keys from ``i + Lk - Lq - left`` to
            ``i + Lk - Lq + right``; -1 leaves a side open.
        lengths: ``[B]``, int32 or int64, each from 0 to ``Lk``: keys of sequence ``b`` at and after
            ``lengths[b]`` do not exist, whatever memory holds there. Causal and window stay aligned
            to ``Lk``.
        scale: factor of the scores; ``None`` is ``1 / sqrt(D)``.
        softcap: ``c > 0`` turns scaled scores ``s`` into ``c * tanh(s / c)``; 0 leaves them.
        alibi_slopes: ``[H]`` or ``[B, H]`` of any floating type: adds
            ``-slope[h] * |i + Lk - Lq - j|`` to the scores.
        mask: boolean, broadcastable to ``[B, H, Lq, Lk]``; **True = attend**.
        bias: of any floating type, broadcastable to ``[B, H, Lq, Lk]``, added to the scores; its
            gradient is summed over the broadcast dimensions.
        sink: ``[H]`` of any floating type, a logit per head that enters the sum of a query's
            weights and no value.
        block_mask: boolean, ``[H or 1, ceil(Lq / rows), ceil(Lk / keys)]``: blocks that are not
            computed at all are False.
        block_size: ``(rows, keys)`` of the blocks, 1 or more.
        dropout_p: probability from 0 up to, not including, 1 that a weight is dropped; the others
            are scaled up. Which ones is a function of ``seed`` and the weight's place alone, so
            the backward drops the same.
        seed: of the dropout; any 64-bit number. ``None`` draws one from PyTorch's generator
            (``torch.manual_seed``) for every call that drops weights.
        return_lse: also return the natural logarithm of the sum of ``exp(score)`` of each query.

    Returns:
        ``out [B, H, Lq, Dv]`` of q's type; with ``return_lse``, ``(out, lse)`` with
        ``lse [B, H, Lq]`` in float32 (float64 for float64). A query that sees no key has
        ``out = 0`` and ``lse = -inf`` (its sink, if there is one), and all its gradients are 0.

    Raises:
        ValueError: shapes, strides or values that do not fit, the element type of a tensor beside
            q, k and v; the message names the argument.
        TypeError: an element type that is not floating or differs between q, k and v, or that no
            function takes; ``None`` in the place of a tensor, a tensor of floats in that of a
            number (its gradient would be lost).
        RuntimeError: a tensor that is not dense or not on the CPU; an argument of a kind that does
            not fit; a second derivative.

    Differentiable in q, k, v, alibi_slopes, bias and sink, through ``out`` and ``lse``.

    Source: FlashAttention (arXiv 2205.14135), FlashAttention-2 (arXiv 2307.08691).
    """
    op = "flash_attention"
    q, k, v = autocast(q, k, v)
    left, right = window_sides(op, window)
    rows, keys = _block_sides(op, block_size)
    out, lse = _ops.flash_attention(
        q,
        k,
        v,
        causal,
        left,
        right,
        lengths,
        number(op, "scale", scale),
        number(op, "softcap", softcap),
        alibi_slopes,
        mask,
        bias,
        sink,
        block_mask,
        rows,
        keys,
        number(op, "dropout_p", dropout_p),
        *dropout_seeds(seed, dropout_p),
    )
    return (out, lse) if return_lse else out


def _block_sides(op: str, block_size: tuple[int, int]) -> tuple[int, int]:
    sides = whole_pair(op, "block_size", block_size, "two whole numbers (rows, keys)")
    if sides[0] < 1 or sides[1] < 1:
        raise ValueError(f"{op}: block_size is {block_size!r}, needed are positive numbers")
    return sides


@overload
def flash_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    causal: bool = ...,
    window: Window = ...,
    scale: float | None = ...,
    softcap: float = ...,
    alibi_slopes: Tensor | None = ...,
    sink: Tensor | None = ...,
    dropout_p: float = ...,
    seed: int | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def flash_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    causal: bool = ...,
    window: Window = ...,
    scale: float | None = ...,
    softcap: float = ...,
    alibi_slopes: Tensor | None = ...,
    sink: Tensor | None = ...,
    dropout_p: float = ...,
    seed: int | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overridable
def flash_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    causal: bool = False,
    window: Window = (-1, -1),
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`flash_attention` of sequences of different lengths packed one behind the other.

    Args:
        q: ``[Tq, H, D]``: all queries; sequence ``b`` has the rows from ``cu_seqlens_q[b]`` up to,
            not including, ``cu_seqlens_q[b + 1]``. Types and strides as in :func:`flash_attention`.
        k: ``[Tk, Hkv, D]``.
        v: ``[Tk, Hkv, Dv]``.
        cu_seqlens_q: ``[sequences + 1]``, int32 or int64, from 0 to ``Tq``, never decreasing.
        cu_seqlens_k: the same for keys, up to ``Tk``.
        causal, window, scale, softcap, alibi_slopes, sink: as in :func:`flash_attention`, each
            sequence on its own: causal is aligned to the end of its keys, slopes ``[B, H]`` have a
            row for each.
        dropout_p, seed: as in :func:`flash_attention`: of sequence ``b`` the weights are dropped
            that are dropped there of entry ``b`` of a batch.
        return_lse: also return ``lse``.

    Returns:
        ``out [Tq, H, Dv]``; with ``return_lse``, ``(out, lse)`` with ``lse [H, Tq]``.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`flash_attention`.

    Differentiable in q, k, v, alibi_slopes and sink. Source: FlashAttention-2 (arXiv 2307.08691).
    """
    op = "flash_attention_varlen"
    q, k, v = autocast(q, k, v)
    left, right = window_sides(op, window)
    out, lse = _ops.flash_attention_varlen(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        causal,
        left,
        right,
        number(op, "scale", scale),
        number(op, "softcap", softcap),
        alibi_slopes,
        sink,
        number(op, "dropout_p", dropout_p),
        *dropout_seeds(seed, dropout_p),
    )
    return (out, lse) if return_lse else out
