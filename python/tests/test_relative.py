"""relative_attention against plain float64 formulas, and inside PyTorch."""

import math

import heed
import pytest
import torch
from reference import DTYPES, assert_accurate, random, random_qkv, repeat_heads, visible
from torch.autograd import gradcheck
from torch.library import opcheck


def inputs(b, h, hkv, lq, lk, d, dv=None, dtype=torch.float32, distances=None, tables=None):
    p = max(lk - 1, lq, 1) if distances is None else distances
    tables = dtype if tables is None else tables
    return (
        *random_qkv(b, h, hkv, lq, lk, d, dv, dtype),
        random(2 * p, h, d, dtype=tables, seed=4),
        random(2 * p, h, dtype=tables, seed=5),
        random(h, d, dtype=tables, seed=6),
    )


def shift(x, lk):
    """The authors' shift of ``[..., Lq, Lq + Lk]``: row i moves right by i, the last Lk remain."""
    *lead, lq, columns = x.shape
    padded = torch.cat([x, x.new_zeros(*lead, lq, 1)], -1)
    moved = padded.reshape(*lead, columns + 1, lq)[..., :-1, :].reshape(*lead, lq, columns)
    return moved[..., columns - lk :]


def formula(q, k, v, rel_key, rel_bias, content_bias, causal=True, scale=None):
    """As the authors compute it, in q's type: the whole table, then the shift."""
    kind, (lq, lk) = q.dtype, (q.shape[2], k.shape[2])
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    # Rows P - Lk to P + Lq - 1; those that no score reads may not exist.
    p = rel_key.shape[0] // 2
    rows = torch.arange(p - lk, p + lq).clamp(0, 2 * p - 1)
    table = rel_key[rows].to(kind).permute(1, 2, 0)
    x = q @ table + rel_bias[rows].to(kind).T[:, None]
    content = (q + content_bias.to(kind)[:, None]) @ k.mT
    scores = (content + shift(x, lk)) * scale
    seen = visible(lq, lk, causal=causal)
    weights = scores.masked_fill(~seen, -math.inf).softmax(-1).nan_to_num(0.0)
    return weights @ v


def check(*tensors, **options):
    found = heed.relative_attention(*tensors, **options)
    exact = formula(*(t.double() for t in tensors), **options)
    assert found.dtype == tensors[0].dtype
    assert_accurate(found, exact, formula(*tensors, **options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lq, lk", [(1, 1), (1, 129), (129, 7), (7, 129), (129, 129), (2, 34)])
@pytest.mark.parametrize("d, dv", [(1, 3), (5, 5), (63, 17), (80, 80)])
def test_sizes(dtype, causal, lq, lk, d, dv):
    check(*inputs(2, 4, 2, lq, lk, d, dv, dtype), causal=causal)


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_tables_of_any_type_and_stride(dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    *qkv, rel_key, rel_bias, content_bias = inputs(
        1, 4, 2, 33, 47, 16, dtype=dtype, distances=300, tables=wide
    )
    check(*qkv, rel_key, rel_bias, content_bias, scale=-0.3)
    expected = heed.relative_attention(*qkv, rel_key, rel_bias, content_bias)
    strided = [rel_key.mT.contiguous().mT, rel_bias.T.contiguous().T, content_bias.mT.contiguous().mT]
    assert torch.equal(heed.relative_attention(*qkv, *strided), expected)


def test_segments_with_memory_are_one_pass():
    q, k, v, *tables = inputs(1, 2, 2, 30, 30, 8, dtype=torch.float64)
    whole = heed.relative_attention(q, k, v, *tables)
    for end in (10, 20, 30):
        rows = slice(end - 10, end)
        found = heed.relative_attention(q[:, :, rows], k[:, :, :end], v[:, :, :end], *tables)
        torch.testing.assert_close(found, whole[:, :, rows], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{}, dict(causal=False), dict(scale=-0.7)])
@pytest.mark.parametrize("lq, lk", [(4, 4), (2, 5), (5, 3)])
def test_gradients(options, lq, lk):
    tensors = [t.requires_grad_() for t in inputs(2, 4, 2, lq, lk, 3, 2, torch.float64)]
    assert gradcheck(lambda *a: heed.relative_attention(*a, **options), tensors)


def test_second_derivatives_are_refused():
    tensors = [t.requires_grad_() for t in inputs(1, 2, 2, 4, 5, 3)]
    out = heed.relative_attention(*tensors)
    (g,) = torch.autograd.grad(out.sum(), tensors[3], create_graph=True)
    with pytest.raises(RuntimeError, match="relative_attention_backward"):
        g.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(dtype, grad):
    tensors = tuple(t.requires_grad_(grad) for t in inputs(2, 4, 2, 5, 7, 8, 6, dtype))
    for options in ({}, {"causal": False, "scale": 0.3}):
        opcheck(torch.ops.heed.relative_attention.default, tensors, options)


@pytest.mark.parametrize("dynamic", [False, True])
def test_training_step_compiles(dynamic):
    torch.compiler.reset()

    def loss(*tensors):
        return (heed.relative_attention(*tensors) ** 2).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for lq, lk in [(5, 7), (6, 9)]:
        tensors = [t.requires_grad_() for t in inputs(2, 4, 2, lq, lk, 8)]
        expected = torch.autograd.grad(loss(*tensors), tensors)
        for found, e in zip(torch.autograd.grad(compiled(*tensors), tensors), expected):
            assert torch.equal(found, e)


MISTAKES = [
    (dict(rel_key=None), TypeError, ["rel_key", "None"]),
    (dict(rel_key=random(14, 4)), ValueError, ["rel_key", "2", "3"]),
    (dict(rel_key=random(13, 4, 8)), ValueError, ["rel_key", "13", "2P"]),
    (dict(rel_key=random(14, 2, 8)), ValueError, ["rel_key", "2", "4"]),
    (dict(rel_key=random(10, 4, 8), rel_bias=random(10, 4)), ValueError, ["rel_key", "10", "6"]),
    (dict(rel_bias=random(12, 4)), ValueError, ["rel_bias", "12", "14"]),
    (dict(content_bias=random(8, 4)), ValueError, ["content_bias", "8", "4"]),
    (dict(k=random(2, 2, 7, 7)), ValueError, ["k ", "7", "8"]),
]


def call(change, device="cpu"):
    names = ["q", "k", "v", "rel_key", "rel_bias", "content_bias"]
    arguments = dict(zip(names, inputs(2, 4, 2, 5, 7, 8, distances=7))) | change
    return heed.relative_attention(
        **{n: t.to(device) if isinstance(t, torch.Tensor) else t for n, t in arguments.items()}
    )


@pytest.mark.parametrize("change, error, words", MISTAKES)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_mistakes(change, error, words, device):
    with pytest.raises(error) as caught:
        call(change, device)
    for word in ["relative_attention", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(rel_key=random(14, 4, 8).int()), ValueError, ["rel_key", "int32", "float32"]),
        (dict(rel_bias=random(14, 4).int()), ValueError, ["rel_bias", "int32", "float32"]),
        (dict(scale=math.nan), ValueError, ["scale", "nan"]),
    ],
)
def test_more_mistakes(change, error, words):
    with pytest.raises(error) as caught:
        call(change)
    for word in ["relative_attention", *words]:
        assert word in str(caught.value)


def test_without_the_causal_mask_tables_reach_to_the_right():
    with pytest.raises(ValueError, match="P = 6.*P >= 9"):
        heed.relative_attention(*inputs(1, 1, 1, 9, 7, 8, distances=6), causal=False)
    heed.relative_attention(*inputs(1, 1, 1, 9, 7, 8, distances=6))
