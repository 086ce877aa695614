"""Neighborhood attention on grids of one, two or three axes."""

import operator
from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from heed._autocast import autocast
from heed._numbers import number
from heed._overrides import overridable

PerAxis = int | Sequence[int]
CausalPerAxis = bool | Sequence[bool] | None  # None: False


def _per_axis(op: str, name: str, value: object, axes: int) -> list:
    """One value for all axes or one for each, as values for each."""
    values = list(value) if isinstance(value, (tuple, list)) else [value] * axes
    if len(values) != axes:
        raise ValueError(
            f"{op}: {name} is {value!r}, needed is one value or one for each of the {axes} axes"
        )
    return values


def _sizes(op: str, name: str, value: PerAxis, axes: int) -> list[int]:
    """Whole numbers."""
    values = _per_axis(op, name, value, axes)
    try:
        if any(isinstance(one, bool) for one in values):
            raise TypeError
        return [
            int(one) if isinstance(one, (int, torch.SymInt)) else operator.index(one)
            for one in values
        ]
    except TypeError:
        raise TypeError(f"{op}: {name} is {value!r}, needed are whole numbers") from None


def _flags(op: str, name: str, value: CausalPerAxis, axes: int) -> list[int]:
    """Flags, also as 0 and 1."""
    values = _per_axis(op, name, False if value is None else value, axes)
    if not all(isinstance(one, int) and one in (0, 1) for one in values):
        raise TypeError(f"{op}: {name} is {value!r}, needed is True or False")
    return [int(one) for one in values]


def _neighborhood(
    axes: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: PerAxis,
    stride: PerAxis | None,
    dilation: PerAxis | None,
    is_causal: CausalPerAxis,
    scale: float | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    rpb: Tensor | None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    op = f"na{axes}d"
    query, key, value, additional_keys, additional_values = autocast(
        query, key, value, additional_keys, additional_values
    )
    out, lse = getattr(torch.ops.heed, op)(
        query,
        key,
        value,
        _sizes(op, "kernel_size", kernel_size, axes),
        _sizes(op, "stride", 1 if stride is None else stride, axes),
        _sizes(op, "dilation", 1 if dilation is None else dilation, axes),
        _flags(op, "is_causal", is_causal, axes),
        number(op, "scale", scale),
        additional_keys,
        additional_values,
        rpb,
    )
    return (out, lse) if return_lse else out


@overload
def na1d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: PerAxis,
    stride: PerAxis | None = ...,
    dilation: PerAxis | None = ...,
    is_causal: CausalPerAxis = ...,
    scale: float | None = ...,
    additional_keys: Tensor | None = ...,
    additional_values: Tensor | None = ...,
    rpb: Tensor | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def na1d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: PerAxis,
    stride: PerAxis | None = ...,
    dilation: PerAxis | None = ...,
    is_causal: CausalPerAxis = ...,
    scale: float | None = ...,
    additional_keys: Tensor | None = ...,
    additional_values: Tensor | None = ...,
    rpb: Tensor | None = ...,
    *,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overridable
def na1d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: PerAxis,
    stride: PerAxis | None = 1,
    dilation: PerAxis | None = 1,
    is_causal: CausalPerAxis = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    rpb: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Neighborhood attention on a line: every token sees the nearest ``kernel_size`` tokens.

    Layout, names and border rules are those of NATTEN: at the borders the window is pushed back
    inside, so that a query that is not causal has exactly ``kernel_size`` keys; an
    even window has its longer side in front.

    Args:
        query: ``[B, X, H, D]``, float64, float32, bfloat16 or float16; ``D`` from 1 to 256.
        key: ``[B, X, Hkv, D]``, same type; ``H`` is a multiple of ``Hkv``.
        value: ``[B, X, Hkv, Dv]``, same type. The last dimension of query, key and value has
            stride 1; all other strides are free.
        kernel_size: keys of a window; ``kernel_size * dilation`` is at most the axis.
        stride: neighbouring queries that share one window, from 1 to ``kernel_size``: 1 is
            neighborhood attention, ``kernel_size`` attention inside blocks.
        dilation: distance between the keys of a window; the axis falls into that many lines of
            their own.
        is_causal: no key behind the query's own coordinate.
        scale: factor of the scores; ``None`` is ``1 / sqrt(D)``.
        additional_keys: ``[B, n, Hkv, D]``, seen by every query in the same softmax.
        additional_values: ``[B, n, Hkv, Dv]``; given together with ``additional_keys``.
        rpb: relative biases ``[H, 2 * kernel_size - 1]``: the score of a key gets
            ``rpb[h, key - query + kernel_size - 1]``, in steps of the dilation; only for stride 1
            without causal axes.
        return_lse: also return the natural logarithm of the sum of ``exp(score)`` of each query.

    Returns:
        ``out [B, X, H, Dv]`` of query's type; with ``return_lse``, ``(out, lse)`` with
        ``lse [B, X, H]`` in float32 (float64 for float64).

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`heed.flash_attention`.

    Differentiable in all tensors, through ``out`` and ``lse``.

    Source: Faster Neighborhood Attention (arXiv 2403.04690) and Generalized Neighborhood Attention
    (arXiv 2504.16922).
    """
    return _neighborhood(
        1,
        query,
        key,
        value,
        kernel_size,
        stride,
        dilation,
        is_causal,
        scale,
        additional_keys,
        additional_values,
        rpb,
        return_lse,
    )


@overload
def na2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: PerAxis,
    stride: PerAxis | None = ...,
    dilation: PerAxis | None = ...,
    is_causal: CausalPerAxis = ...,
    scale: float | None = ...,
    additional_keys: Tensor | None = ...,
    additional_values: Tensor | None = ...,
    rpb: Tensor | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def na2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: PerAxis,
    stride: PerAxis | None = ...,
    dilation: PerAxis | None = ...,
    is_causal: CausalPerAxis = ...,
    scale: float | None = ...,
    additional_keys: Tensor | None = ...,
    additional_values: Tensor | None = ...,
    rpb: Tensor | None = ...,
    *,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overridable
def na2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: PerAxis,
    stride: PerAxis | None = 1,
    dilation: PerAxis | None = 1,
    is_causal: CausalPerAxis = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    rpb: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Neighborhood attention on a plane: windows are products of two intervals.

    Args:
        query: ``[B, Y, X, H, D]``; types and strides as in :func:`heed.na1d`.
        key: ``[B, Y, X, Hkv, D]``.
        value: ``[B, Y, X, Hkv, Dv]``.
        kernel_size, stride, dilation, is_causal: as in :func:`heed.na1d`, one value for both axes
            or one for each. Several causal axes ask for no key behind the query on each of them.
        scale, additional_keys, additional_values, return_lse: as in :func:`heed.na1d`.
        rpb: ``[H, 2 * kernel_size[0] - 1, 2 * kernel_size[1] - 1]``, as in :func:`heed.na1d`.

    Returns:
        ``out [B, Y, X, H, Dv]`` of query's type; with ``return_lse``, ``(out, lse)`` with
        ``lse [B, Y, X, H]`` in float32 (float64 for float64).

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`heed.flash_attention`.

    Differentiable in all tensors, through ``out`` and ``lse``.

    Source: Faster Neighborhood Attention (arXiv 2403.04690) and Generalized Neighborhood Attention
    (arXiv 2504.16922).
    """
    return _neighborhood(
        2,
        query,
        key,
        value,
        kernel_size,
        stride,
        dilation,
        is_causal,
        scale,
        additional_keys,
        additional_values,
        rpb,
        return_lse,
    )


@overload
def na3d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: PerAxis,
    stride: PerAxis | None = ...,
    dilation: PerAxis | None = ...,
    is_causal: CausalPerAxis = ...,
    scale: float | None = ...,
    additional_keys: Tensor | None = ...,
    additional_values: Tensor | None = ...,
    rpb: Tensor | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def na3d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: PerAxis,
    stride: PerAxis | None = ...,
    dilation: PerAxis | None = ...,
    is_causal: CausalPerAxis = ...,
    scale: float | None = ...,
    additional_keys: Tensor | None = ...,
    additional_values: Tensor | None = ...,
    rpb: Tensor | None = ...,
    *,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overridable
def na3d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: PerAxis,
    stride: PerAxis | None = 1,
    dilation: PerAxis | None = 1,
    is_causal: CausalPerAxis = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    rpb: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Neighborhood attention on a grid of three axes: windows are products of three intervals.

    Args:
        query: ``[B, Z, Y, X, H, D]``; types and strides as in :func:`heed.na1d`.
        key: ``[B, Z, Y, X, Hkv, D]``.
        value: ``[B, Z, Y, X, Hkv, Dv]``.
        kernel_size, stride, dilation, is_causal: as in :func:`heed.na1d`, one value for all axes
            or one for each. Several causal axes ask for no key behind the query on each of them.
        scale, additional_keys, additional_values, return_lse: as in :func:`heed.na1d`.
        rpb: ``[H, 2 * kernel_size[0] - 1, 2 * kernel_size[1] - 1, ...]``, as in :func:`heed.na1d`.

    Returns:
        ``out [B, Z, Y, X, H, Dv]`` of query's type; with ``return_lse``, ``(out, lse)`` with
        ``lse [B, Z, Y, X, H]`` in float32 (float64 for float64).

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`heed.flash_attention`.

    Differentiable in all tensors, through ``out`` and ``lse``.

    Source: Faster Neighborhood Attention (arXiv 2403.04690) and Generalized Neighborhood Attention
    (arXiv 2504.16922).
    """
    return _neighborhood(
        3,
        query,
        key,
        value,
        kernel_size,
        stride,
        dilation,
        is_causal,
        scale,
        additional_keys,
        additional_values,
        rpb,
        return_lse,
    )
