"""depthwise_causal_conv, moh_router, local_linear_attention and affine_scaled_attention in PyTorch.

The kernels are proved against their cascades by `heed check`; here is what PyTorch adds.
"""

import heed
import pytest
import torch
from reference import random, random_qkv
from torch.autograd import gradcheck
from torch.library import opcheck

F64 = torch.float64


def wanted(*tensors):
    return [t.clone().requires_grad_() for t in tensors]


def qkv(dtype=F64):
    return random_qkv(2, 4, 2, 5, 7, 3, 2, dtype=dtype)


ALPHA = random(2, 4, 5, dtype=F64, seed=8).sigmoid()
MEAN = random(4, dtype=F64, seed=9).sigmoid()
X = random(2, 6, 8, dtype=F64)
WG = random(5, 8, dtype=F64, seed=1)
SHARED = random(2, 8, dtype=F64, seed=2)
GROUP = random(2, 8, dtype=F64, seed=3)

CALLS = {
    "affine": (
        torch.ops.heed.affine_scaled_attention.default,
        (*qkv(), ALPHA, MEAN),
        dict(causal=True),
    ),
    "affine_lengths": (
        torch.ops.heed.affine_scaled_attention.default,
        (*qkv(), ALPHA, MEAN),
        dict(lengths=torch.tensor([4, 7]), window_left=3),
    ),
    "conv": (
        torch.ops.heed.depthwise_causal_conv.default,
        (
            random(2, 3, 6, 4, dtype=F64),
            random(4, 3, dtype=F64, seed=1),
            random(4, dtype=F64, seed=2),
        ),
        {},
    ),
    "conv_per_head": (
        torch.ops.heed.depthwise_causal_conv.default,
        (random(2, 3, 6, 4, dtype=F64), random(3, 4, 2, dtype=F64, seed=1)),
        {},
    ),
    "local": (torch.ops.heed.local_linear_attention.default, qkv(), dict(causal=True, ridge=0.3)),
    "router": (torch.ops.heed.moh_router.default, (X, WG, SHARED, GROUP), dict(top_k=2)),
    "router_paper": (
        torch.ops.heed.moh_router.default,
        (X, WG, None, GROUP),
        dict(top_k=3, form="paper"),
    ),
    "router_no_shared": (torch.ops.heed.moh_router.default, (X, WG), dict(top_k=1)),
}


@pytest.mark.parametrize("name", CALLS)
def test_gradcheck(name):
    op, args, options = CALLS[name]
    tensors = wanted(*(a for a in args if a is not None))

    def call(*given):
        given = list(given)
        result = op(*(None if a is None else given.pop(0) for a in args), **options)
        return result[0] if name.startswith("affine") else result

    assert gradcheck(call, tensors)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(name, grad):
    op, args, options = CALLS[name]
    opcheck(op, tuple(a if a is None or not grad else a.clone().requires_grad_() for a in args), options)


def everything(q, k, v, alpha, mean, x, wg, weight):
    gates, loss = heed.moh_router(x, wg, top_k=2)
    return (
        heed.affine_scaled_attention(q, k, v, alpha, mean, causal=True).sum()
        + heed.local_linear_attention(heed.depthwise_causal_conv(q, weight), k, v).sum()
        + gates.sum()
        + loss
    )


def test_compile():
    torch.compiler.reset()
    inputs = wanted(*qkv(), ALPHA, MEAN, X, WG, random(3, 2, dtype=F64, seed=4))
    expected = torch.autograd.grad(everything(*inputs), inputs)
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    for found, e in zip(torch.autograd.grad(compiled(*inputs), inputs), expected):
        assert torch.equal(found, e)


def test_identities():
    q, k, v = qkv()
    # alpha = alpha_mean = 1 is softmax attention; a huge ridge makes a constant fit.
    ones = torch.ones(2, 4, 5, dtype=F64)
    softmax = heed.flash_attention(q, k, v)
    found = heed.affine_scaled_attention(q, k, v, ones, ones[0, :, 0])
    torch.testing.assert_close(found, softmax, rtol=1e-12, atol=1e-12)
    found = heed.local_linear_attention(q, k, v, ridge=1e12)
    torch.testing.assert_close(found, softmax, rtol=1e-9, atol=1e-9)
    # A line is fitted exactly.
    a, c = random(3, 2, dtype=F64, seed=5), random(2, dtype=F64, seed=6)
    found = heed.local_linear_attention(q, k, k @ a + c, ridge=1e-12)
    torch.testing.assert_close(found, q @ a + c, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: heed.moh_router(X, WG, top_k=9), ValueError, ["top_k", "9"]),
        (lambda: heed.moh_router(X, WG, top_k=1, form="x"), ValueError, ["form", "x", "code"]),
        (lambda: heed.moh_router(X[0], WG, top_k=1), ValueError, ["x ", "3"]),
        (lambda: heed.local_linear_attention(*qkv(), ridge=0.0), ValueError, ["ridge", "0"]),
        (lambda: heed.depthwise_causal_conv(qkv()[0], WG), ValueError, ["weight"]),
        (lambda: heed.depthwise_causal_conv(qkv()[0], WG[0]), ValueError, ["weight", "2 to 3"]),
        (lambda: heed.depthwise_causal_conv(qkv()[0], X, X), ValueError, ["bias", "1 to 2"]),
        (lambda: heed.affine_scaled_attention(*qkv(), ALPHA[:1], MEAN), ValueError, ["alpha"]),
        (lambda: heed.affine_scaled_attention(*qkv(), ALPHA, MEAN[:2]), ValueError, ["alpha_mean"]),
    ],
)
def test_mistakes(call, error, words):
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value)
