"""sigmoid_attention against plain float64 formulas."""

import math

import heed
import pytest
import torch
from reference import (
    DTYPES,
    assert_accurate,
    naive_sigmoid,
    random,
    random_qkv,
    sigmoid64,
    visible,
)


def check(q, k, v, *, bias=None, slopes=None, scale=None, **masks):
    out = heed.sigmoid_attention(q, k, v, bias=bias, scale=scale, alibi_slopes=slopes, **masks)
    seen = visible(q.shape[2], k.shape[2], batch=q.shape[0], **masks)
    if bias is None:
        bias = -math.log(k.shape[2])
    elif isinstance(bias, torch.Tensor):
        bias = bias.double()[:, None, None]
    expected = sigmoid64(q, k, v, seen, bias, scale, slopes)
    if slopes is None:
        own = bias.to(q.dtype) if isinstance(bias, torch.Tensor) else bias
        naive = naive_sigmoid(q, k, v, seen, own, scale)
    else:
        naive = expected.to(q.dtype)
    assert out.dtype == q.dtype
    assert_accurate(out, expected, naive)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lq, lk", [(1, 1), (1, 129), (129, 7), (7, 129), (129, 129)])
@pytest.mark.parametrize("d, dv", [(1, 3), (5, 5), (63, 17), (80, 80), (256, 200)])
def test_sizes(dtype, causal, lq, lk, d, dv):
    check(*random_qkv(2, 4, 2, lq, lk, d, dv, dtype), causal=causal)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [(0, 0), (5, 1), (-1, 2)])
@pytest.mark.parametrize("lq, lk", [(40, 40), (9, 40), (40, 9)])
def test_windows(dtype, window, lq, lk):
    check(*random_qkv(1, 2, 2, lq, lk, 24, dtype=dtype), window=window)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [-3.0, 0, 2.5])
def test_bias_as_a_number(dtype, bias):
    check(*random_qkv(1, 4, 2, 9, 40, 16, dtype=dtype), bias=bias)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_per_head(dtype):
    own_type = torch.float64 if dtype == torch.float64 else torch.float32
    check(*random_qkv(1, 4, 2, 9, 40, 16, dtype=dtype), bias=random(4, dtype=own_type))
    check(*random_qkv(1, 4, 2, 9, 40, 16, dtype=dtype), bias=random(4, dtype=dtype))
    check(*random_qkv(1, 4, 2, 9, 40, 16, dtype=dtype), bias=random(8, dtype=own_type)[::2])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("lq, lk", [(40, 40), (9, 40), (40, 9)])
def test_alibi_slopes(dtype, lq, lk):
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0], dtype=dtype)
    check(*random_qkv(2, 4, 2, lq, lk, 16, dtype=dtype), slopes=slopes, bias=-1.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_queries_average_the_values(dtype):
    _, k, v = random_qkv(1, 2, 2, 3, 50, 16, dtype=dtype)
    found = heed.sigmoid_attention(torch.zeros(1, 2, 3, 16, dtype=dtype), k, v)
    mean = v.double().mean(2, keepdim=True).expand(1, 2, 3, 16)
    torch.testing.assert_close(found.double(), mean * 50 / 51, rtol=0, atol=2e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_bias(dtype):
    q, k, v = random_qkv(1, 2, 2, 3, 50, 16, dtype=dtype)
    nothing = heed.sigmoid_attention(q, k, v, bias=-1e4)
    torch.testing.assert_close(nothing, torch.zeros_like(nothing), rtol=0, atol=1e-30)
    every = heed.sigmoid_attention(q, k, v, bias=1e4).double()
    expected = v.double().sum(2, keepdim=True).expand(1, 2, 3, 16)
    torch.testing.assert_close(every, expected, rtol=torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_nothing_behind_lengths_matters(dtype, causal):
    lengths = torch.tensor([0, 1, 50, 97])
    q, k, v = random_qkv(4, 2, 2, 33, 97, 20, dtype=dtype)
    expected = heed.sigmoid_attention(q, k, v, causal=causal, lengths=lengths)
    check(q, k, v, causal=causal, lengths=lengths)
    for b, length in enumerate(lengths.tolist()):
        k[b, :, length:] = math.nan
        v[b, :, length:] = math.inf
    assert torch.equal(heed.sigmoid_attention(q, k, v, causal=causal, lengths=lengths), expected)
    assert not expected[0].any()


@pytest.mark.parametrize("b, lq, lk", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty(b, lq, lk):
    q, k, v = random_qkv(b, 2, 2, lq, lk, 8)
    assert torch.equal(heed.sigmoid_attention(q, k, v), torch.zeros(b, 2, lq, 8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_add_up(dtype):
    q, k, v = random_qkv(1, 2, 2, 9, 64, 16, dtype=dtype)
    whole = heed.sigmoid_attention(q, k, v, bias=-2.0)
    parts = [
        heed.sigmoid_attention(q, k[:, :, s], v[:, :, s], bias=-2.0)
        for s in (slice(0, 20), slice(20, 64))
    ]
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(parts[0] + parts[1], whole, rtol=4 * eps, atol=16 * eps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_on_any_thread_count_and_stride(dtype):
    q, k, v = random_qkv(2, 4, 2, 90, 130, 40, dtype=dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(heed.sigmoid_attention(q, k, v, causal=True))
    finally:
        torch.set_num_threads(before)
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    results.append(heed.sigmoid_attention(*strided, causal=True))
    assert all(torch.equal(r, results[0]) for r in results)
