"""PyTorch's own attention function on heed's kernels."""

import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from heed._autocast import autocast
from heed._numbers import number
from heed._seeds import drawn_seed

if TYPE_CHECKING:
    from torch.nn.attention.bias import CausalBias

_ops = torch.ops.heed
_STRIDED = torch.strided
# What the arguments of flash_attention are called here.
_NAMES = {
    "flash_attention": "scaled_dot_product_attention",
    "q": "query",
    "k": "key",
    "v": "value",
    "mask": "attn_mask",
    "bias": "attn_mask",
}


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
        attn_mask: broadcastable to ``[..., H, Lq, Lk]``: boolean (True = attend) or floating,
            added to the scores; or a ``torch.nn.attention.bias.CausalBias`` of ``[Lq, Lk]``. Not
            together with ``is_causal``.
        dropout_p: probability that a weight is dropped, 1 included; the seed comes from PyTorch's
            generator.
        is_causal: query ``i`` sees keys ``j <= i``: aligned to the **start** of the keys, as
            PyTorch does it. :func:`heed.flash_attention` aligns to the end.
        scale: factor of the scores; ``None`` is ``1 / sqrt(D)``.
        enable_gqa: allow ``H`` to be a multiple of ``Hkv``.

    Returns:
        ``[..., H, Lq, Dv]`` of the type of ``query``, or of ``torch.autocast`` where that is on for
        the CPU (float64 stays float64). A query that sees no key gives 0.

    Tensors whose last dimension has no unit stride, and leading dimensions that no view can join
    into one, are copied, as PyTorch does it.

    Raises:
        TypeError: an argument is no tensor, or a nested or sparse one; ``attn_mask`` is neither
            boolean nor floating.
        ValueError, TypeError, RuntimeError: as :func:`heed.flash_attention`.

    Source: FlashAttention (arXiv 2205.14135); semantics of PyTorch.
    """
    op = "scaled_dot_product_attention"
    tensors = (query, key, value)  # a CausalBias has a __torch_function__ for PyTorch's own function
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(
            scaled_dot_product_attention,
            tensors,
            *tensors,
            attn_mask,
            dropout_p,
            is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )
    if attn_mask is not None and is_causal:
        raise ValueError(f"{op}: attn_mask and is_causal are given, needed is one of them")
    query, key, value = autocast(query, key, value)
    lead: torch.Size | None = None
    if _reads_as_is(query, key, value, enable_gqa):  # as most calls are
        q, k, v = query, key, value
    else:
        lead = _leading_shape(op, query, key, value, enable_gqa)
        q, k, v = (_as_4d(t, lead, enable_gqa) for t in (query, key, value))
    options: dict[str, Tensor | float] = {}
    if scale is not None:
        options["scale"] = number(op, "scale", scale)
    if attn_mask is not None and type(attn_mask) is not Tensor:
        # Needs torch._dynamo, which takes as long to import as PyTorch itself.
        from torch.nn.attention.bias import CausalBias, CausalVariant

        if isinstance(attn_mask, CausalBias):
            # The object is a recipe: as a tensor it has memory that nobody wrote.
            _check_causal_bias(op, attn_mask, query.shape[-2], key.shape[-2])
            is_causal = attn_mask.variant == CausalVariant.UPPER_LEFT
            options["causal"] = True
            attn_mask = None
    if is_causal:
        options["causal"] = options["from_start"] = True
    if attn_mask is not None:
        if not isinstance(attn_mask, Tensor):
            raise _no_tensor(op, "attn_mask", attn_mask)
        boolean = attn_mask.dtype == torch.bool
        if not boolean and not attn_mask.is_floating_point():
            found = str(attn_mask.dtype).removeprefix("torch.")
            raise TypeError(f"{op}: attn_mask has type {found}, needed is bool or a floating type")
        heads = q.shape[:2] if lead is None else lead
        attn_mask = _mask_4d(op, attn_mask, heads, query.shape[-2], key.shape[-2])
        options["mask" if boolean else "bias"] = attn_mask
    if dropout_p is None or isinstance(dropout_p, str):
        raise TypeError(f"{op}: dropout_p is {dropout_p!r}, needed is a number")
    if not 0.0 <= number(op, "dropout_p", dropout_p) <= 1.0:
        raise ValueError(f"{op}: dropout_p is {dropout_p}, needed is a probability from 0 to 1")
    drops_all = dropout_p == 1.0
    if dropout_p != 0.0 and not drops_all:
        options["dropout_p"] = dropout_p
        options["drawn_seed"] = drawn_seed()
    try:
        out, _ = _ops.flash_attention(q, k, v, **options)
    except (ValueError, TypeError, RuntimeError) as error:
        if not str(error).startswith("flash_attention: "):
            raise
        raise type(error)(_under_own_names(str(error))) from None
    if drops_all:
        out = out * 0.0
    return out if lead is None or len(lead) == 2 else out.reshape(lead + out.shape[2:])


def _reads_as_is(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> bool:
    """Whether the three are ``[B, H, L, D]`` with nothing to broadcast, join or copy."""
    try:
        q, k, v = query.shape, key.shape, value.shape
        return (
            len(q) == len(k) == len(v) == 4
            and q[0] == k[0] == v[0]
            and (q[1] == k[1] or enable_gqa)
            and k[1] == v[1]
            and _has_rows(query)
            and _has_rows(key)
            and _has_rows(value)
        )
    except (AttributeError, RuntimeError):  # no tensor or no dense one: _leading_shape says which
        return False


def _under_own_names(text: str) -> str:
    return re.sub(rf"\b({'|'.join(_NAMES)})\b", lambda name: _NAMES[name[0]], text)


def _has_rows(tensor: Tensor) -> bool:
    """Whether it is dense, and its last dimension has a unit stride."""
    return tensor.layout is _STRIDED and (tensor.is_contiguous() or tensor.stride(3) == 1)


def _no_tensor(op: str, name: str, given: object) -> TypeError:
    found = "None" if given is None else f"a {type(given).__name__}"
    return TypeError(f"{op}: {name} is {found}, needed is a tensor")


def _not_dense(op: str, name: str, tensor: Tensor) -> TypeError:
    kind = "a nested tensor" if tensor.is_nested else f"of layout {tensor.layout}"
    return TypeError(f"{op}: {name} is {kind}, needed is a dense tensor")


def _check_causal_bias(op: str, bias: "CausalBias", queries: int, keys: int) -> None:
    if (bias.seq_len_q, bias.seq_len_kv) != (queries, keys):
        raise ValueError(
            f"{op}: attn_mask is a causal bias of [{bias.seq_len_q}, {bias.seq_len_kv}], needed is "
            f"one of [{queries}, {keys}]"
        )


def _leading_shape(
    op: str, query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> torch.Size:
    """The shape of the result before its last two dimensions."""
    tensors = {"query": query, "key": key, "value": value}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise _no_tensor(op, name, tensor)
        if tensor.is_nested or tensor.layout is not _STRIDED:
            raise _not_dense(op, name, tensor)
        if tensor.dim() < 2:
            raise ValueError(
                f"{op}: {name} has shape {list(tensor.shape)}, needed are 2 or more dimensions"
            )
    shapes = [tensor.shape[:-2] for tensor in tensors.values()]
    if enable_gqa:
        if min(len(s) for s in shapes) < 1:
            raise ValueError(f"{op}: enable_gqa needs 3 or more dimensions, heads third to last")
        shapes = [s[:-1] for s in shapes]
    try:
        same = shapes[0] == shapes[1] == shapes[2]  # the usual case, and broadcasting is slow
        lead = shapes[0] if same else torch.broadcast_shapes(*shapes)
    except RuntimeError as error:
        shown = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        hint = "" if enable_gqa else " (different head counts need enable_gqa=True)"
        raise ValueError(f"{op}: leading dimensions do not broadcast: {shown}{hint}") from error
    return torch.Size(lead + query.shape[-3:-2]) if enable_gqa else torch.Size(lead)


def _mask_4d(op: str, mask: Tensor, lead: torch.Size, queries: int, keys: int) -> Tensor:
    """``[B, H, Lq, Lk]`` or what broadcasts to it."""
    if mask.is_nested or mask.layout is not _STRIDED:
        raise _not_dense(op, "attn_mask", mask)
    full = torch.Size(lead + (queries, keys))
    sizes = zip(reversed(mask.shape), reversed(full))
    fits = mask.dim() <= len(full) and all(size in (1, needed) for size, needed in sizes)
    if not fits:
        raise ValueError(
            f"{op}: attn_mask has shape {list(mask.shape)}, needed is one that broadcasts to "
            f"{list(full)}"
        )
    if mask.dim() < max(len(full), 4):
        mask = mask[(None,) * (max(len(full), 4) - mask.dim())]
    return mask.expand(lead[:-1] + mask.shape[-3:]).flatten(0, -4) if len(lead) > 2 else mask


def _as_4d(tensor: Tensor, lead: torch.Size, keep_heads: bool) -> Tensor:
    """``[B, H, L, D]``: leading dimensions broadcast to those of the result and joined."""
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        tensor = tensor.contiguous()
    if keep_heads:
        lead = lead[:-1] + tensor.shape[-3:-2]
    if len(lead) == 2 and tensor.shape[:-2] == lead:
        return tensor
    tensor = tensor.expand(lead + tensor.shape[-2:])
    while tensor.dim() < 4:
        tensor = tensor.unsqueeze(0)
    return tensor.flatten(0, -4)
