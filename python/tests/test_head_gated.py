"""head_gated_attention against plain float64 formulas, and inside PyTorch."""

import math

import heed
import pytest
import torch
from reference import (
    DTYPES,
    assert_accurate,
    attention64,
    naive_softmax,
    random,
    random_qkv,
    visible,
)
from torch.autograd import gradcheck
from torch.library import opcheck


def gates_for(b, h, length, dtype=torch.float32):
    """About half of them 0."""
    gates = random(b, h, length, dtype=dtype, seed=4)
    return torch.where(random(b, h, length, seed=5) > 0, gates, torch.zeros((), dtype=dtype))


def check(b, h, hkv, lq, lk, d, dv=None, dtype=torch.float32, scale=None, own=None, **masks):
    q, k, v = random_qkv(b, h, hkv, lq, lk, d, dv, dtype)
    gates = gates_for(b, h, lq, own or dtype)
    seen = visible(lq, lk, batch=b, **masks)
    found = heed.head_gated_attention(q, k, v, gates, scale=scale, **masks)
    exact = attention64(q, k, v, seen, scale)[0] * gates.double()[..., None]
    naive = (naive_softmax(q, k, v, seen, scale) * gates[..., None]).to(dtype)
    assert found.dtype == dtype
    assert_accurate(found, exact, naive)
    assert not found[gates == 0].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lq, lk", [(1, 1), (1, 129), (129, 7), (7, 129), (129, 129)])
def test_sizes(dtype, causal, lq, lk):
    check(2, 4, 2, lq, lk, 20, 13, dtype, causal=causal)


@pytest.mark.parametrize("dtype", DTYPES)
def test_masks_and_scale(dtype):
    lengths = torch.tensor([0, 1, 50, 97])
    check(4, 2, 1, 33, 97, 20, dtype=dtype, causal=True, lengths=lengths, scale=-0.2)
    check(1, 2, 2, 40, 40, 24, dtype=dtype, window=(5, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gates_in_float32(dtype):
    check(2, 4, 2, 33, 40, 16, dtype=dtype, own=torch.float32)


def test_gates_of_the_router():
    x, wg, shared, group = random(2, 12, 16), random(6, 16), random(2, 16), random(2, 16)
    gates, _ = heed.moh_router(x, wg, shared, group, top_k=2)
    q, k, v = random_qkv(2, 8, 8, 12, 12, 8)
    found = heed.head_gated_attention(q, k, v, gates, causal=True)
    expected = heed.flash_attention(q, k, v, causal=True) * gates[..., None]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert (gates == 0).sum() == 2 * 12 * 4


@pytest.mark.parametrize(
    "options",
    [{}, dict(causal=True), dict(window=(1, 1), scale=-0.7), dict(lengths=torch.tensor([2, 5]))],
)
def test_gradients(options):
    tensors = [t.requires_grad_() for t in random_qkv(2, 4, 2, 4, 5, 3, 2, torch.float64)]
    gates = gates_for(2, 4, 4, torch.float64)

    def call(q, k, v, active):
        # Gates that are 0 stay 0: no difference quotient crosses the jump to "not computed".
        full = torch.zeros_like(gates).masked_scatter(gates != 0, active)
        return heed.head_gated_attention(q, k, v, full, **options)

    assert gradcheck(call, (*tensors, gates[gates != 0].clone().requires_grad_()))


def test_a_zero_gate_has_no_gradient():
    q, k, v = random_qkv(1, 2, 2, 9, 9, 8)
    gates = gates_for(1, 2, 9).requires_grad_()
    heed.head_gated_attention(q, k, v, gates).sum().backward()
    assert torch.equal(gates.grad == 0, gates == 0)


def test_second_derivatives_are_refused():
    q, k, v = (t.requires_grad_() for t in random_qkv(1, 2, 2, 6, 6, 3))
    out = heed.head_gated_attention(q, k, v, gates_for(1, 2, 6))
    (g,) = torch.autograd.grad(out.sum(), k, create_graph=True)
    with pytest.raises(RuntimeError, match="head_gated_attention_backward"):
        g.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(dtype, grad):
    tensors = (*random_qkv(2, 4, 2, 5, 7, 8, 6, dtype), gates_for(2, 4, 5, dtype))
    options = {"causal": True, "window_left": 3, "lengths": torch.tensor([7, 4]), "scale": 0.3}
    opcheck(
        torch.ops.heed.head_gated_attention.default,
        tuple(t.requires_grad_(grad) for t in tensors),
        options,
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_training_step_compiles(dynamic):
    torch.compiler.reset()

    def loss(q, k, v, gates):
        return (heed.head_gated_attention(q, k, v, gates, causal=True) ** 2).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for lq, lk in [(5, 7), (6, 9)]:
        tensors = (*random_qkv(2, 4, 2, lq, lk, 8), gates_for(2, 4, lq))
        tensors = [t.requires_grad_() for t in tensors]
        expected = torch.autograd.grad(loss(*tensors), tensors)
        for found, e in zip(torch.autograd.grad(compiled(*tensors), tensors), expected):
            assert torch.equal(found, e)


@pytest.mark.parametrize("b, lq, lk", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty(b, lq, lk):
    q, k, v = random_qkv(b, 2, 2, lq, lk, 8)
    found = heed.head_gated_attention(q, k, v, torch.ones(b, 2, lq))
    assert torch.equal(found, torch.zeros(b, 2, lq, 8))


Q, K, V = random_qkv(2, 4, 2, 5, 7, 8)
GATES = gates_for(2, 4, 5)


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(gates=None), TypeError, ["gates", "None"]),
        (dict(gates=GATES[..., :4]), ValueError, ["gates", "[2,4,4]", "[2,4,5]"]),
        (dict(gates=GATES[0]), ValueError, ["gates", "2", "3"]),
        (dict(gates=GATES.int()), ValueError, ["gates", "int32", "float32"]),
        (dict(q=Q[:, :3]), ValueError, ["q ", "3", "2"]),
        (dict(window=3), TypeError, ["window", "3"]),
        (dict(scale=math.inf), ValueError, ["scale", "inf"]),
    ],
)
def test_mistakes(change, error, words):
    arguments = dict(q=Q, k=K, v=V, gates=GATES) | change
    with pytest.raises(error) as caught:
        heed.head_gated_attention(**arguments)
    for word in ["head_gated_attention", *words]:
        assert word in str(caught.value)


def test_fake_tensors_are_checked():
    q, k, v, gates = (t.to("meta") for t in (Q, K, V, GATES))
    with pytest.raises(ValueError, match="gates has shape"):
        heed.head_gated_attention(q, k, v, gates[:, :2])
