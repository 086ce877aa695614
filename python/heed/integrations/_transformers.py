"""What the integration asks of transformers: which models, and which masks."""

import functools
import inspect
import re
import sys
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    eager_mask,
    prepare_padding_mask,
    sdpa_mask,
    sliding_window_bidirectional_overlay,
    sliding_window_overlay,
)


def refuse_models_without_interface(names: list[str]) -> None:
    """Makes models that keep attention code of their own raise for the names.

    transformers itself accepts every registered name in them, and gives them the mask that is
    registered under it, which their code misreads. Other names pass through untouched.
    """
    if hasattr(PreTrainedModel.get_correct_attn_implementation, "heed_names"):
        return
    check = PreTrainedModel.get_correct_attn_implementation
    change = PreTrainedModel.set_attn_implementation

    @functools.wraps(check)
    def get_correct_attn_implementation(self, requested_attention, *args, **kwargs):
        _check_model(self, requested_attention, names)
        return check(self, requested_attention, *args, **kwargs)

    @functools.wraps(change)
    def set_attn_implementation(self, attn_implementation, *args, **kwargs):
        requested = attn_implementation
        if isinstance(requested, dict):
            requested = requested.get("")
        # Here transformers would only warn and keep the old one.
        _check_model(self, requested, names)
        return change(self, attn_implementation, *args, **kwargs)

    get_correct_attn_implementation.heed_names = names
    PreTrainedModel.get_correct_attn_implementation = get_correct_attn_implementation
    PreTrainedModel.set_attn_implementation = set_attn_implementation


def _check_model(model: PreTrainedModel, requested: str | None, names: list[str]) -> None:
    if requested not in names:
        return
    declared = model._supports_sdpa or model._supports_attention_backend
    code = _source(type(model))
    chooses_classes = re.search(r"_CLASSES\[(self\.)?config\._attn_implementation\]", code)
    if not declared or chooses_classes or not model._can_set_attn_implementation():
        raise ValueError(
            f"attn_implementation is {requested!r}, needed is one that {type(model).__name__} has "
            "code for (as 'eager'): it does not go through transformers' attention interface, or "
            "does not declare it"
        )
    widens = re.search(r"attention_mask = (torch\.cat|F\.pad|nn\.functional\.pad)\(", code)
    if widens and not model._supports_sdpa:
        _FLOAT_MASKED.add(type(model.config))


@functools.cache
def _source(model: type[PreTrainedModel]) -> str:
    """Of the module that defines the model; empty where it is nowhere to be read."""
    try:
        return inspect.getsource(sys.modules[model.__module__])
    except (KeyError, OSError, TypeError):
        return ""


# Of models that are written for eager's mask alone and append additive columns to it.
_FLOAT_MASKED: set[type[PreTrainedConfig]] = set()


def softmax_mask(*args, config: PreTrainedConfig | None = None, **hints) -> Tensor | None:
    """The mask of exact attention: bool ``[B, 1, Lq, Lk]``, or None where the layer's causal says all.

    Models that compute with the mask get eager's, of floats.
    """
    if type(config) in _FLOAT_MASKED:
        return eager_mask(*args, config=config, **hints)
    if getattr(config, "num_kv_shared_layers", 0):
        # Such a model may drop queries later on, and with them where causal is aligned.
        hints["allow_is_causal_skip"] = False
    return sdpa_mask(*args, config=config, **hints)


def plain_mask(name: str) -> Callable[..., Tensor | None]:
    """A mask function for mechanisms that know causal, sliding windows and padding only.

    It gives bool ``[B, keys]``, True at tokens, or None where all keys are. Fewer ``keys`` than the
    layer hands over mean that the rest of them is the unused part of a static cache. It raises a
    ValueError where the model asks for any other mask. A compiled model raises it when it is
    compiled, or a RuntimeError when it runs and its tokens turn out to be packed.
    """

    def mask(
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset: int | Tensor = 0,
        kv_offset: int = 0,
        mask_function: Callable = causal_mask_function,
        attention_mask: Tensor | None = None,
        **hints,
    ) -> Tensor | None:
        keys = kv_length
        compiling = torch.compiler.is_compiling()
        if compiling:
            causal = _told_causal(name, **hints)
            positions = torch.arange(q_length) + q_offset
            _assert_neighbours(name, mask_function, causal, batch_size, positions, **hints)
        else:
            causal = _is_causal(name, mask_function)
        if causal and kv_length != q_length:
            keys = min(kv_length, int(q_offset) + q_length - int(kv_offset))
        if attention_mask is None:
            if keys == kv_length:
                return None
            return torch.ones(batch_size, keys, dtype=torch.bool)
        attention_mask = prepare_padding_mask(attention_mask, keys, kv_offset)
        attention_mask = attention_mask[:, kv_offset : kv_offset + keys]
        if keys == kv_length and not compiling and attention_mask.all():
            return None
        return attention_mask

    return mask


def _told_causal(
    name: str,
    config: PreTrainedConfig,
    use_vmap: bool = False,
    local_size: int | None = None,
    allow_is_bidirectional_skip: bool | None = None,
    **_,
) -> bool:
    """As :func:`_is_causal` by what goes along with the mask: torch.compile cannot look inside it."""
    if use_vmap or local_size not in (None, getattr(config, "sliding_window", None)):
        raise _not_offered(name, "that is neither causal nor a sliding window")
    return allow_is_bidirectional_skip is None


def _assert_neighbours(
    name: str,
    function: Callable,
    causal: bool,
    batch_size: int,
    positions: Tensor,
    local_size: int | None = None,
    **_,
) -> None:
    """Fails, when the compiled model runs, where two neighbours see each other otherwise than told.

    That is at every border of packed sequences, of chunks and of blocks that see their future,
    without a mask of all pairs.
    """
    told = causal_mask_function if causal else bidirectional_mask_function
    if local_size is not None:
        window = sliding_window_overlay if causal else sliding_window_bidirectional_overlay
        told = and_masks(window(local_size), told)
    batch = torch.arange(batch_size)[:, None]
    head = torch.zeros((), dtype=torch.int64)
    before, after = positions[None, :-1], positions[None, 1:]
    for query, key in ((after, before), (before, after)):
        same = function(batch, head, query, key) == told(batch, head, query, key)
        torch._assert_async(same.all(), str(_not_offered(name, "of packed sequences or blocks")))


def _not_offered(name: str, mask: str) -> ValueError:
    return ValueError(
        f"{name}: the model asks for a mask {mask}, offered are causal, sliding windows and "
        "padding; attn_implementation='heed' takes any mask"
    )


_AND = and_masks(causal_mask_function).__code__
_WINDOWS = (
    sliding_window_overlay(1).__code__,
    sliding_window_bidirectional_overlay(1).__code__,
)


def _is_causal(name: str, function: Callable) -> bool:
    """Whether the mask is causal. Its parts are closures of transformers, known by their code."""
    parts = _parts(function)
    for part in parts:
        known = part in (causal_mask_function, bidirectional_mask_function)
        if not known and _code(part) not in _WINDOWS:
            kind = getattr(part, "__qualname__", repr(part)).split(".")[0]
            raise _not_offered(name, f"({kind})")
    return causal_mask_function in parts


def _code(function: Callable) -> object:
    return getattr(function, "__code__", None)


def _parts(function: Callable) -> list[Callable]:
    if _code(function) is not _AND:
        return [function]
    (cell,) = function.__closure__
    return [part for inner in cell.cell_contents for part in _parts(inner)]
