"""lightning_attention and lightning_slopes against sums over all pairs."""

import math

import heed
import linear_reference as formula
import pytest
import torch
from linear_reference import F64, assert_gradients_near, assert_near, double, random_state
from reference import DTYPES, random, random_qkv
from torch.autograd import gradcheck

SLOPES = torch.tensor([0.0, 1e-6, 0.3, 8.0])


def check(q, k, v, slopes=None, initial_state=None):
    out, state = heed.lightning_attention(
        q, k, v, slopes, initial_state=initial_state, return_state=True
    )
    args = double((q, k, v, slopes, initial_state))
    exact = formula.lightning(*args)
    sizes = formula.lightning(*(a if a is None else a.abs() for a in args))
    assert out.dtype == q.dtype and state.dtype == formula.wide_type(q.dtype)
    for found, expected, size in zip((out, state), exact, sizes):
        assert_near(found, expected, size.max() if size.numel() else 0, inputs=q.dtype)
    alone = heed.lightning_attention(q, k, v, slopes, initial_state=initial_state)
    assert torch.equal(alone, out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lq, lk", [(1, 1), (7, 7), (1, 65), (63, 200), (200, 63), (257, 257)])
@pytest.mark.parametrize("d, dv", [(1, 3), (5, 1), (33, 17), (64, 80)])
def test_sizes(dtype, lq, lk, d, dv):
    check(*random_qkv(2, 4, 2, lq, lk, d, dv, dtype), SLOPES)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hkv", [1, 2, 4])
@pytest.mark.parametrize("lq, lk", [(1, 1), (1, 9), (70, 70), (50, 131)])
def test_initial_state(dtype, hkv, lq, lk):
    tensors = random_qkv(2, 4, hkv, lq, lk, 24, 15, dtype)
    (state,) = random_state((2, 4, 24, 15), dtype=dtype)
    check(*tensors, SLOPES, state)
    check(*tensors, None, state)


def test_wide_heads():
    check(*random_qkv(1, 1, 1, 40, 40, 300, 270), torch.tensor([0.1]))


@pytest.mark.parametrize("slope_type", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_types_of_slopes(dtype, slope_type):
    slopes = torch.tensor([0.25, 0.5], dtype=slope_type).requires_grad_()
    q, k, v = random_qkv(1, 2, 2, 30, 30, 8, dtype=dtype)
    out = heed.lightning_attention(q, k, v, slopes)
    expected = formula.lightning(*double((q, k, v)), slopes.double().detach())[0]
    assert_near(out, expected, inputs=dtype)
    out.float().sum().backward()
    assert slopes.grad.dtype == slope_type


@pytest.mark.parametrize("slopes, state", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("lq, lk", [(5, 5), (3, 7)])
def test_gradcheck(slopes, state, lq, lk):
    tensors = list(random_qkv(2, 4, 2, lq, lk, 3, 2, dtype=F64))
    given = {}
    if slopes:
        given["slopes"] = torch.tensor([0.1, 0.4, 1.0, 3.0], dtype=F64)
    if state:
        given["initial_state"] = random(2, 4, 3, 2, dtype=F64, seed=9)
    names = list(given)

    def call(q, k, v, *rest):
        return heed.lightning_attention(q, k, v, **dict(zip(names, rest)), return_state=True)

    assert gradcheck(call, [t.requires_grad_() for t in [*tensors, *given.values()]])


def check_gradients(dtype, lq, lk, hkv, d, dv):
    tensors = random_qkv(2, 4, hkv, lq, lk, d, dv, dtype)
    slopes = torch.tensor([1e-6, 0.02, 0.3, 8.0], dtype=formula.wide_type(dtype))
    state = random_state((2, 4, d, dv), dtype=dtype) if lq <= lk else ()

    def call(q, k, v, slopes, state=None):
        return heed.lightning_attention(q, k, v, slopes, initial_state=state, return_state=True)

    assert_gradients_near(call, formula.lightning, (*tensors, slopes, *state))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lq, lk", [(130, 130), (67, 200), (200, 67)])
def test_gradients(dtype, lq, lk):
    check_gradients(dtype, lq, lk, 2, 20, 13)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("lq, lk", [(130, 130), (67, 200), (200, 67)])
def test_gradients_of_rows_that_are_multiplied_where_they_lie(dtype, lq, lk):
    check_gradients(dtype, lq, lk, 4, 32, 64)


@pytest.mark.parametrize("wanted", [(0, 1, 2), (0,), (1,), (2, 3), (3,), (0, 4)])
def test_gradients_that_nobody_wants(wanted):
    slopes, state = torch.tensor([0.3, 1.0]), random(1, 2, 16, 16, seed=5)
    inputs = [*random_qkv(1, 2, 1, 100, 100, 16), slopes, state]

    def gradients(wanted):
        leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(inputs)]
        heed.lightning_attention(*leaves[:4], initial_state=leaves[4]).square().sum().backward()
        return [leaf.grad for leaf in leaves]

    every = gradients(range(5))
    for i, gradient in enumerate(gradients(wanted)):
        assert torch.equal(gradient, every[i]) if i in wanted else gradient is None


def test_gradient_of_the_state_alone():
    tensors = [t.requires_grad_() for t in random_qkv(1, 2, 1, 70, 70, 5, 4, F64)]
    exact = [t.detach().clone().requires_grad_() for t in tensors]
    slopes = torch.tensor([0.0, 0.2], dtype=F64)
    _, state = heed.lightning_attention(*tensors, slopes, return_state=True)
    _, expected = formula.lightning(*exact, slopes)
    weights = random(1, 2, 5, 4, dtype=F64, seed=3)
    state.backward(weights)
    expected.backward(weights)
    for t, e in zip(tensors[1:], exact[1:]):
        assert_near(t.grad, e.grad)
    assert tensors[0].grad is None or not tensors[0].grad.any()


# --- long sequences ------------------------------------------------------------------------------


def recurrence(q, k, v, slopes):
    """One token after another in float64, for one batch entry."""
    q, k, v = (t[0].double() for t in (q, k, v))
    decay = torch.exp(-slopes.double())[:, None, None]
    state = torch.zeros(q.shape[0], q.shape[2], v.shape[2], dtype=F64)
    size = state.clone()
    out, sizes = [], []
    for t in range(q.shape[1]):
        state = decay * state + k[:, t, :, None] * v[:, t, None, :]
        size = decay * size + (k[:, t, :, None] * v[:, t, None, :]).abs()
        out.append((q[:, t, None] @ state)[:, 0])
        sizes.append((q[:, t, None].abs() @ size).max())
    return torch.stack(out, 1)[None], state[None], max(sizes)


def test_131072_tokens():
    slopes = torch.tensor([8.0, 1.0, 1e-3, 1e-6])
    half = random_qkv(1, 4, 1, 131072, 131072, 3, 2, dtype=torch.bfloat16)
    expected, last, size = recurrence(*half, slopes)
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = (t.to(dtype) for t in half)
        out, state = heed.lightning_attention(q, k, v, slopes, return_state=True)
        assert_near(out, expected, size, inputs=dtype)
        assert_near(state, last, size, inputs=dtype)


@pytest.mark.parametrize("slope", [1e-6, 8.0, 1e6])
def test_gradients_of_131072_tokens_are_finite(slope):
    tensors = [t.requires_grad_() for t in random_qkv(1, 1, 1, 131072, 131072, 3, 2)]
    slopes = torch.tensor([slope]).requires_grad_()
    out, state = heed.lightning_attention(*tensors, slopes, return_state=True)
    (out.mean() + state.mean()).backward()
    for t in (*tensors, slopes):
        assert t.grad.isfinite().all()


# --- slopes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [1, 2, 3, 8, 12, 16, 20])
def test_slopes_of_published_models(heads):
    def alibi(n):  # as in the ALiBi paper's code
        if math.log2(n).is_integer():
            start = 2 ** -(2 ** -(math.log2(n) - 3))
            return [start ** (i + 1) for i in range(n)]
        closest = 2 ** math.floor(math.log2(n))
        return alibi(closest) + alibi(2 * closest)[0::2][: n - closest]

    expected = torch.tensor(alibi(heads), dtype=F64)
    torch.testing.assert_close(heed.lightning_slopes(heads).double(), expected, rtol=1e-6, atol=0)
    for layer in range(3):
        found = heed.lightning_slopes(heads, layer, 3)
        factor = 1 - layer / 2 + 1e-5
        torch.testing.assert_close(found.double(), expected * factor, rtol=1e-6, atol=0)


@pytest.mark.parametrize("form, first", [("paper", 1), ("fla", 0)])
def test_slopes_of_other_forms(form, first):
    h = torch.arange(first, first + 6, dtype=F64)
    for layer in range(first, first + 4):
        found = heed.lightning_slopes(6, layer, 4, form)
        assert found.dtype == torch.float32
        expected = 8 * h / 6 * (1 - layer / 4)
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


# --- mistakes ------------------------------------------------------------------------------------


Q, K, V = random_qkv(2, 4, 2, 5, 7, 8, 6)
STATE = torch.zeros(2, 4, 8, 6)


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(q=None), TypeError, ["q ", "None"]),
        (dict(q=Q[0]), ValueError, ["q ", "3", "4"]),
        (dict(k=K[..., :4]), ValueError, ["k ", "4", "8"]),
        (dict(k=K.double()), TypeError, ["k ", "float64", "float32"]),
        (dict(v=V[:, :, :3]), ValueError, ["v ", "3", "7"]),
        (dict(q=Q[:, :3]), ValueError, ["q ", "3", "2"]),
        (dict(q=random(2, 4, 8, 5).mT), ValueError, ["q ", "stride"]),
        (dict(q=Q[..., :0], k=K[..., :0]), ValueError, ["q ", "head dim 0"]),
        (dict(q=Q.int(), k=K.int(), v=V.int()), TypeError, ["q ", "int32"]),
        (dict(slopes=torch.ones(3)), ValueError, ["slopes", "[3]", "4"]),
        (dict(slopes=torch.ones(4, 1)), ValueError, ["slopes", "2 dimensions", "1"]),
        (dict(slopes=torch.ones(4).int()), ValueError, ["slopes", "int32"]),
        (dict(slopes=torch.tensor([1.0, -0.5, 0, 0])), ValueError, ["slopes[1]", "-0.5"]),
        (dict(slopes=torch.tensor([1.0, 0, math.nan, 0])), ValueError, ["slopes[2]", "nan"]),
        (dict(slopes=torch.tensor([math.inf, 0, 0, 0])), ValueError, ["slopes[0]", "inf"]),
        (dict(slopes=0.5), RuntimeError, ["slopes", "float"]),
        (dict(initial_state=STATE[:, :2]), ValueError, ["initial_state", "[2,2,8,6]", "[2,4,8,6]"]),
        (dict(initial_state=STATE[0]), ValueError, ["initial_state", "3", "4"]),
        (dict(initial_state=STATE.bfloat16()), ValueError, ["initial_state", "bfloat16"]),
        (dict(initial_state=(STATE,)), TypeError, ["initial_state", "(Tensor)", "tensor"]),
        (
            dict(q=random(2, 4, 8, 8), initial_state=STATE),
            ValueError,
            ["initial state", "8 queries", "7 keys"],
        ),
    ],
)
def test_mistakes(change, error, words):
    with pytest.raises(error) as caught:
        heed.lightning_attention(**(dict(q=Q, k=K, v=V) | change))
    for word in ["lightning_attention", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "args, words",
    [
        ((0,), ["num_heads", "0"]),
        ((8, 1), ["layer", "num_layers"]),
        ((8, None, 4), ["num_layers", "layer"]),
        ((8, 4, 4), ["layer", "4", "0 to 3"]),
        ((8, 0, 1), ["num_layers", "1", "2"]),
        ((8, 0, 4, "paper"), ["layer", "0", "1 to 4"]),
        ((8, 0, 4, "papr"), ["form", "papr", "paper"]),
    ],
)
def test_mistakes_about_slopes(args, words):
    with pytest.raises(ValueError) as caught:
        heed.lightning_slopes(*args)
    for word in ["lightning_slopes", *words]:
        assert word in str(caught.value)
