"""linear_attention and taylor_state_attention against sums over all pairs."""

import math

import heed
import linear_reference as formula
import pytest
import torch
from linear_reference import F64, assert_gradients_near, assert_near, double, features, random_state
from reference import DTYPES, expect_mistake, random, random_qkv
from torch.autograd import gradcheck

SIZES = [(1, 1), (7, 7), (1, 65), (63, 200), (200, 63), (257, 257)]


def positive_qkv(b, h, hkv, lq, lk, d, dv, dtype=torch.float32):
    return (
        features(b, h, lq, d, dtype=dtype, seed=1),
        features(b, hkv, lk, d, dtype=dtype, seed=2),
        random(b, hkv, lk, dv, dtype=dtype, seed=3),
    )


def positive_state(b, h, f, dv, dtype=torch.float32):
    return (
        random(b, h, f, dv, dtype=formula.wide_type(dtype), seed=20),
        features(b, h, f, dtype=formula.wide_type(dtype), seed=21) * 10,
    )


def check(op, reference, q, k, v, **options):
    """All results; the terms of positive features reach the size of the largest value."""
    out, state = op(q, k, v, return_state=True, **options)
    exact = formula.flat(reference(*double((q, k, v)), **{n: double(o) for n, o in options.items()}))
    assert out.dtype == q.dtype
    for found, expected in zip([out, *formula.flat(state)], exact, strict=True):
        assert found.dtype == (q.dtype if found is out else formula.wide_type(q.dtype))
        size = None if not found.numel() else expected.abs().max() + v.abs().max()
        assert_near(found, expected, size, inputs=q.dtype)
    assert torch.equal(op(q, k, v, **options), out)


# --- linear_attention ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lq, lk", SIZES)
@pytest.mark.parametrize("f, dv", [(1, 3), (33, 17), (130, 64)])
def test_sizes(dtype, causal, lq, lk, f, dv):
    tensors = positive_qkv(2, 4, 2, lq, lk, f, dv, dtype)
    check(heed.linear_attention, formula.linear, *tensors, causal=causal)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("hkv", [1, 4])
@pytest.mark.parametrize("lq, lk", [(1, 1), (70, 70), (50, 131)])
def test_initial_state(dtype, causal, hkv, lq, lk):
    tensors = positive_qkv(2, 4, hkv, lq, lk, 24, 15, dtype)
    state = positive_state(2, 4, 24, 15, dtype)
    check(heed.linear_attention, formula.linear, *tensors, causal=causal, initial_state=state)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_lengths(dtype, causal, kind):
    tensors = positive_qkv(4, 2, 1, 97, 97, 20, 9, dtype)
    lengths = torch.tensor([0, 1, 50, 97], dtype=kind)
    for normalize in (True, False):
        options = dict(causal=causal, lengths=lengths, normalize=normalize, eps=1e-3)
        check(heed.linear_attention, formula.linear, *tensors, **options)
    q, k, v = (t.clone() for t in tensors)
    for b, length in enumerate(lengths.tolist()):  # what does not exist is never read
        k[b, :, length:], v[b, :, length:] = math.nan, math.nan
    found = heed.linear_attention(q, k, v, causal=causal, lengths=lengths)
    expected = heed.linear_attention(*tensors, causal=causal, lengths=lengths)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_without_denominator(dtype, causal):
    tensors = positive_qkv(1, 2, 2, 33, 47, 8, 5, dtype)
    (state,) = random_state((1, 2, 8, 5), dtype=dtype)
    options = dict(causal=causal, normalize=False, initial_state=state)
    check(heed.linear_attention, formula.linear, *tensors, **options)
    _, state = heed.linear_attention(*tensors, return_state=True, **options)
    assert isinstance(state, torch.Tensor)


def test_padded_keys_may_be_zeroed_instead():
    q, k, v = positive_qkv(1, 2, 2, 40, 40, 8, 5)
    expected = heed.linear_attention(q, k, v, lengths=torch.tensor([30]))
    k[:, :, 30:] = 0
    torch.testing.assert_close(heed.linear_attention(q, k, v), expected)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("lengths", [None, torch.tensor([2, 6])])
def test_gradcheck(causal, normalize, with_state, lengths):
    tensors = positive_qkv(2, 4, 2, 4, 6, 3, 2, F64)
    state = positive_state(2, 4, 3, 2, F64)[: 2 if normalize else 1] if with_state else ()

    def call(q, k, v, *state):
        initial = (state if normalize else state[0]) if state else None
        options = dict(causal=causal, normalize=normalize, eps=0.1, lengths=lengths)
        out, last = heed.linear_attention(q, k, v, initial_state=initial, return_state=True, **options)
        return [out, *formula.flat(last)]

    assert gradcheck(call, [t.requires_grad_() for t in (*tensors, *state)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lq, lk", [(130, 130), (67, 200), (200, 67)])
def test_gradients(dtype, causal, lq, lk):
    tensors = positive_qkv(2, 4, 2, lq, lk, 20, 13, dtype)
    state = positive_state(2, 4, 20, 13, dtype) if lq <= lk else ()

    def call(op):
        def with_options(q, k, v, *state):
            options = dict(causal=causal, eps=1e-3, initial_state=state or None)
            return op(q, k, v, **options)

        return with_options

    def ours(*args, **options):
        return heed.linear_attention(*args, return_state=True, **options)

    assert_gradients_near(call(ours), call(formula.linear), (*tensors, *state))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_131072_tokens(dtype):
    q, k, v = positive_qkv(1, 1, 1, 131072, 131072, 3, 2, dtype)
    out, (s, z) = heed.linear_attention(q, k, v, causal=True, return_state=True)
    kd, vd = k.double(), v.double()
    sums = (kd[..., :, None] * vd[..., None, :]).cumsum(2)
    num = (q.double()[..., None, :] @ sums)[..., 0, :]
    den = (q.double() * kd.cumsum(2)).sum(-1, keepdim=True)
    size = (kd[..., :, None] * vd[..., None, :].abs()).sum(2).max()
    assert_near(out, num / den, v.double().abs().max(), inputs=dtype)
    assert_near(s, sums[:, :, -1], size, inputs=dtype)
    assert_near(z, kd.sum(2), inputs=dtype)


@pytest.mark.parametrize("f", [3, 17, 80])
def test_memory_of_others_never_shows(f):
    """bfloat16 products pad features further than sums of keys; freed NaN lay in between."""
    tensors = [t.requires_grad_() for t in positive_qkv(1, 2, 1, 4096, 4096, f, 2, torch.bfloat16)]
    expected = None
    for _ in range(10):
        poison = [torch.full((n,), math.nan) for n in (1000, 30000, 300000)]
        del poison
        out = heed.linear_attention(*tensors, causal=True)
        found = (out, *torch.autograd.grad(out.float().sum(), tensors))
        expected = found if expected is None else expected
        for a, b in zip(found, expected):
            assert a.isfinite().all() and torch.equal(a, b)


def test_denominators_near_zero():
    """The documented error: ``u |q| |z| / |d|`` relative, and a row of zeros for exactly 0."""
    v = random(1, 1, 2, 3)
    for gap in (1e-2, 1e-4, 1e-6):
        q, k = torch.tensor([[1.0]]), torch.tensor([[1.0], [-1.0 + gap]])
        out, (_, z) = heed.linear_attention(q[None, None], k[None, None], v, return_state=True)
        expected, _ = formula.linear(q[None, None].double(), k[None, None].double(), v.double())
        ratio = ((out - expected).abs().max() / expected.abs().max()).item()
        assert ratio <= 8 * 2**-23 * 1 / gap
    k = torch.tensor([[1.0], [-1.0]])
    out = heed.linear_attention(q[None, None], k[None, None], v, eps=0.0)
    assert torch.equal(out, torch.zeros_like(out))


# --- taylor_state_attention ----------------------------------------------------------------------


def taylor_check(q, k, v, **options):
    """Orders 1 and 3 may cancel: the error is relative to the sum of the weights' sizes."""
    out, state = heed.taylor_state_attention(q, k, v, return_state=True, **options)
    exact = formula.taylor(*double((q, k, v)), **{n: double(o) for n, o in options.items()})
    size = exact[0].abs().max() + v.double().abs().max() if out.numel() else None
    assert_near(out, exact[0], size, roundings=256)
    for found, expected in zip(state, exact[1], strict=True):
        assert found.dtype == formula.wide_type(q.dtype)
        assert_near(found, expected, roundings=256)
    assert torch.equal(heed.taylor_state_attention(q, k, v, **options), out)


def small_qkv(b, h, hkv, lq, lk, d, dv, dtype=torch.float32):
    q, k, v = random_qkv(b, h, hkv, lq, lk, d, dv, torch.float32)
    return (q / 4).to(dtype), (k / 4).to(dtype), v.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize("lq, lk", SIZES)
@pytest.mark.parametrize("d, dv", [(1, 3), (5, 17), (16, 8)])
def test_taylor_sizes(dtype, order, lq, lk, d, dv):
    taylor_check(*small_qkv(2, 4, 2, lq, lk, d, dv, dtype), order=order)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize("lq, lk", [(1, 1), (50, 131)])
def test_taylor_initial_state(dtype, order, lq, lk):
    before = small_qkv(2, 4, 2, 40, 40, 6, 5, dtype)
    _, state = heed.taylor_state_attention(*before, order=order, return_state=True)
    tensors = (t.roll(1, 2) for t in small_qkv(2, 4, 2, lq, lk, 6, 5, dtype))
    taylor_check(*tensors, order=order, scale=0.3, initial_state=state)


@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize("lq, lk", [(90, 90), (30, 90)])
def test_taylor_is_recurrent_softmax_of_that_order(order, lq, lk):
    tensors = small_qkv(1, 4, 2, lq, lk, 12, 7)
    found = heed.taylor_state_attention(*tensors, order=order)
    expected = heed.recurrent_softmax_attention(*tensors, order=order)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize("lq, lk", [(4, 4), (3, 6)])
def test_taylor_gradcheck(order, lq, lk):
    tensors = small_qkv(2, 2, 1, lq, lk, 3, 2, F64)
    before = small_qkv(2, 2, 1, 5, 5, 3, 2, F64)
    _, state = heed.taylor_state_attention(*before, order=order, return_state=True)

    def call(q, k, v, s, z):
        out, last = heed.taylor_state_attention(
            q, k, v, order=order, initial_state=(s, z), return_state=True
        )
        return [out, *last]

    assert gradcheck(call, [t.clone().requires_grad_() for t in (*tensors, *state)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_taylor_gradients(dtype, order):
    tensors = small_qkv(1, 4, 2, 70, 130, 7, 5, dtype)

    def ours(*tensors):
        return heed.taylor_state_attention(*tensors, order=order, return_state=True)

    def exact(*tensors):
        return formula.taylor(*tensors, order=order)

    assert_gradients_near(ours, exact, tensors, roundings=1024)


@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize("d", [1e-3, 1e-5, 0.0])
def test_taylor_denominators_near_zero(order, d):
    """One key whose polynomial has its root near the score, as recurrent_softmax_attention does."""
    root = {1: -1.0, 3: -1.5960716379833215}[order]
    q = torch.full((1, 1, 1, 1), root + d, dtype=F64)
    k, v = torch.ones(1, 1, 1, 1, dtype=F64), torch.ones(1, 1, 1, 2, dtype=F64)
    found = heed.taylor_state_attention(q, k, v, order=order, scale=1.0)
    expected = heed.recurrent_softmax_attention(q, k, v, order=order, scale=1.0)
    assert found.isfinite().all()
    if d:
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


# --- mistakes ------------------------------------------------------------------------------------

Q, K, V = positive_qkv(2, 4, 2, 5, 7, 8, 6)
S, Z = torch.zeros(2, 4, 8, 6), torch.zeros(2, 4, 8)
N = math.comb(10, 2)


@pytest.mark.parametrize(
    "options, error, words",
    [
        (dict(q=None), TypeError, ["q ", "None"]),
        (dict(k=K[..., :4]), ValueError, ["k ", "4", "8"]),
        (dict(v=V.half()), TypeError, ["v ", "float16", "float32"]),
        (dict(eps=-1.0), ValueError, ["eps", "-1"]),
        (dict(eps=math.inf), ValueError, ["eps", "inf"]),
        (dict(lengths=torch.tensor([7, 8])), ValueError, ["lengths[1]", "8", "7"]),
        (dict(lengths=torch.tensor([7])), ValueError, ["lengths", "[1]", "2"]),
        (dict(lengths=torch.tensor([7.0, 5.0])), ValueError, ["lengths", "float32"]),
        (dict(initial_state=S), TypeError, ["initial_state", "a Tensor", "(S, z)"]),
        (dict(initial_state=(S,)), TypeError, ["initial_state", "(Tensor)", "(S, z)"]),
        (dict(initial_state=(S, None)), TypeError, ["initial_state", "(Tensor, NoneType)"]),
        (dict(initial_state=(S, Z[:, :2])), ValueError, ["initial_state z", "[2,2,8]"]),
        (dict(initial_state=(Z, S)), ValueError, ["initial_state s", "3", "4"]),
        (dict(initial_state=(S.half(), Z)), ValueError, ["initial_state s", "float16", "float32"]),
        (dict(normalize=False, initial_state=(S, Z)), TypeError, ["initial_state", "tensor"]),
        (
            dict(q=features(2, 4, 8, 8), causal=True, initial_state=(S, Z)),
            ValueError,
            ["initial state", "8 queries", "7 keys"],
        ),
    ],
)
def test_mistakes(options, error, words):
    expect_mistake(heed.linear_attention, dict(q=Q, k=K, v=V) | options, error, words)


@pytest.mark.parametrize(
    "options, error, words",
    [
        (dict(order=4), ValueError, ["order", "4", "0 to 3"]),
        (dict(order=-1), ValueError, ["order", "-1"]),
        (dict(order=2.5), RuntimeError, ["order", "float"]),
        (dict(scale=math.nan), ValueError, ["scale", "nan"]),
        (dict(q=random(2, 4, 5, 257), k=random(2, 2, 7, 257)), ValueError, ["q ", "257", "256"]),
        (dict(initial_state=S), TypeError, ["initial_state", "(S, z)"]),
        (dict(initial_state=(S, Z)), ValueError, ["initial_state s", "[2,4,8,6]", f"[2,4,{N},6]"]),
    ],
)
def test_taylor_mistakes(options, error, words):
    expect_mistake(heed.taylor_state_attention, dict(q=Q, k=K, v=V) | options, error, words)
