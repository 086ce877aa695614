"""stochastic_attention against plain float64 formulas, random_permutation, and both in PyTorch."""

import math

import heed
import pytest
import torch
from reference import DTYPES, assert_accurate, assert_lse, attention64, naive_softmax, random_qkv
from torch.autograd import gradcheck
from torch.library import opcheck


def seen_by(permutation, b, h, window, causal):
    """bool ``[b,h,L,L]``."""
    slots = permutation.expand(b, h, -1) if permutation.dim() < 3 else permutation
    near = (slots[..., :, None] - slots[..., None, :]).abs() <= window // 2
    return near.tril() if causal else near


def check(b, h, hkv, length, window, axes, causal=True, dtype=torch.float32, scale=None):
    q, k, v = random_qkv(b, h, hkv, length, length, 16, 12, dtype)
    permutation = heed.random_permutation(3, (b, h, length)[3 - axes :])
    out, lse = heed.stochastic_attention(
        q, k, v, permutation, window=window, causal=causal, scale=scale, return_lse=True
    )
    seen = seen_by(permutation, b, h, window, causal)
    exact, exact_lse = attention64(q, k, v, seen, scale)
    assert out.dtype == dtype
    assert_accurate(out, exact, naive_softmax(q, k, v, seen, scale))
    assert_lse(lse, exact_lse)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("length, window", [(1, 1), (7, 4), (70, 9), (70, 1), (130, 400)])
def test_windows(dtype, causal, axes, length, window):
    check(2, 4, 2, length, window, axes, causal, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale(dtype):
    check(1, 2, 2, 40, 10, 1, dtype=dtype, scale=-0.7)


@pytest.mark.parametrize("shape", [5, [5], (3, 5), (2, 3, 5)])
def test_random_permutations(shape):
    found = heed.random_permutation(7, shape)
    sizes = (shape,) if isinstance(shape, int) else tuple(shape)
    assert found.shape == sizes and found.dtype == torch.int64
    assert torch.equal(found.sort(-1).values, torch.arange(5).expand(sizes))
    assert torch.equal(heed.random_permutation(7, shape), found)
    assert not torch.equal(heed.random_permutation(-7, (100,)), heed.random_permutation(7, (100,)))


def test_random_permutation_names_a_negative_extent():
    with pytest.raises(ValueError, match=r"random_permutation: shape is \[-3\]"):
        heed.random_permutation(1, (-3,))


def test_random_permutation_as_an_operator():
    opcheck(torch.ops.heed.random_permutation.default, (7, [3, 5]))


def test_compile():
    q, k, v = random_qkv(1, 2, 2, 33, 33, 8)

    def layer(q, k, v):
        order = heed.random_permutation(4, (2, 33))
        return heed.stochastic_attention(q * 2, k, v, order, window=7)

    compiled = torch.compile(layer, fullgraph=True)
    assert torch.equal(compiled(q, k, v), layer(q, k, v))


def test_random_permutation_mistakes():
    with pytest.raises(ValueError, match="random_permutation"):
        heed.random_permutation(1, [])
    with pytest.raises(ValueError, match="random_permutation: shape is .* 1 to 3 axes"):
        heed.random_permutation(1, [1] * 7)
    for shape in (3.5, [2, None]):
        with pytest.raises(TypeError, match="random_permutation: shape is .*whole numbers"):
            heed.random_permutation(1, shape)
    with pytest.raises(TypeError, match=r"seed is 0\.5; a whole number"):
        heed.random_permutation(0.5, [3])


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("causal", [False, True])
def test_gradients(axes, causal):
    tensors = [t.requires_grad_() for t in random_qkv(2, 4, 2, 6, 6, 3, 2, torch.float64)]
    permutation = heed.random_permutation(1, (2, 4, 6)[3 - axes :])

    def call(*tensors):
        return heed.stochastic_attention(
            *tensors, permutation, window=3, causal=causal, return_lse=True
        )

    assert gradcheck(call, tensors)


def test_second_derivatives_are_refused():
    q, k, v = (t.requires_grad_() for t in random_qkv(1, 2, 2, 6, 6, 3))
    out = heed.stochastic_attention(q, k, v, heed.random_permutation(1, 6), window=3)
    (g,) = torch.autograd.grad(out.sum(), k, create_graph=True)
    with pytest.raises(RuntimeError, match="stochastic_attention_backward"):
        g.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(dtype, grad):
    tensors = tuple(t.requires_grad_(grad) for t in random_qkv(2, 4, 2, 7, 7, 8, 6, dtype))
    arguments = (*tensors, heed.random_permutation(1, (4, 7)))
    opcheck(torch.ops.heed.stochastic_attention.default, arguments, {"window": 5, "scale": 0.3})


@pytest.mark.parametrize("b, length", [(0, 3), (2, 0)])
def test_empty(b, length):
    q, k, v = (t.requires_grad_() for t in random_qkv(b, 2, 2, length, length, 8))
    found = heed.stochastic_attention(q, k, v, heed.random_permutation(1, length), window=3)
    assert torch.equal(found, torch.zeros(b, 2, length, 8))
    found.sum().backward()
    assert torch.equal(k.grad, torch.zeros_like(k))


Q, K, V = random_qkv(2, 4, 2, 6, 6, 8)
ORDER = heed.random_permutation(1, 6)


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(permutation=None), TypeError, ["permutation", "None"]),
        (dict(permutation=ORDER[:5]), ValueError, ["permutation", "[5]", "[6]"]),
        (dict(permutation=ORDER.int()), ValueError, ["permutation", "int32", "int64"]),
        (dict(permutation=ORDER * 0), ValueError, ["permutation", "slot 0", "once"]),
        (dict(permutation=ORDER + 1), ValueError, ["permutation", "slot 6", "0 to 5"]),
        (dict(permutation=ORDER.expand(1, 2, 4, 6)), ValueError, ["permutation", "4", "1 to 3"]),
        (dict(window=0), ValueError, ["window", "0"]),
        (dict(k=K[:, :, :5], v=V[:, :, :5]), ValueError, ["k ", "5", "6"]),
        (dict(q=Q.double()), TypeError, ["k ", "float32", "float64"]),
        (dict(scale=math.inf), ValueError, ["scale", "inf"]),
    ],
)
def test_mistakes(change, error, words):
    arguments = dict(q=Q, k=K, v=V, permutation=ORDER, window=3) | change
    with pytest.raises(error) as caught:
        heed.stochastic_attention(**arguments)
    for word in ["stochastic_attention", *words]:
        assert word in str(caught.value)


def test_fake_tensors_are_checked():
    q, k, v, order = (t.to("meta") for t in (Q, K, V, ORDER))
    with pytest.raises(ValueError, match="permutation has length"):
        heed.stochastic_attention(q, k, v, order[:4], window=3)
