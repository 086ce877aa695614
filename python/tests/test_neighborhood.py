"""na1d, na2d and na3d against plain float64 formulas, and inside PyTorch."""

import itertools
import math

import heed
import numpy as np
import pytest
import torch
from reference import DTYPES, assert_accurate, assert_lse, random, repeat_heads
from torch.autograd import gradcheck
from torch.library import opcheck

OPS = {1: heed.na1d, 2: heed.na2d, 3: heed.na3d}


def spread(value, axes):
    return list(value) if isinstance(value, tuple) else [value] * axes


def axis_sees(length, kernel, stride, dilation, causal):
    """bool ``[length, length]``: the border rules of arXiv 2504.16922 for one axis."""
    sees = torch.zeros(length, length, dtype=torch.bool)
    for token in range(length):
        group, i = token % dilation, token // dilation
        n = (length - group + dilation - 1) // dilation
        if causal:
            lead = min(i // stride * stride + stride - 1, n - 1)
            keys = range(max(lead - kernel + 1, 0), i + 1)
        else:
            lead = min(i // stride * stride + stride // 2, n - 1)
            start = min(max(lead - kernel // 2, 0), n - kernel)
            keys = range(start, start + kernel)
        sees[token, [group + dilation * j for j in keys]] = True
    return sees


def grid_sees(grid, kernel_size, stride, dilation, is_causal):
    """bool ``[tokens, tokens]``, tokens row-major."""
    options = [spread(o, len(grid)) for o in (kernel_size, stride, dilation, is_causal)]
    sees = torch.ones(1, 1, dtype=torch.bool)
    for length, *axis in zip(grid, *options):
        one = axis_sees(length, *axis)
        rows = sees.shape[0] * length
        sees = (sees[:, None, :, None] & one[None, :, None, :]).reshape(rows, rows)
    return sees


def bias_of(rpb, grid, dilation):
    """``[H, tokens, tokens]``; anything outside of windows."""
    indices = []
    points = list(itertools.product(*map(range, grid)))
    for axis, step in enumerate(spread(dilation, len(grid))):
        half = rpb.shape[1 + axis] // 2
        at = torch.tensor([p[axis] // step for p in points])
        indices.append((at[None, :] - at[:, None] + half).clamp(0, 2 * half))
    return rpb[(slice(None), *indices)]


def formula(query, key, value, kernel_size, stride=1, dilation=1, is_causal=False, scale=None,
            additional_keys=None, additional_values=None, rpb=None):  # fmt: skip
    """``(out, lse)`` over a dense mask, in the type of the inputs."""
    grid, heads = query.shape[1:-2], query.shape[-2]
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    q, k, v = (
        repeat_heads(t.flatten(1, -3).transpose(1, 2), heads) for t in (query, key, value)
    )
    scores = q @ k.mT * scale
    if rpb is not None:
        scores = scores + bias_of(rpb.to(scores.dtype), grid, dilation)
    sees = grid_sees(grid, kernel_size, stride, dilation, is_causal)
    scores = scores.masked_fill(~sees, -math.inf)
    if additional_keys is not None:
        more = repeat_heads(additional_keys.transpose(1, 2), heads)
        scores = torch.cat([scores, q @ more.mT * scale], -1)
        v = torch.cat([v, repeat_heads(additional_values.transpose(1, 2), heads)], 2)
    lse = scores.logsumexp(-1)
    out = (scores - lse[..., None]).exp() @ v
    return (
        out.transpose(1, 2).unflatten(1, grid),
        lse.transpose(1, 2).unflatten(1, grid),
    )


def inputs(grid, b=2, h=4, hkv=2, d=8, dv=6, dtype=torch.float32):
    return (
        random(b, *grid, h, d, dtype=dtype, seed=1),
        random(b, *grid, hkv, d, dtype=dtype, seed=2),
        random(b, *grid, hkv, dv, dtype=dtype, seed=3),
    )


def wide(x):
    return x.double() if isinstance(x, torch.Tensor) else x


def check(grid, dtype, **options):
    tensors = inputs(grid, dtype=dtype)
    out, lse = OPS[len(grid)](*tensors, return_lse=True, **options)
    exact, exact_lse = formula(*map(wide, tensors), **{n: wide(o) for n, o in options.items()})
    naive, _ = formula(*tensors, **options)
    assert out.dtype == dtype
    assert_accurate(out, exact, naive)
    assert_lse(lse, exact_lse)
    assert torch.equal(OPS[len(grid)](*tensors, **options), out)


CASES = [
    ((30,), dict(kernel_size=7)),
    ((31,), dict(kernel_size=6, stride=4)),
    ((33,), dict(kernel_size=(5,), dilation=(4,))),
    ((33,), dict(kernel_size=5, stride=3, dilation=2, is_causal=True)),
    ((9, 12), dict(kernel_size=(3, 5))),
    ((10, 9), dict(kernel_size=4, stride=(2, 3), scale=0.7)),
    ((8, 11), dict(kernel_size=3, dilation=(2, 3), is_causal=(True, False))),
    ((4, 5, 6), dict(kernel_size=(3, 2, 4))),
    (
        (6, 4, 5),
        dict(
            kernel_size=2, stride=(1, 2, 1), dilation=(3, 1, 2), is_causal=(True, False, True)
        ),
    ),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid, options", CASES)
def test_windows(dtype, grid, options):
    check(grid, dtype, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", [(20,), (6, 7), (3, 4, 5)])
@pytest.mark.parametrize("n", [0, 1, 9])
def test_additional_keys(dtype, grid, n):
    keys, values = random(2, n, 2, 8, dtype=dtype, seed=5), random(2, n, 2, 6, dtype=dtype, seed=6)
    check(grid, dtype, kernel_size=3, additional_keys=keys, additional_values=values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid, dilation", [((20,), 2), ((7, 9), (2, 3)), ((4, 6, 5), 1)])
def test_relative_biases(dtype, grid, dilation):
    kernel = (2, 3, 4)[: len(grid)]
    rpb = random(4, *(2 * k - 1 for k in kernel), dtype=dtype, seed=7)
    check(grid, dtype, kernel_size=kernel, dilation=dilation, rpb=rpb)


def test_the_whole_grid_is_dense_attention():
    q, k, v = inputs((5, 6), dtype=torch.float64)
    flat = (t.flatten(1, 2).transpose(1, 2) for t in (q, k, v))
    expected = heed.flash_attention(*flat).transpose(1, 2).unflatten(1, (5, 6))
    torch.testing.assert_close(heed.na2d(q, k, v, (5, 6)), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_first_memory(dtype):
    """Any strides: heads-first tensors seen as heads-last give the same bits."""
    tensors = inputs((9, 12), dtype=dtype)
    moved = [t.movedim(3, 1).contiguous().movedim(1, 3) for t in tensors]
    options = dict(kernel_size=(3, 5), stride=(2, 1))
    assert torch.equal(heed.na2d(*moved, **options), heed.na2d(*tensors, **options))


GRADIENTS = [
    ((7,), dict(kernel_size=4, stride=2)),
    ((9,), dict(kernel_size=3, dilation=3, is_causal=True)),
    ((4, 5), dict(kernel_size=(2, 3), dilation=(2, 1))),
    ((3, 2, 3), dict(kernel_size=2)),
]


@pytest.mark.parametrize("grid, options", GRADIENTS)
@pytest.mark.parametrize("with_more", [False, True])
def test_gradients(grid, options, with_more):
    tensors = list(inputs(grid, b=1, h=2, hkv=1, d=3, dv=2, dtype=torch.float64))
    if with_more:
        tensors += [random(1, 3, 1, w, dtype=torch.float64, seed=w) for w in (3, 2)]
    plain = options.get("stride", 1) == 1 and not options.get("is_causal", False)
    if with_more and plain:
        kernel = spread(options["kernel_size"], len(grid))
        tensors.append(random(2, *(2 * k - 1 for k in kernel), dtype=torch.float64, seed=9))
    tensors = [t.requires_grad_() for t in tensors]

    def call(query, key, value, *more):
        named = dict(zip(("additional_keys", "additional_values", "rpb"), more))
        return OPS[len(grid)](query, key, value, return_lse=True, **options, **named)

    assert gradcheck(call, tensors)


def test_second_derivatives_are_refused():
    q, k, v = (t.requires_grad_() for t in inputs((6, 6)))
    (g,) = torch.autograd.grad(heed.na2d(q, k, v, 3).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="na2d_backward"):
        g.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_opcheck(dtype, grad, axes):
    grid = (5, 4, 6)[:axes]
    tensors = tuple(t.requires_grad_(grad) for t in inputs(grid, dtype=dtype))
    options = dict(kernel_size=[3] * axes, stride=[1] * axes, dilation=[1] * axes)
    options["is_causal"] = [0] * axes
    options["additional_keys"] = random(2, 3, 2, 8, dtype=dtype)
    options["additional_values"] = random(2, 3, 2, 6, dtype=dtype)
    options["rpb"] = random(4, *([5] * axes), dtype=dtype)
    opcheck(getattr(torch.ops.heed, f"na{axes}d").default, tensors, options)


@pytest.mark.parametrize("dynamic", [False, True])
def test_training_step_compiles(dynamic):
    torch.compiler.reset()

    def loss(q, k, v, rpb):
        out, lse = heed.na2d(q, k, v, (3, 5), rpb=rpb, return_lse=True)
        return (out**2).sum() + lse.sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for grid in [(6, 7), (5, 9)]:
        tensors = [t.requires_grad_() for t in (*inputs(grid), random(4, 5, 9, seed=8))]
        expected = torch.autograd.grad(loss(*tensors), tensors)
        for found, e in zip(torch.autograd.grad(compiled(*tensors), tensors), expected):
            assert torch.equal(found, e)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_on_any_thread_count(dtype):
    q, k, v = inputs((24, 24), h=8, hkv=8, d=32, dv=32, dtype=dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(heed.na2d(q, k, v, 7, stride=(1, 2)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(r, results[0]) for r in results)


Q, K, V = inputs((6, 7))
EXTRA = random(2, 3, 2, 8)


def test_numbers_may_be_those_of_numpy_and_causal_none():
    expected = heed.na2d(Q, K, V, 3, 2)
    assert torch.equal(heed.na2d(Q, K, V, np.int64(3), [np.int32(2), 2], is_causal=None), expected)
    assert torch.equal(
        heed.na2d(Q, K, V, 3, stride=None, dilation=None), heed.na2d(Q, K, V, 3, 1, 1)
    )


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(query=None), TypeError, ["query", "None"]),
        (dict(query=Q[0]), ValueError, ["query", "4", "5"]),
        (dict(key=K[:, :5]), ValueError, ["key", "grid axis 0", "5", "6"]),
        (dict(value=V[:1]), ValueError, ["value", "1", "2"]),
        (dict(query=Q[..., :3, :]), ValueError, ["query", "3", "2"]),
        (dict(key=K.double()), TypeError, ["key", "float64", "float32"]),
        (dict(key=random(2, 6, 7, 8, 2).mT), ValueError, ["key", "stride"]),
        (dict(kernel_size=(3, 3, 3)), ValueError, ["kernel_size", "(3, 3, 3)", "2 axes"]),
        (dict(kernel_size=2.5), TypeError, ["kernel_size", "2.5"]),
        (dict(kernel_size=True), TypeError, ["kernel_size", "True"]),
        (dict(kernel_size=None), TypeError, ["kernel_size", "None"]),
        (dict(is_causal=2), TypeError, ["is_causal", "2", "True or False"]),
        (dict(kernel_size=7), ValueError, ["kernel_size", "axis 0", "7", "6"]),
        (dict(stride=4), ValueError, ["stride", "axis 0", "4", "3"]),
        (dict(dilation=3), ValueError, ["kernel_size", "axis 0", "2"]),
        (dict(dilation=(0, 1)), ValueError, ["dilation", "axis 0", "0"]),
        (dict(is_causal=(True,)), ValueError, ["is_causal", "(True,)"]),
        (dict(scale=math.nan), ValueError, ["scale", "nan"]),
        (dict(additional_keys=EXTRA), ValueError, ["additional_values", "missing"]),
        (dict(rpb=random(4, 5, 4)), ValueError, ["rpb", "[4,5,4]", "[4,5,5]"]),
        (dict(rpb=random(4, 5, 5), stride=2), ValueError, ["rpb", "stride 2"]),
        (dict(rpb=random(4, 5, 5), is_causal=True), ValueError, ["rpb", "causal"]),
    ],
)
def test_mistakes(change, error, words):
    arguments = dict(query=Q, key=K, value=V, kernel_size=3) | change
    with pytest.raises(error) as caught:
        heed.na2d(**arguments)
    for word in ["na2d", *words]:
        assert word in str(caught.value)


def test_empty_batch():
    q, k, v = (t[:0].requires_grad_() for t in (Q, K, V))
    found = heed.na2d(q, k, v, 3)
    assert found.shape == (0, *Q.shape[1:-1], V.shape[-1])
    found.sum().backward()
    assert k.grad.shape == k.shape


def test_fake_tensors_are_checked():
    q, k, v = (t.to("meta") for t in (Q, K, V))
    with pytest.raises(ValueError, match="length of grid axis 1"):
        heed.na2d(q, k[:, :, :5], v, 3)
