"""Exact softmax attention: whole, for one new token, and merged from parts."""

from typing import Literal, overload

import torch
from torch import Tensor

from heed._masks import Window, window_sides

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
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: Window = (-1, -1),
    lengths: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact softmax attention in one pass over the keys, without an ``[Lq, Lk]`` buffer.

    ``out[b,h,i] = sum_j softmax_j(scale * q[b,h,i] . k[b,g,j]) v[b,g,j]`` over the keys ``j`` that
    query ``i`` sees, with the key head ``g = h // (H // Hkv)``.

    Args:
        q: ``[B, H, Lq, D]``, float64, float32, bfloat16 or float16; ``D`` from 1 to 256.
        k: ``[B, Hkv, Lk, D]``, same type; ``H`` is a multiple of ``Hkv``.
        v: ``[B, Hkv, Lk, Dv]``, same type; ``Dv`` from 1 to 256. The last dimension of q, k and v
            has stride 1; all other strides are free, nothing is copied.
        causal: query ``i`` sees keys ``j <= i + Lk - Lq``: aligned to the end of the keys, so that
            the last query sees all of them. (PyTorch's ``is_causal`` aligns to the start.)
        window: ``(left, right)``: query ``i`` sees keys from ``i + Lk - Lq - left`` to
            ``i + Lk - Lq + right``; -1 leaves a side open.
        lengths: ``[B]``, int32 or int64, each from 0 to ``Lk``: keys of sequence ``b`` at and after
            ``lengths[b]`` do not exist, whatever memory holds there. Causal and window stay aligned
            to ``Lk``.
        scale: factor of the scores; ``None`` is ``1 / sqrt(D)``.
        return_lse: also return the natural logarithm of the sum of ``exp(score)`` of each query.

    Returns:
        ``out [B, H, Lq, Dv]`` of q's type; with ``return_lse``, ``(out, lse)`` with
        ``lse [B, H, Lq]`` in float32 (float64 for float64). A query that sees no key has
        ``out = 0`` and ``lse = -inf``.

    Raises:
        ValueError: shapes, strides or values that do not fit; the message names the argument.
        TypeError: an element type that is not floating or differs between q, k and v.
        RuntimeError: a tensor that is not dense or not on the CPU; ``backward`` (forward only yet).

    Source: FlashAttention (arXiv 2205.14135), FlashAttention-2 (arXiv 2307.08691).
    """
    left, right = window_sides("flash_attention", window)
    out, lse = _ops.flash_attention(
        q,
        k,
        v,
        causal=causal,
        window_left=left,
        window_right=right,
        lengths=lengths,
        scale=scale,
    )
    return (out, lse) if return_lse else out


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Drop-in for ``torch.nn.functional.scaled_dot_product_attention`` on the CPU.

    Args:
        query: ``[..., H, Lq, D]`` with any number of leading dimensions, none included.
        key: ``[..., Hkv, Lk, D]``; leading dimensions broadcast as in PyTorch.
        value: ``[..., Hkv, Lk, Dv]``.
        attn_mask: must be ``None`` (see ``lengths`` and ``window`` of :func:`flash_attention`).
        dropout_p: must be 0.
        is_causal: query ``i`` sees keys ``j <= i``: aligned to the **start** of the keys, as
            PyTorch does it. :func:`flash_attention` aligns to the end.
        scale: factor of the scores; ``None`` is ``1 / sqrt(D)``.
        enable_gqa: allow ``H`` to be a multiple of ``Hkv``.

    Returns:
        ``[..., H, Lq, Dv]`` of the type of ``query``. A query that sees no key gives 0.

    Tensors whose last dimension has no unit stride, and leading dimensions that no view can join
    into one, are copied, as PyTorch does it.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`flash_attention`.

    Source: FlashAttention (arXiv 2205.14135); semantics of PyTorch.
    """
    op = "scaled_dot_product_attention"
    if attn_mask is not None:
        raise ValueError(
            f"{op}: attn_mask is given, needed is None: masks as tensors are not offered; "
            "is_causal, or lengths and window of heed.flash_attention, cover the usual ones"
        )
    if dropout_p != 0.0:
        raise ValueError(f"{op}: dropout_p is {dropout_p}, needed is 0: dropout is not offered")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() < 2:
            raise ValueError(
                f"{op}: {name} has shape {list(tensor.shape)}, needed are 2 or more dimensions"
            )
    lead = _leading_shape(op, query, key, value, enable_gqa)
    q, k, v = (_as_4d(t, lead, enable_gqa) for t in (query, key, value))
    queries = q.shape[2]
    right = -1
    if is_causal:
        # Keys after the last query are seen by none; the rest of the top-left triangle is a window
        # that ends Lq - Lk keys to the right of the diagonal that is aligned to the end.
        k, v = k[:, :, :queries], v[:, :, :queries]
        right = queries - k.shape[2]
    out, _ = _ops.flash_attention(q, k, v, window_right=right, scale=scale)
    return out.reshape(lead + out.shape[2:])


def _leading_shape(
    op: str, query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> torch.Size:
    """The shape of the result before its last two dimensions."""
    shapes = [t.shape[:-2] for t in (query, key, value)]
    if enable_gqa:
        if min(len(s) for s in shapes) < 1:
            raise ValueError(f"{op}: enable_gqa needs 3 or more dimensions, heads third to last")
        shapes = [s[:-1] for s in shapes]
    try:
        lead = torch.broadcast_shapes(*shapes)
    except RuntimeError as error:
        shown = ", ".join(
            f"{name} {list(t.shape)}"
            for name, t in (("query", query), ("key", key), ("value", value))
        )
        hint = "" if enable_gqa else " (different head counts need enable_gqa=True)"
        raise ValueError(f"{op}: leading dimensions do not broadcast: {shown}{hint}") from error
    return torch.Size(lead + query.shape[-3:-2]) if enable_gqa else torch.Size(lead)


def _as_4d(tensor: Tensor, lead: torch.Size, keep_heads: bool) -> Tensor:
    """``[B, H, L, D]``: leading dimensions broadcast to those of the result and joined."""
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        tensor = tensor.contiguous()
    if keep_heads:
        lead = lead[:-1] + tensor.shape[-3:-2]
    tensor = tensor.expand(lead + tensor.shape[-2:])
    while tensor.dim() < 4:
        tensor = tensor.unsqueeze(0)
    return tensor.flatten(0, -4)


@overload
def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = ...,
    window: int = ...,
    splits: int = ...,
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
    splits: int = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    window: int = -1,
    splits: int = 0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of the newest few tokens of each sequence over its key-value cache.

    Query ``i`` of sequence ``b`` sees the keys ``j <= lengths[b] - Lq + i``: the queries are the
    last tokens that the cache holds, causal among themselves. The keys are split into parts that
    are merged exactly, so that one sequence keeps all threads busy.

    Args:
        q: ``[B, H, Lq, D]``, ``Lq`` from 1 to 16; types and strides as in :func:`flash_attention`.
        k_cache: ``[B, Hkv, capacity, D]``.
        v_cache: ``[B, Hkv, capacity, Dv]``.
        lengths: ``[B]``, int32 or int64, from 0 to ``capacity``: keys that exist, the newest
            ``Lq`` included. What lies behind them is never read into a result.
        scale: factor of the scores; ``None`` is ``1 / sqrt(D)``.
        window: keys to the left that a query sees besides its own; -1 sees all.
        splits: parts that the keys are cut into; 0 chooses. The choice does not depend on the
            number of threads.
        return_lse: also return ``lse``.

    Returns:
        ``out [B, H, Lq, Dv]``, with ``return_lse`` ``(out, lse)`` as in :func:`flash_attention`.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`flash_attention`.

    Forward only. Source: FlashAttention-2 (arXiv 2307.08691), split keys of its decoding kernel.
    """
    out, lse = _ops.decode_attention(
        q, k_cache, v_cache, lengths, scale=scale, window=window, splits=splits
    )
    return (out, lse) if return_lse else out


def merge_attention(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Merges the results of attention over two disjoint sets of keys into that over both, exactly.

    ``lse = log(exp lse_a + exp lse_b)``,
    ``out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b``.

    Args:
        out_a, out_b: ``[B, H, L, Dv]`` of one floating type.
        lse_a, lse_b: ``[B, H, L]``, float32 (float64 beside float64 results), as returned with
            ``return_lse=True``. ``-inf`` marks a query that saw no key.

    Returns:
        ``(out, lse)`` of the same shapes and types; 0 and ``-inf`` where neither saw a key.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`flash_attention`.

    Source: online softmax, FlashAttention (arXiv 2205.14135).
    """
    return _ops.merge_attention(out_a, lse_a, out_b, lse_b)
