"""flash_attention against plain float64 formulas."""

import math

import heed
import pytest
import torch
from reference import (
    DTYPES,
    assert_accurate,
    assert_lse,
    attention64,
    naive_softmax,
    random,
    random_qkv,
    visible,
)


def check(q, k, v, *, causal=False, window=(-1, -1), lengths=None, scale=None, values=None):
    """Runs the operator and compares; ``values`` are finite k and v for the formulas."""
    out, lse = heed.flash_attention(
        q, k, v, causal=causal, window=window, lengths=lengths, scale=scale, return_lse=True
    )
    seen = visible(q.shape[2], k.shape[2], causal, window, lengths, q.shape[0])
    k, v = (k, v) if values is None else values
    expected, expected_lse = attention64(q, k, v, seen, scale)
    assert out.dtype == q.dtype
    assert lse.dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
    assert_accurate(out, expected, naive_softmax(q, k, v, seen, scale))
    assert_lse(lse, expected_lse)
    return out, lse


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lk", [1, 7, 129])
@pytest.mark.parametrize("lq", [1, 7, 129])
@pytest.mark.parametrize("d, dv", [(1, 3), (5, 5), (63, 17), (80, 80), (200, 256), (256, 1), (257, 576)])
def test_sizes(dtype, causal, lq, lk, d, dv):
    check(*random_qkv(2, 4, 2, lq, lk, d, dv, dtype), causal=causal)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("h, hkv", [(1, 1), (3, 3), (6, 3), (6, 1), (9, 3)])
def test_grouped_queries(dtype, h, hkv):
    check(*random_qkv(2, h, hkv, 9, 21, 16, dtype=dtype), causal=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lq, lk", [(150, 150), (20, 150), (150, 20), (5, 5)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "window", [(0, 0), (3, -1), (-1, 2), (5, 1), (64, 64), (0, 1000), (1000, 0)]
)
def test_windows(dtype, lq, lk, causal, window):
    check(*random_qkv(1, 2, 1, lq, lk, 24, dtype=dtype), causal=causal, window=window)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index_type", [torch.int32, torch.int64])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [(-1, -1), (6, 2)])
@pytest.mark.parametrize("junk", [math.nan, math.inf, 1e4])
def test_nothing_behind_lengths_matters(dtype, index_type, causal, window, junk):
    lengths = torch.tensor([0, 1, 50, 97], dtype=index_type)
    q, k, v = random_qkv(4, 2, 2, 33, 97, 20, dtype=dtype)
    dirty_k, dirty_v = k.clone(), v.clone()
    for b, length in enumerate(lengths.tolist()):
        dirty_k[b, :, length:] = junk
        dirty_v[b, :, length:] = junk
    out, lse = check(
        q, dirty_k, dirty_v, causal=causal, window=window, lengths=lengths, values=(k, v)
    )
    assert not out[0].any()
    assert (lse[0] == -math.inf).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "causal, window", [(True, (255, -1)), (False, (128, 127)), (False, (0, 300)), (True, (3, -1))]
)
def test_windows_over_many_keys(dtype, causal, window):
    q, k, v = random_qkv(2, 4, 2, 1300, 1337, 40, dtype=dtype)
    lengths = torch.tensor([1337, 900])
    check(q, k, v, causal=causal, window=window, lengths=lengths)
    # One value that is not finite reaches the rows whose window holds it, and no other.
    v[:, :, 700, 5] = math.inf
    out = heed.flash_attention(q, k, v, causal=causal, window=window, lengths=lengths)
    seen = visible(1300, 1337, causal, window, lengths, 2)[..., 700].expand(2, 4, 1300)
    assert (out[..., 5][seen] == math.inf).all()
    assert out[..., 5][~seen].isfinite().all()
    assert out[..., [*range(5), *range(6, 40)]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_attended_nan_is_not_hidden(dtype, which):
    q, k, v = random_qkv(1, 2, 2, 6, 40, 16, dtype=dtype)
    {"q": q, "k": k, "v": v}[which][0, 1, 3] = math.nan
    out = heed.flash_attention(q, k, v)
    rows = [3] if which == "q" else range(6)
    assert out[0, 1, rows].isnan().all()
    assert out[0, 0].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_see_nothing(dtype):
    q, k, v = random_qkv(2, 2, 1, 12, 5, 8, dtype=dtype)
    out, lse = check(q, k, v, causal=True)
    assert not out[:, :, :7].any()
    assert (lse[:, :, :7] == -math.inf).all()
    assert lse[:, :, 7:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.0, -0.7, 1.0, 3.5])
def test_scale(dtype, scale):
    check(*random_qkv(1, 2, 2, 9, 33, 8, dtype=dtype), scale=scale)


def test_large_scores_stay_finite():
    q, k, v = random_qkv(1, 2, 2, 9, 140, 8)
    out, lse = heed.flash_attention(q * 1e3, k * 1e2, v, return_lse=True)
    assert out.isfinite().all() and lse.isfinite().all()


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.float16])
@pytest.mark.parametrize("lq", [3, 50])
@pytest.mark.parametrize("share", [-1, -0.71, 0.71, 1])
def test_extreme_finite_bias(dtype, lq, share):
    q, k, v = random_qkv(1, 2, 2, lq, 40, 8, dtype=dtype)
    bias = torch.full((lq, 40), share * torch.finfo(dtype).max, dtype=dtype)
    out, lse = heed.flash_attention(q, k, v, bias=bias, return_lse=True)
    mean = v.double().mean(2, keepdim=True).expand(out.shape)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]
    torch.testing.assert_close(out.double(), mean, rtol=tolerance, atol=tolerance)
    assert lse.isfinite().all() and (lse.sign() == math.copysign(1, share)).all()

    inputs = [x.clone().requires_grad_() for x in (q, k, v, bias)]
    out = heed.flash_attention(*inputs[:3], bias=inputs[3])
    for gradient in torch.autograd.grad(out.sum(), inputs):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.float16])
@pytest.mark.parametrize("lq", [3, 50])
def test_the_least_number_hides_keys_beside_others(dtype, lq):
    q, k, v = random_qkv(1, 2, 2, lq, 40, 8, dtype=dtype)
    hidden = torch.rand(lq, 40) < 0.4
    hidden[:, 7] = False
    least = torch.zeros(lq, 40, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)
    infinite = torch.zeros(lq, 40, dtype=dtype).masked_fill(hidden, -math.inf)
    found = heed.flash_attention(q, k, v, bias=least, return_lse=True)
    expected = heed.flash_attention(q, k, v, bias=infinite, return_lse=True)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "b, h, hkv, lq, lk", [(0, 2, 1, 3, 4), (2, 2, 1, 0, 4), (2, 2, 1, 3, 0), (2, 0, 1, 3, 4)]
)
def test_empty(dtype, b, h, hkv, lq, lk):
    q, k, v = random_qkv(b, h, hkv, lq, lk, 8, 6, dtype)
    out, lse = heed.flash_attention(q, k, v, causal=True, return_lse=True)
    assert out.shape == (b, h, lq, 6) and lse.shape == (b, h, lq)
    assert not out.any()
    assert (lse == -math.inf).all()


def heads_second_to_last(t):
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def inside_a_wider_tensor(t):
    wide = torch.full((*t.shape[:-1], t.shape[-1] + 5), math.nan, dtype=t.dtype)
    wide[..., 3:-2] = t
    return wide[..., 3:-2]


def every_second_token(t):
    apart = torch.full((*t.shape[:2], 2 * t.shape[2], t.shape[3]), math.nan, dtype=t.dtype)
    apart[:, :, ::2] = t
    return apart[:, :, ::2]


def batch_last(t):
    return t.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)


LAYOUTS = [heads_second_to_last, inside_a_wider_tensor, every_second_token, batch_last]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("d", [1, 32, 40])
def test_strides_do_not_change_a_bit(dtype, layout, d):
    q, k, v = random_qkv(2, 4, 2, 19, 70, d, dtype=dtype)
    strided = [layout(t) for t in (q, k, v)]
    assert not all(t.is_contiguous() for t in strided)
    expected = heed.flash_attention(q, k, v, causal=True, return_lse=True)
    found = heed.flash_attention(*strided, causal=True, return_lse=True)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_expanded_tensors(dtype):
    q = random(1, 1, 1, 16, dtype=dtype, seed=1).expand(3, 4, 5, 16)
    k = random(1, 1, 33, 16, dtype=dtype, seed=2).expand(3, 2, 33, 16)
    v = random(3, 1, 33, 16, dtype=dtype, seed=3).expand(3, 2, 33, 16)
    found = heed.flash_attention(q, k, v)
    assert torch.equal(found, heed.flash_attention(q.contiguous(), k.contiguous(), v.contiguous()))
    check(q, k, v)


def test_one_element_axes_have_any_stride():
    q, k, v = (torch.as_strided(t, t.shape, (7, 7, 1, 99)) for t in random_qkv(1, 1, 1, 7, 7, 1))
    check(q, k, v)


@pytest.mark.parametrize("dtype", DTYPES)
def test_lengths_of_any_stride(dtype):
    q, k, v = random_qkv(3, 2, 2, 4, 9, 8, dtype=dtype)
    lengths = torch.tensor([9, 0, 4, 0, 2, 0])[::2]
    check(q, k, v, lengths=lengths)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "lq, lk, options",
    [
        (150, 300, {}),
        (150, 300, {"causal": True}),
        (1300, 1337, {"causal": True, "window": (255, -1)}),
        (1300, 1300, {"window": (100, 70)}),
    ],
)
def test_same_bits_on_any_thread_count(dtype, lq, lk, options):
    q, k, v = random_qkv(2, 4, 2, lq, lk, 64, dtype=dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(heed.flash_attention(q, k, v, return_lse=True, **options))
    finally:
        torch.set_num_threads(before)
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])


def test_inputs_are_not_written():
    tensors = random_qkv(2, 4, 2, 9, 30, 16)
    copies = [t.clone() for t in tensors]
    heed.flash_attention(*tensors, causal=True)
    assert all(torch.equal(t, c) for t, c in zip(tensors, copies))


def test_expanded_masks_and_biases_are_not_copied():
    n = 2**20  # a copy would have 2**40 elements
    q = random(1, 1, n, 1)
    for name, row in (("mask", torch.arange(n) % 3 > 0), ("bias", random(n, seed=4))):
        one = heed.flash_attention(q, q, q, window=(1, 1), **{name: row})
        found = heed.flash_attention(q, q, q, window=(1, 1), **{name: row.expand(1, 1, n, n)})
        assert torch.equal(found, one)
    mask = torch.ones(1, 1, n, 1, dtype=torch.bool).expand(1, 1, n, n)
    found = heed.flash_attention(q, q, q, window=(1, 1), mask=mask)
    assert torch.equal(found, heed.flash_attention(q, q, q, window=(1, 1), mask=mask[..., :1]))


@pytest.mark.parametrize("shape", [(1, 1, 1, 40), (2, 1, 40, 1), (1, 4, 40, 40), (1, 1, 1, 1)])
def test_expanded_biases_have_a_gradient_for_every_score(shape):
    q, k, v = random_qkv(2, 4, 2, 40, 40, 8, dtype=torch.float64)
    bias = random(*shape, dtype=torch.float64, seed=5).expand(2, 4, 40, 40)
    gradients = []
    for given in (bias, bias.contiguous()):
        given = given.detach().requires_grad_()
        gradients += torch.autograd.grad(heed.flash_attention(q, k, v, bias=given).sin().sum(), given)
    assert gradients[0].shape == bias.shape
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_slopes_of_each_entry_are_a_bias_of_distances():
    q, k, v = random_qkv(3, 4, 2, 30, 50, 16, dtype=torch.float64)
    slopes = random(3, 4, dtype=torch.float64, seed=9).requires_grad_()
    distance = (torch.arange(30)[:, None] + 20 - torch.arange(50)).abs().double()
    bias = -slopes[:, :, None, None] * distance
    out = heed.flash_attention(q, k, v, causal=True, alibi_slopes=slopes)
    expected = heed.flash_attention(q, k, v, causal=True, bias=bias)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    weight = random(*out.shape, dtype=torch.float64, seed=10)
    found, needed = (torch.autograd.grad((x * weight).sum(), slopes)[0] for x in (out, expected))
    torch.testing.assert_close(found, needed, rtol=1e-9, atol=1e-9)
    lengths = torch.tensor([50, 50, 50])
    for entry in (
        heed.decode_attention(q[:, :, -3:], k, v, lengths, alibi_slopes=slopes.detach()),
        heed.flash_attention_varlen(
            q.transpose(1, 2).flatten(0, 1), k.transpose(1, 2).flatten(0, 1),
            v.transpose(1, 2).flatten(0, 1), torch.arange(4) * 30, torch.arange(4) * 50,
            causal=True, alibi_slopes=slopes,
        ).unflatten(0, (3, 30)).transpose(1, 2)[:, :, -3:],
    ):  # fmt: skip
        torch.testing.assert_close(entry, out[:, :, -3:], rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"alibi_slopes.*\[2,4\]"):
        heed.flash_attention(q, k, v, alibi_slopes=torch.ones(2, 4))
