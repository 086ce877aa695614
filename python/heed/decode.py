"""Softmax attention for new tokens over a cache, and results merged from parts."""

from math import prod
from typing import Literal, overload

import torch
from torch import Tensor

from heed._autocast import autocast
from heed._numbers import number
from heed._overrides import overridable

_ops = torch.ops.heed


@overload
def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = ...,
    window: int = ...,
    sink: Tensor | None = ...,
    splits: int = ...,
    softcap: float = ...,
    alibi_slopes: Tensor | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = ...,
    window: int = ...,
    sink: Tensor | None = ...,
    splits: int = ...,
    softcap: float = ...,
    alibi_slopes: Tensor | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overridable
def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    window: int = -1,
    sink: Tensor | None = None,
    splits: int = 0,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of the newest few tokens of each sequence over its key-value cache.

    Query ``i`` of sequence ``b`` sees the keys ``j <= lengths[b] - Lq + i``: the queries are the
    last tokens that the cache holds, causal among themselves. The keys are split into parts that
    are merged exactly, so that one sequence keeps all threads busy.

    Args:
        q: ``[B, H, Lq, D]``, ``Lq`` from 1 to 16; types and strides as in :func:`heed.flash_attention`.
        k_cache: ``[B, Hkv, capacity, D]``.
        v_cache: ``[B, Hkv, capacity, Dv]``.
        lengths: ``[B]``, int32 or int64, from 0 to ``capacity``: keys that exist, the newest
            ``Lq`` included. What lies behind them is never read into a result.
        scale: factor of the scores; ``None`` is ``1 / sqrt(D)``.
        window: keys to the left that a query sees besides its own; -1 sees all.
        sink: ``[H]``, a logit per head that enters the sum of a query's weights and no value.
        splits: parts that the keys are cut into; 0 chooses. The choice does not depend on the
            number of threads.
        softcap: as in :func:`heed.flash_attention`.
        alibi_slopes: ``[H]`` or ``[B, H]`` of any floating type: adds
            ``-slope[h] * (lengths[b] - Lq + i - j)`` to the scores.
        return_lse: also return ``lse``.

    Returns:
        ``out [B, H, Lq, Dv]``, with ``return_lse`` ``(out, lse)`` as in :func:`heed.flash_attention`.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`heed.flash_attention`.

    Forward only. Source: FlashAttention-2 (arXiv 2307.08691), split keys of its decoding kernel.
    """
    q, k_cache, v_cache = autocast(q, k_cache, v_cache)
    op = "decode_attention"
    out, lse = _ops.decode_attention(
        q,
        k_cache,
        v_cache,
        lengths,
        number(op, "scale", scale),
        number(op, "window", window),
        sink,
        number(op, "splits", splits),
        number(op, "softcap", softcap),
        alibi_slopes,
    )
    return (out, lse) if return_lse else out


@overridable
def merge_attention(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Merges the results of attention over two disjoint sets of keys into that over both, exactly.

    ``lse = log(exp lse_a + exp lse_b)``,
    ``out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b``.

    Args:
        out_a, out_b: ``[..., Dv]`` of one floating type and shape: ``[B, H, L, Dv]``, a grid
            ``[B, Y, X, H, Dv]`` or any other. Under ``torch.autocast`` for the CPU they are taken
            in its type.
        lse_a, lse_b: ``[...]``, as out without its last dimension, float32 (float64 beside float64
            results), as returned with ``return_lse=True``. ``-inf`` marks a query that saw no key.
            :func:`heed.flash_attention_varlen` returns ``[H, T]`` beside ``out [T, H, Dv]``: give
            ``lse.T``.

    Returns:
        ``(out, lse)`` of the same shapes and types; 0 and ``-inf`` where neither saw a key.

    More than two parts are merged one after the other, in any order.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`heed.flash_attention`.

    Differentiable. Source: online softmax, FlashAttention (arXiv 2205.14135).
    """
    out_a, out_b = autocast(out_a, out_b)
    parts = (out_a, lse_a, out_b, lse_b)
    if not all(isinstance(part, Tensor) for part in parts) or out_a.dim() in (0, 4):
        return _ops.merge_attention(*parts)
    shape, rows = out_a.shape, out_a.shape[:-1]
    needed = {"lse_a": (lse_a, rows), "out_b": (out_b, shape), "lse_b": (lse_b, rows)}
    for name, (part, size) in needed.items():
        if part.shape != size:
            raise ValueError(
                f"merge_attention: {name} has shape {list(part.shape)}, needed is {list(size)} "
                f"beside out_a {list(shape)}"
            )
    # Without the sizes of out_a none could be inferred where Dv is 0; rows.numel() would fix those that
    # torch.export leaves open.
    count = prod(rows)
    out, lse = _ops.merge_attention(
        *(part.reshape(1, 1, count, *part.shape[len(rows) :]) for part in parts)
    )
    return out.reshape(shape), lse.reshape(rows)
