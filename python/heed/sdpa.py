"""PyTorch's own attention function on heed's kernels."""

import torch
from torch import Tensor

_ops = torch.ops.heed


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
        attn_mask: broadcastable to ``[..., H, Lq, Lk]``: boolean (True = attend) or of the type of
            ``query``, added to the scores. Not together with ``is_causal``.
        dropout_p: probability that a weight is dropped; the seed comes from PyTorch's generator.
        is_causal: query ``i`` sees keys ``j <= i``: aligned to the **start** of the keys, as
            PyTorch does it. :func:`heed.flash_attention` aligns to the end.
        scale: factor of the scores; ``None`` is ``1 / sqrt(D)``.
        enable_gqa: allow ``H`` to be a multiple of ``Hkv``.

    Returns:
        ``[..., H, Lq, Dv]`` of the type of ``query``. A query that sees no key gives 0.

    Tensors whose last dimension has no unit stride, and leading dimensions that no view can join
    into one, are copied, as PyTorch does it.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`heed.flash_attention`.

    Source: FlashAttention (arXiv 2205.14135); semantics of PyTorch.
    """
    op = "scaled_dot_product_attention"
    if attn_mask is not None and is_causal:
        raise ValueError(f"{op}: attn_mask and is_causal are given, needed is one of them")
    lead = _leading_shape(op, query, key, value, enable_gqa)
    q, k, v = (_as_4d(t, lead, enable_gqa) for t in (query, key, value))
    options: dict[str, Tensor | float] = {} if scale is None else {"scale": scale}
    if is_causal:
        queries, keys = q.shape[2], k.shape[2]
        # Keys after the last query are seen by none; the rest of the top-left triangle is a window
        # that ends Lq - Lk keys to the right of the diagonal that is aligned to the end.
        if keys > queries:
            k, v = k[:, :, :queries], v[:, :, :queries]
        options["window_right"] = max(queries - keys, 0)
    if attn_mask is not None:
        attn_mask = _mask_4d(op, attn_mask, lead, query.shape[-2], key.shape[-2])
        options["mask" if attn_mask.dtype == torch.bool else "bias"] = attn_mask
    if dropout_p != 0.0:
        options["dropout_p"] = dropout_p
        options["seed"] = int(torch.randint(2**62, ()))
    out, _ = _ops.flash_attention(q, k, v, **options)
    return out if len(lead) == 2 else out.reshape(lead + out.shape[2:])


def _leading_shape(
    op: str, query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> torch.Size:
    """The shape of the result before its last two dimensions."""
    tensors = {"query": query, "key": key, "value": value}
    for name, tensor in tensors.items():
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
    full = torch.Size(lead + (queries, keys))
    try:
        fits = torch.broadcast_shapes(mask.shape, full) == full
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"{op}: attn_mask has shape {list(mask.shape)}, needed is one that broadcasts to "
            f"{list(full)}"
        )
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
