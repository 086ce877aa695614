"""parallax_attention against plain float64 formulas, and inside PyTorch."""

import math

import heed
import pytest
import torch
from reference import (
    DTYPES,
    assert_accurate,
    attention64,
    random,
    random_qkv,
    repeat_heads,
    scores64,
    visible,
)
from torch.autograd import gradcheck
from torch.library import opcheck


def inputs(b, h, hkv, lq, lk, d, dv=None, dtype=torch.float32):
    q, k, v = random_qkv(b, h, hkv, lq, lk, d, dv, dtype)
    return q, random(b, h, lq, d, dtype=dtype, seed=4), k, v


def formula(q, r, k, v, seen, scale=None):
    """``(out, v_mean, t_mean, lse)`` from the covariance, in the type of the inputs."""
    kind = q.dtype
    scores = scores64(q, k, scale).to(kind).masked_fill(~seen, -math.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp().nan_to_num(0.0)
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    v_mean, t = weights @ v, r @ k.mT
    t_mean = (weights * t).sum(-1)
    spread = weights * (t - t_mean[..., None])
    return v_mean - (spread @ v - spread.sum(-1)[..., None] * v_mean), v_mean, t_mean, lse


def check(q, r, k, v, scale=None, **masks):
    seen = visible(q.shape[2], k.shape[2], batch=q.shape[0], **masks)
    found = heed.parallax_attention(q, r, k, v, scale=scale, return_stats=True, **masks)
    exact = formula(*(t.double() for t in (q, r, k, v)), seen, scale)
    naive = formula(q, r, k, v, seen, scale)
    assert found[0].dtype == q.dtype
    assert_accurate(found[0], exact[0], naive[0])
    statistics = torch.float64 if q.dtype == torch.float64 else torch.float32
    for f, n, e in zip(found[1:], naive[1:], exact[1:]):
        assert f.dtype == statistics
        empty = e.isneginf()
        assert torch.equal(f.isneginf(), empty)
        # To the rounding of the inputs: a 16-bit call weighs with 16-bit weights.
        assert_accurate(*(t.masked_fill(empty, 0.0) for t in (f.to(q.dtype), e, n)))
    assert torch.equal(heed.parallax_attention(q, r, k, v, scale=scale, **masks), found[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lq, lk", [(1, 1), (1, 129), (129, 7), (7, 129), (129, 129)])
@pytest.mark.parametrize("d, dv", [(1, 3), (5, 5), (63, 17), (80, 80)])
def test_sizes(dtype, causal, lq, lk, d, dv):
    check(*inputs(2, 4, 2, lq, lk, d, dv, dtype), causal=causal)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [(0, 0), (5, 1), (-1, 2)])
@pytest.mark.parametrize("lq, lk", [(40, 40), (9, 40), (40, 9)])
def test_windows(dtype, window, lq, lk):
    check(*inputs(1, 2, 2, lq, lk, 24, dtype=dtype), window=window)


@pytest.mark.parametrize("dtype", DTYPES)
def test_lengths_and_scale(dtype):
    lengths = torch.tensor([0, 1, 50, 97])
    check(*inputs(4, 2, 1, 33, 97, 20, dtype=dtype), causal=True, lengths=lengths, scale=-0.2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_probe_it_is_softmax(dtype):
    q, r, k, v = inputs(1, 4, 2, 33, 47, 16, dtype=dtype)
    found = heed.parallax_attention(q, torch.zeros_like(r), k, v, causal=True)
    exact, _ = attention64(q, k, v, visible(33, 47, causal=True))
    torch.testing.assert_close(found.double(), exact, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(causal=True),
        dict(window=(1, 1), scale=-0.7),
        dict(lengths=torch.tensor([2, 5]), causal=True),
    ],
)
def test_gradients(options):
    tensors = [t.requires_grad_() for t in inputs(2, 4, 2, 4, 5, 3, 2, torch.float64)]

    def call(*tensors):
        out, _, _, lse = heed.parallax_attention(*tensors, return_stats=True, **options)
        return out, lse.masked_fill(lse.isneginf(), 0.0)

    assert gradcheck(call, tensors)


def test_statistics_have_no_gradient():
    tensors = [t.requires_grad_() for t in inputs(1, 2, 2, 4, 5, 3)]
    out, v_mean, t_mean, lse = heed.parallax_attention(*tensors, return_stats=True)
    assert out.requires_grad and lse.requires_grad
    assert not v_mean.requires_grad and not t_mean.requires_grad
    with pytest.raises(RuntimeError, match="does not require grad"):
        v_mean.sum().backward()


def test_a_gate_of_the_correction_is_a_factor_of_r():
    q, r, k, v = inputs(2, 4, 2, 4, 5, 3, 2, torch.float64)
    gate = random(2, 4, 4, dtype=torch.float64, seed=5).sigmoid()[..., None]
    out, v_mean, *_ = heed.parallax_attention(q, r, k, v, return_stats=True)
    found = heed.parallax_attention(q, gate * r, k, v)
    torch.testing.assert_close(found, v_mean + gate * (out - v_mean))


def test_second_derivatives_are_refused():
    q, r, k, v = (t.requires_grad_() for t in inputs(1, 2, 2, 4, 5, 3))
    out = heed.parallax_attention(q, r, k, v)
    (g,) = torch.autograd.grad(out.sum(), r, create_graph=True)
    with pytest.raises(RuntimeError, match="parallax_attention_backward"):
        g.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(dtype, grad):
    tensors = tuple(t.requires_grad_(grad) for t in inputs(2, 4, 2, 5, 7, 8, 6, dtype))
    options = {"causal": True, "window_left": 3, "lengths": torch.tensor([7, 4]), "scale": 0.3}
    opcheck(torch.ops.heed.parallax_attention.default, tensors, options)


@pytest.mark.parametrize("dynamic", [False, True])
def test_training_step_compiles(dynamic):
    torch.compiler.reset()

    def loss(q, r, k, v):
        out, v_mean, t_mean, lse = heed.parallax_attention(
            q, r, k, v, causal=True, return_stats=True
        )
        return (out**2).sum() + lse.sum() + v_mean.sum() + t_mean.sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for lq, lk in [(5, 7), (6, 9)]:
        tensors = [t.requires_grad_() for t in inputs(2, 4, 2, lq, lk, 8)]
        expected = torch.autograd.grad(loss(*tensors), tensors)
        for found, e in zip(torch.autograd.grad(compiled(*tensors), tensors), expected):
            assert torch.equal(found, e)


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(r=None), TypeError, ["r ", "None"]),
        (dict(r=random(2, 4, 5, 7)), ValueError, ["r ", "7", "8"]),
        (dict(r=random(2, 2, 5, 8)), ValueError, ["r ", "2,2", "2,4"]),
        (dict(r=random(4, 5, 8)), ValueError, ["r ", "3", "4"]),
        (dict(r=random(2, 4, 5, 8).double()), TypeError, ["r ", "float64", "float32"]),
        (dict(r=random(2, 4, 8, 5).mT), ValueError, ["r ", "stride"]),
        (dict(k=random(2, 2, 7, 7)), ValueError, ["k ", "7", "8"]),
        (dict(window=3), TypeError, ["window", "3"]),
        (dict(scale=math.inf), ValueError, ["scale", "inf"]),
        (dict(lengths=torch.tensor([8, 0])), ValueError, ["lengths", "8", "7"]),
    ],
)
def test_mistakes(change, error, words):
    q, r, k, v = inputs(2, 4, 2, 5, 7, 8)
    with pytest.raises(error) as caught:
        heed.parallax_attention(**(dict(q=q, r=r, k=k, v=v) | change))
    for word in ["parallax_attention", *words]:
        assert word in str(caught.value)


def test_fake_tensors_are_checked():
    q, r, k, v = (t.to("meta") for t in inputs(2, 4, 2, 5, 7, 8))
    with pytest.raises(ValueError, match="r has shape"):
        heed.parallax_attention(q, r[:, :2], k, v)
