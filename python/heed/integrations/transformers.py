"""heed as the attention of Hugging Face transformers models.

    import heed.integrations.transformers
    heed.integrations.transformers.register()
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="heed")
"""

from math import isfinite
from numbers import Real

import torch
from torch import Tensor

import heed
from heed._numbers import checked_whole_number
from heed._seeds import drawn_seed

_Result = tuple[Tensor, None]


def register(
    *, sigmoid_bias: float | None = None, stochastic_window: int = 256, stochastic_seed: int = 0
) -> list[str]:
    """Makes heed's mechanisms values of ``attn_implementation``, and returns their names.

    ``"heed"``
        Exact softmax attention; every mask, chosen keys (``indices``), grouped queries, position
        biases, packed sequences, softcap and sinks of the model, with gradients. Same results as
        ``"sdpa"`` up to rounding.
    ``"heed_sigmoid"``
        Sigmoid attention (:func:`heed.sigmoid_attention`).
    ``"heed_stochastic"``
        Stochastic attention (:func:`heed.stochastic_attention`): each layer attends inside windows
        of a random order of the tokens, drawn from the seed and the layer's number, and in training
        (``model.train()``) from PyTorch's generator too, so that every forward has another one;
        calls with fewer queries than keys (decoding) see the whole cache. Causal models whose
        attention knows that number (``layer_idx``), no padding, no sliding window that is shorter
        than the tokens.

    The last two are not softmax attention, and a model has to be trained with them (or the change
    to be wanted). ``"heed_sigmoid"`` takes padding and sliding windows of the model. Whatever else
    a model asks of them (other masks, packed sequences, softcap, sinks, position biases, dropout)
    is a ``ValueError`` when it runs (of packed sequences and padding a ``RuntimeError`` where
    ``torch.compile`` made it). So are models whose attention does not go through
    transformers' attention interface, for all three names, when they are made or changed.

    All run under ``torch.autocast`` on the CPU, in its type.

    Args:
        sigmoid_bias: bias of ``"heed_sigmoid"``; ``None`` is ``-log(number of keys)``. That
            changes with padding and with every token that a cache grows by, so generating gives
            other numbers than one pass: give the number of training there.
        stochastic_window: keys that a token of ``"heed_stochastic"`` may see, half to each side.
        stochastic_seed: of the orders.

    Raises:
        ImportError: transformers is not installed or is older than 5.
        TypeError, ValueError: an argument is no such number.
    """
    if sigmoid_bias is not None and not isinstance(sigmoid_bias, Real):
        raise TypeError(f"register: sigmoid_bias is {sigmoid_bias!r}, needed is a number or None")
    if sigmoid_bias is not None and not isfinite(sigmoid_bias):
        raise ValueError(f"register: sigmoid_bias is {sigmoid_bias}, needed is a finite number")
    if checked_whole_number("register", "stochastic_window", stochastic_window) < 1:
        raise ValueError(f"register: stochastic_window is {stochastic_window}, needed is 1 or more")
    stochastic_seed = checked_whole_number("register", "stochastic_seed", stochastic_seed)
    try:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface

        from heed.integrations._transformers import (
            plain_mask,
            refuse_models_without_interface,
            softmax_mask,
        )
    except ImportError as error:
        raise ImportError(
            f"heed.integrations.transformers needs transformers 5 or newer: {error}"
        ) from error

    def sigmoid(module, query, key, value, attention_mask, **options) -> _Result:
        return _sigmoid(module, query, key, value, attention_mask, sigmoid_bias, **options)

    def stochastic(module, query, key, value, attention_mask, **options) -> _Result:
        layer = getattr(module, "layer_idx", None)
        if layer is None:
            raise ValueError(
                f"heed_stochastic: {type(module).__name__} has no layer_idx, needed is the number of "
                "its layer: one order for all layers mixes nothing"
            )
        seed = stochastic_seed * 1_000_003 + layer
        if module.training:  # checkpoints replay the generator, and with it the order
            seed = seed % 2**62 + drawn_seed().item()
        return _stochastic(
            module, query, key, value, attention_mask, stochastic_window, seed, **options
        )

    implementations = {
        "heed": (_softmax, softmax_mask),
        "heed_sigmoid": (sigmoid, plain_mask("heed_sigmoid")),
        "heed_stochastic": (stochastic, plain_mask("heed_stochastic")),
    }
    for name, (function, mask) in implementations.items():
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, mask)
    refuse_models_without_interface(list(implementations))
    return list(implementations)


def _is_causal(module, query: Tensor, is_causal: bool | None) -> bool:
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    return bool(causal) and query.shape[2] > 1


def _result(out: Tensor) -> _Result:
    return out.transpose(1, 2).contiguous(), None


def _unit_stride(*tensors: Tensor) -> list[Tensor]:
    return [t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous() for t in tensors]


# Attention that only PyTorch code of the model itself can compute.
_NEVER_OFFERED = frozenset(("sinks", "block_indices"))
_SOFTMAX_ONLY = _NEVER_OFFERED | {"indices", "position_bias", "softcap", "s_aux"}


def _refuse(name: str, options: dict, keywords: frozenset[str]) -> None:
    for keyword in keywords.intersection(options):
        if options[keyword] is not None:
            raise ValueError(
                f"{name}: the model gives {keyword}, needed is a model without: it is not offered"
            )


def _chosen_keys(indices: Tensor, keys: int) -> Tensor:
    """bool ``[B, 1, Lq, keys]`` of indices ``[B, Lq, chosen]``."""
    none = indices.new_zeros((*indices.shape[:2], keys), dtype=torch.bool)
    return none.scatter(-1, indices.long(), True)[:, None]


def _same_sequence(query: Tensor, key: Tensor, ends_q: Tensor, ends_k: Tensor) -> Tensor:
    """bool ``[Lq, Lk]``: the pairs inside one of the packed sequences."""
    of_query = torch.bucketize(torch.arange(query.shape[2]), ends_q, right=True)
    of_key = torch.bucketize(torch.arange(key.shape[2]), ends_k, right=True)
    return of_query[:, None] == of_key


def _softmax(
    module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    indices: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **options,
) -> _Result:
    _refuse("heed", options, _NEVER_OFFERED)
    causal = _is_causal(module, query, is_causal) and attention_mask is None
    if causal and key.shape[2] > query.shape[2]:
        # The first part of an empty static cache: transformers aligns to the start of the keys.
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
        if position_bias is not None:
            position_bias = position_bias[..., : query.shape[2]]
    mask, bias = None, position_bias
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        mask = attention_mask
    elif attention_mask is not None:
        bias = attention_mask if bias is None else bias + attention_mask
    if indices is not None:
        chosen = _chosen_keys(indices, key.shape[2])
        mask = chosen if mask is None else mask & chosen
    query, key, value = _unit_stride(query, key, value)
    common = {
        "causal": causal,
        "scale": scaling,
        "softcap": softcap or 0.0,
        "sink": s_aux,
        "dropout_p": dropout,
    }
    if cu_seq_lens_q is not None and cu_seq_lens_q.shape[0] > 2:
        if query.shape[0] != 1:
            raise ValueError(
                f"cu_seq_lens_q is given for a batch of {query.shape[0]}, needed is a batch of 1"
            )
        ends_k = cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k
        if mask is None and bias is None and query.shape[2] == key.shape[2]:
            rows = (t[0].transpose(0, 1) for t in (query, key, value))
            out = heed.flash_attention_varlen(*rows, cu_seq_lens_q, ends_k, **common)
            return out[None], None
        same = _same_sequence(query, key, cu_seq_lens_q, ends_k)
        mask = same if mask is None else mask & same
    return _result(heed.flash_attention(query, key, value, mask=mask, bias=bias, **common))


def _check_options(name: str, dropout: float, cu_seq_lens_q: Tensor | None, options: dict) -> None:
    """Errors for what the mechanisms that are not softmax cannot do."""
    if dropout > 0.0:
        raise ValueError(f"{name}: dropout is {dropout}, needed is 0: it is not offered")
    if cu_seq_lens_q is not None and cu_seq_lens_q.shape[0] > 2:
        sequences = cu_seq_lens_q.shape[0] - 1
        raise ValueError(f"{name}: cu_seq_lens_q packs {sequences} sequences, needed is one")
    _refuse(name, options, _SOFTMAX_ONLY)


def _real_keys(
    attention_mask: Tensor | None, key: Tensor, value: Tensor
) -> tuple[Tensor | None, Tensor, Tensor]:
    """The padding mask, bool ``[B, Lk]`` or None (True is a token), and the keys that it covers.

    A static cache hands over keys of its whole capacity, of which the mask covers the used ones.
    """
    if attention_mask is None:
        return None, key, value
    if attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)}, needed is a padding mask "
            "[batch, tokens]; attn_implementation='heed' takes any mask"
        )
    keys = min(attention_mask.shape[1], key.shape[2])
    return attention_mask[:, -keys:].bool(), key[:, :, :keys], value[:, :, :keys]


def _window(sliding_window: int | None) -> tuple[int, int]:
    # Without causal it is symmetric; with causal the keys to the right are gone anyway.
    return (-1, -1) if sliding_window is None else (sliding_window - 1, sliding_window - 1)


def _sigmoid(
    module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    bias: float | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **options,
) -> _Result:
    _check_options("heed_sigmoid", dropout, cu_seq_lens_q, options)
    padding, key, value = _real_keys(attention_mask, key, value)
    if padding is not None:
        # No row sum: a key without a value is a key that is not there.
        value = value.masked_fill(~padding[:, None, :, None], 0.0)
    query, key, value = _unit_stride(query, key, value)
    out = heed.sigmoid_attention(
        query,
        key,
        value,
        bias=bias,
        causal=_is_causal(module, query, is_causal),
        window=_window(sliding_window),
        scale=scaling,
    )
    return _result(out)


def _check_unpadded(padding: Tensor) -> None:
    message = "heed_stochastic: the batch is padded, needed are sequences of one length"
    if torch.compiler.is_compiling():
        torch._assert_async(padding.all(), message)
    elif not bool(padding.all()):
        raise ValueError(message)


def _stochastic(
    module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    window: int,
    seed: int,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **options,
) -> _Result:
    _check_options("heed_stochastic", dropout, cu_seq_lens_q, options)
    padding, key, value = _real_keys(attention_mask, key, value)
    if padding is not None:
        _check_unpadded(padding)
    causal = _is_causal(module, query, is_causal)
    query, key, value = _unit_stride(query, key, value)
    if query.shape[2] < key.shape[2]:
        return _result(
            heed.flash_attention(
                query,
                key,
                value,
                causal=causal,
                window=_window(sliding_window),
                scale=scaling,
            )
        )
    if sliding_window is not None and sliding_window < key.shape[2]:
        raise ValueError(
            f"heed_stochastic: sliding_window is {sliding_window}, needed is one of at least the "
            f"{key.shape[2]} tokens: shorter ones are not offered"
        )
    permutation = heed.random_permutation(seed, (query.shape[2],))
    return _result(
        heed.stochastic_attention(
            query, key, value, permutation, window=window, causal=causal, scale=scaling
        )
    )
