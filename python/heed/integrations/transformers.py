"""heed as the attention of Hugging Face transformers models.

    import heed.integrations.transformers
    heed.integrations.transformers.register()
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="heed")
"""

import torch
from torch import Tensor

import heed

_Result = tuple[Tensor, None]


def register(
    *, sigmoid_bias: float | None = None, stochastic_window: int = 256, stochastic_seed: int = 0
) -> list[str]:
    """Makes heed's mechanisms values of ``attn_implementation``, and returns their names.

    ``"heed"``
        Exact softmax attention; every mask, grouped queries, softcap and sinks of the model, with
        gradients. Same results as ``"sdpa"`` up to rounding.
    ``"heed_sigmoid"``
        Sigmoid attention (:func:`heed.sigmoid_attention`).
    ``"heed_stochastic"``
        Stochastic attention (:func:`heed.stochastic_attention`): each layer attends inside windows
        of a random order of the tokens, drawn from the seed and the layer's number; calls with
        fewer queries than keys (decoding) see the whole cache. Causal models, no padding.

    The last two take padding and sliding windows of the model, no other masks: they are not
    softmax attention, and a model has to be trained with them (or the change to be wanted).

    Args:
        sigmoid_bias: bias of ``"heed_sigmoid"``; ``None`` is ``-log(number of keys)``.
        stochastic_window: keys that a token of ``"heed_stochastic"`` may see, half to each side.
        stochastic_seed: of the orders.

    Raises:
        ImportError: transformers is not installed or is older than 5.
    """
    try:
        from transformers import AttentionInterface
        from transformers.masking_utils import (
            AttentionMaskInterface,
            flash_attention_mask,
            sdpa_mask,
        )
    except ImportError as error:
        raise ImportError(
            f"heed.integrations.transformers needs transformers 5 or newer: {error}"
        ) from error

    def sigmoid(module, query, key, value, attention_mask, **options) -> _Result:
        return _sigmoid(module, query, key, value, attention_mask, sigmoid_bias, **options)

    def stochastic(module, query, key, value, attention_mask, **options) -> _Result:
        seed = stochastic_seed * 1_000_003 + getattr(module, "layer_idx", 0)
        return _stochastic(
            module, query, key, value, attention_mask, stochastic_window, seed, **options
        )

    for name, function, mask in (
        ("heed", _softmax, sdpa_mask),
        ("heed_sigmoid", sigmoid, flash_attention_mask),
        ("heed_stochastic", stochastic, flash_attention_mask),
    ):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, mask)
    return ["heed", "heed_sigmoid", "heed_stochastic"]


def _is_causal(module, query: Tensor, is_causal: bool | None) -> bool:
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    return bool(causal) and query.shape[2] > 1


def _result(out: Tensor) -> _Result:
    return out.transpose(1, 2).contiguous(), None


def _unit_stride(*tensors: Tensor) -> list[Tensor]:
    return [t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous() for t in tensors]


def _seed(dropout: float) -> int:
    return int(torch.randint(2**62, ())) if dropout > 0.0 else 0


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
    **_,
) -> _Result:
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
    query, key, value = _unit_stride(query, key, value)
    out = heed.flash_attention(
        query,
        key,
        value,
        causal=causal,
        scale=scaling,
        softcap=softcap or 0.0,
        mask=mask,
        bias=bias,
        sink=s_aux,
        dropout_p=dropout,
        seed=_seed(dropout),
    )
    return _result(out)


def _padding(attention_mask: Tensor | None, key: Tensor) -> Tensor | None:
    """bool ``[B, Lk]`` or None; True is a token."""
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)}, needed is a padding mask "
            "[batch, tokens]; attn_implementation='heed' takes any mask"
        )
    return attention_mask[:, -key.shape[2] :].bool()


def _window(sliding_window: int | None) -> tuple[int, int]:
    return (-1, -1) if sliding_window is None else (sliding_window - 1, -1)


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
    **_,
) -> _Result:
    if dropout > 0.0:
        raise ValueError(f"heed_sigmoid: dropout is {dropout}, needed is 0: it is not offered")
    padding = _padding(attention_mask, key)
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
    **_,
) -> _Result:
    if dropout > 0.0:
        raise ValueError(f"heed_stochastic: dropout is {dropout}, needed is 0: it is not offered")
    padding = _padding(attention_mask, key)
    if padding is not None and not bool(padding.all()):
        raise ValueError("heed_stochastic: the batch is padded, needed are sequences of one length")
    causal = _is_causal(module, query, is_causal)
    query, key, value = _unit_stride(query, key, value)
    if query.shape[2] < key.shape[2]:
        return _result(heed.flash_attention(query, key, value, causal=causal, scale=scaling))
    permutation = heed.random_permutation(seed, (query.shape[2],))
    return _result(
        heed.stochastic_attention(
            query, key, value, permutation, window=window, causal=causal, scale=scaling
        )
    )
