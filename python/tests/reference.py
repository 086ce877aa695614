"""Plain float64 formulas, and what error a kernel may have against them."""

import math

import pytest
import torch

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def random(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)


def random_qkv(b, h, hkv, lq, lk, d, dv=None, dtype=torch.float32):
    """q, k, v of one call: ``[b,h,lq,d]``, ``[b,hkv,lk,d]``, ``[b,hkv,lk,dv]``."""
    dv = d if dv is None else dv
    return (
        random(b, h, lq, d, dtype=dtype, seed=1),
        random(b, hkv, lk, d, dtype=dtype, seed=2),
        random(b, hkv, lk, dv, dtype=dtype, seed=3),
    )


def visible(lq, lk, causal=False, window=(-1, -1), lengths=None, batch=1):
    """bool ``[batch,1,lq,lk]``, True where a query sees a key."""
    i = torch.arange(lq)[:, None] + lk - lq
    j = torch.arange(lk)[None, :]
    seen = torch.ones(lq, lk, dtype=torch.bool)
    if causal:
        seen &= j <= i
    if window[0] >= 0:
        seen &= j >= i - window[0]
    if window[1] >= 0:
        seen &= j <= i + window[1]
    seen = seen.expand(batch, 1, lq, lk)
    if lengths is not None:
        seen = seen & (j < lengths.long()[:, None, None, None])
    return seen


def repeat_heads(t, heads):
    return t.repeat_interleave(heads // t.shape[1], 1)


def scores64(q, k, scale=None):
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return q.double() @ repeat_heads(k, q.shape[1]).double().mT * scale


def shaped(scores, softcap=0.0, slopes=None):
    """Scaled scores capped, and less by the slope for each key away from the query's place."""
    if softcap > 0:
        scores = softcap * (scores / softcap).tanh()
    if slopes is not None:
        lq, lk = scores.shape[-2:]
        distance = torch.arange(lq)[:, None] + lk - lq - torch.arange(lk)[None, :]
        scores = scores - slopes.to(scores.dtype)[:, None, None] * distance.abs()
    return scores


def attention64(q, k, v, seen, scale=None, *, softcap=0.0, slopes=None, sink=None, kept=1.0):
    """``(out, lse)`` in float64; rows that see nothing are 0 and -inf. ``kept`` are the dropout's
    factors of the weights."""
    scores = shaped(scores64(q, k, scale), softcap, slopes).masked_fill(~seen, -math.inf)
    lse = scores.logsumexp(-1)
    if sink is not None:
        lse = torch.logaddexp(lse, sink.double()[:, None])
    weights = (scores - lse[..., None]).exp().nan_to_num(0.0)  # only empty rows have -inf - -inf
    values = repeat_heads(v, q.shape[1]).double()
    return weights * kept @ values, lse


def sigmoid64(q, k, v, seen, bias, scale=None, slopes=None):
    scores = shaped(scores64(q, k, scale) + bias, slopes=slopes)
    weights = scores.sigmoid().masked_fill(~seen, 0.0)
    return weights @ repeat_heads(v, q.shape[1]).double()


def naive_softmax(q, k, v, seen, scale=None, *, softcap=0.0, slopes=None, sink=None, kept=1.0):
    """The textbook composition in the inputs' own type."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = shaped(q @ repeat_heads(k, q.shape[1]).mT * scale, softcap, slopes)
    scores = scores.masked_fill(~seen, -math.inf)
    if sink is not None:
        logits = sink.to(q.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, logits], -1)
    weights = scores.softmax(-1).nan_to_num(0.0)[..., : k.shape[2]] * kept
    return weights @ repeat_heads(v, q.shape[1])


def naive_sigmoid(q, k, v, seen, bias, scale=None):
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = q @ repeat_heads(k, q.shape[1]).mT * scale + bias
    return scores.sigmoid().masked_fill(~seen, 0.0) @ repeat_heads(v, q.shape[1])


def error(found, expected):
    """Largest absolute difference; NaN where either has one."""
    if found.numel() == 0:
        return 0.0
    return (found.double() - expected).abs().max().item()


def assert_accurate(found, expected, naive):
    """At most twice the error of the textbook composition in the same type, and one rounding.

    float64 is held to 1e-11 instead. A float32 composition can be right by luck on a few numbers,
    so float32 may add four roundings.
    """
    assert found.shape == expected.shape
    assert naive.shape == expected.shape and found.dtype == naive.dtype
    largest = expected.abs().max().item() if expected.numel() else 0.0
    if found.dtype == torch.float64:
        bound = 1e-11 * max(1.0, largest)
    else:
        roundings = 4 if found.dtype == torch.float32 else 1
        bound = 2 * error(naive, expected) + roundings * torch.finfo(found.dtype).eps * largest
    assert error(found, expected) <= bound  # False for NaN


def assert_lse(found, expected):
    """Statistics are float32 (float64 for float64) whatever the inputs are."""
    assert found.shape == expected.shape
    assert found.dtype in (torch.float32, torch.float64)
    tolerance = 1e-11 if found.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def expect_mistake(op, arguments, error, words):
    """`op` refuses the arguments, by its name and with the words."""
    with pytest.raises(error) as caught:
        op(**arguments)
    for word in [op.__name__, *words]:
        assert word in str(caught.value)
